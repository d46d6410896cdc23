"""Both paths to an answer give the same records; a record gives its answer back; random groups are drawn once."""

import re
from types import SimpleNamespace

import own_judges
import pytest
from sealed_runs import seal

from safetyheads import UNDIFFERENTIATED_ATTENTION, Head, generate, parse_heads
from safetyheads.answers.decoding import GREEDY, TOP_5, Answer, Decoding
from safetyheads.answers.drafts import drafts_fit, drafts_of
from safetyheads.answers.judging import Judging
from safetyheads.heads import format_heads
from safetyheads.judges.function import CallableJudge
from safetyheads.judges.named import judges_named
from safetyheads.measures import random_groups as random_groups_module
from safetyheads.measures.head_pass import Score
from safetyheads.runs import kept_answers as kept_module
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.kept_answers import KeptAnswers, judged_answer, record_of
from safetyheads.runs.run import Run, random_groups_of

GROUPS = [parse_heads(text) for text in ("1-3", "1-3,2-5", "0-0", "3-1", "2-1,2-5")]


def records(organism, sampling, full_answers, monkeypatch, folder, least_drafted):
    """Routes and records of both kinds of groups, by the path that ``least_drafted`` leads to."""
    monkeypatch.setattr(kept_module, "_LEAST_DRAFTED", least_drafted)
    decoding = Decoding(24, sampling, full_answers)
    prompts = organism.harmful[:8]
    judging = Judging(organism.engine, prompts, judges_named(["paper", "phrases"]), 24, full_answers)
    with RunDirectory.start(folder, {}, {}) as directory:
        kept = KeptAnswers("harmful", judging, decoding, directory, Progress(), measures_surprise=True)
        own = [(Head(1, 3), Head(2, number % 8)) for number in range(len(prompts))]
        groups = [
            kept.vanilla(),
            *kept.under("groups", GROUPS, UNDIFFERENTIATED_ATTENTION),
            *kept.of_each("query_level", own, UNDIFFERENTIATED_ATTENTION),
        ]
    assert [one.group for one in groups] == ["", "1-3", "1-3,2-5", "0-0", "3-1", "2-1,2-5", "top 1", "top 2"]
    routes = {record.get("route") for one in groups[1:] for record in one.flat()}
    return routes, [{**record, "route": None} for one in groups for record in one.flat()]


@pytest.mark.parametrize("full_answers", [False, True], ids=["early", "full"])
@pytest.mark.parametrize("sampling", [GREEDY, TOP_5], ids=lambda one: one.name)
def test_drafted_and_plain_answers_have_the_same_records(organism, tmp_path, sampling, full_answers, monkeypatch):
    arguments = organism, sampling, full_answers, monkeypatch
    routes, plain = records(*arguments, tmp_path / "plain", 99)
    assert routes == {"plain"}
    routes, drafted = records(*arguments, tmp_path / "drafted", 1)
    assert {"drafted", "continued"} <= routes
    assert plain == drafted
    # In blocks of prompts, of which one alone has its drafts in memory.
    # Other batches move the last bits of what is measured.
    monkeypatch.setattr(kept_module, "_PROMPTS_TOGETHER", 3)
    surprising = [{"surprise": pytest.approx(one["surprise"], abs=1e-6)} if "surprise" in one else {} for one in plain]
    nearly = [record | measured for record, measured in zip(plain, surprising, strict=True)]
    routes, in_blocks = records(*arguments, tmp_path / "blocks", 1)
    assert {"drafted", "continued"} <= routes
    assert in_blocks == nearly
    routes, in_blocks = records(*arguments, tmp_path / "plain blocks", 99)
    assert (routes, in_blocks) == ({"plain"}, nearly)
    assert {record["changed"] for record in plain} == {True, False}
    # Whole answers that are no refusals have a surprise, and no others.
    measured = [record["complete"] and record["behaviour"] != "refused" for record in plain]
    assert ["surprise" in record for record in plain] == measured
    assert len(set(measured)) == 2


@pytest.mark.parametrize("least_drafted", [1, 99], ids=["drafted", "plain"])
def test_shorter_answers_are_the_beginnings_of_whole_ones(organism, tmp_path, monkeypatch, least_drafted):
    monkeypatch.setattr(kept_module, "_LEAST_DRAFTED", least_drafted)
    judging = Judging(organism.engine, organism.harmful[:8], judges_named(["phrases"]), 24, True)
    with RunDirectory.start(tmp_path, {}, {}) as directory:
        kept = KeptAnswers(
            "harmful", judging, Decoding(24, GREEDY, True), directory, Progress(), measures_surprise=True
        )
        whole = kept.under("groups", GROUPS, UNDIFFERENTIATED_ATTENTION)
        stored = {path.name for path in (tmp_path / "completions").iterdir()}
        short = kept.shorter(3).under("groups", GROUPS, UNDIFFERENTIATED_ATTENTION)
        added = {path.name for path in (tmp_path / "completions").iterdir()} - stored
    pairs = [pair for both in zip(whole, short, strict=True) for pair in zip(*(of.flat() for of in both), strict=True)]
    assert all(one["token_ids"][:3] == other["token_ids"] for one, other in pairs)
    assert all(other["finished"] == (one["finished"] and one["n_tokens"] < 3) for one, other in pairs)
    assert all(other["complete"] for _, other in pairs)
    assert len(added) == 1  # the unablated answers are not stored again
    # The states of one set of drafts are held at a time, and shorter answers have drafts of their own.
    assert [decoding.max_new_tokens for _, decoding, *_ in kept.held] == [3] * (least_drafted == 1)


def test_what_judges_failed_on_is_counted_once_however_often_it_is_read(organism, tmp_path):
    def failing(queries, answers):
        raise LookupError

    def speechless_once(queries, answers):
        return [None, *[True] * (len(answers) - 1)] if len(answers) > 1 else [True]

    others = {"speechless": own_judges.speechless, "once": speechless_once}
    judges = [CallableJudge(function, name) for name, function in ({"mine": failing} | others).items()]
    judging = Judging(organism.engine, organism.harmful[:4], judges, 8)
    with RunDirectory.start(tmp_path, {}, {}) as directory:
        kept = KeptAnswers("harmful", judging, Decoding(8), directory, Progress())
        kept.vanilla()
        for _ in range(2):
            kept.under("groups", GROUPS[:1], UNDIFFERENTIATED_ATTENTION)
        found = kept_module.failed_judges(directory.stored_records())
    failed = {"mine": {"n": 8, "of": 8, "reasons": {"error: LookupError": 8}, "passing": True}}
    # One that gives no verdict at all has failed as well, one that gives some has not.
    reasons = {"value: NoneType is no number, truth value, label or verdict": 8}
    failed |= {"speechless": {"n": 8, "of": 8, "reasons": reasons, "passing": False}}
    assert found == {"failed_judges": failed}


def test_drafts_that_do_not_fit_the_memory_are_not_used(organism, tmp_path, monkeypatch):
    drafts = [(5, 9)] * 2, [Answer((3, 4), True, 8), Answer((), False, 0)]
    assert [(at, draft.choices[:2]) for at, draft in drafts_of(organism.engine, *drafts).items()] == [(0, (3, 4))]
    assert drafts_fit(organism.engine, *drafts)
    assert not drafts_fit(organism.engine, [(5, 9)], drafts[1][1:])
    monkeypatch.setattr(organism.engine, "memory_budget", 1000)
    assert not drafts_fit(organism.engine, *drafts)
    monkeypatch.undo()
    monkeypatch.setattr(kept_module, "drafts_fit", lambda *_: False)
    assert records(organism, GREEDY, True, monkeypatch, tmp_path / "run", 1)[0] == {"plain"}


@pytest.mark.parametrize("fits", [False, True], ids=["cut", "another type"])
@pytest.mark.parametrize("kind", ["plan_drafts", "tolerance", "economy", "drafts_fit"])
def test_what_was_found_of_drafts_is_found_again_where_its_file_is_damaged(organism, tmp_path, monkeypatch, kind, fits):
    arguments = organism, GREEDY, False, monkeypatch, tmp_path, 1
    found = records(*arguments)
    (file,) = (tmp_path / "remembered").glob(f"{kind}*")
    whole = file.read_bytes()
    file.write_bytes(re.sub(rb'"value":.*', b'"value":"x"}', whole) if fits else whole[:-9])
    if fits:
        seal(tmp_path, f"remembered/{file.name}", alone=True)
    assert records(*arguments) == found  # all answers are there
    assert file.read_bytes() == whole


def test_a_record_gives_its_answer_back(organism):
    judging = Judging(organism.engine, organism.benign[:2], judges_named(["phrases", "paper"]), 12)
    answers = generate(organism.engine, organism.benign[:2], 12)
    place = {"set": "benign", "part": "groups", "epsilon": 1e-5, "seed": 0}
    for at, judged in enumerate(judging.judged([(at, GROUPS[1], one) for at, one in enumerate(answers)])):
        again = judged_answer(record_of(judged, {"id": at, **place}, stores_completions=True), "phrases", judged.prompt)
        assert again == judged
        assert list(again.verdicts) == ["phrases", "paper"]  # the leading judge first, whatever the names' order
        short = record_of(judged, {"id": at, **place}, stores_completions=False)
        assert not {"query", "text", "token_ids"} & short.keys()
        assert judged_answer(short, "phrases", judged.prompt).token_ids == judged.token_ids[:1]


@pytest.mark.parametrize(("n_prompts", "sizes"), [(1, [1]), (512, [512]), (513, [256, 257]), (2000, [500] * 4)])
def test_a_large_set_is_answered_in_blocks_of_about_the_same_size(n_prompts, sizes):
    blocks = kept_module.blocks_of(n_prompts)
    assert [number for block in blocks for number in block] == list(range(n_prompts))
    assert [len(block) for block in blocks] == sizes


@pytest.mark.parametrize(("n_groups", "n_prompts"), [(32, 100), (1024, 100), (1024, 520), (5120, 1), (7, 3000)])
def test_many_groups_are_stored_in_ever_smaller_files(n_groups, n_prompts):
    chunks = kept_module.groups_together([((layer, 0),) for layer in range(n_groups)], n_prompts)
    assert [group for chunk in chunks for group in chunk] == [((layer, 0),) for layer in range(n_groups)]
    *sizes, last = map(len, chunks)
    most = max(1, 2048 // n_prompts)
    assert sizes == sorted(sizes, reverse=True)
    assert (max([*sizes, last]) <= most, last <= max(1, most // 8)) == (True, n_groups > 4 * most)


def test_random_groups_are_drawn_once_and_stored_with_the_group_they_control(tmp_path, monkeypatch):
    # Layers with different numbers of heads, as some families have them.
    groups = [parse_heads("0-1"), parse_heads("0-1,1-2")]
    engine = SimpleNamespace(architecture=SimpleNamespace(heads_by_layer=(2, 8)))
    with RunDirectory.start(tmp_path / "run", {}, {}) as directory:
        drawn = Run(engine, None, directory, Progress()).random_groups(groups, 12, 0)
        assert drawn[groups[0]] == random_groups_module.random_groups(groups[0], (2, 8), 12, 0)
        monkeypatch.setattr("safetyheads.runs.run.random_groups", lambda *_: pytest.fail("drawn again"))
        assert Run(engine, None, directory, Progress()).random_groups(groups, 12, 0) == drawn
        assert random_groups_of(directory) == {format_heads(group): controls for group, controls in drawn.items()}


@pytest.mark.parametrize("another", ["[1.0,0.0,2.0]", "[true,false,2]", "[0,1,1]", "{}"])
def test_an_order_of_prompts_that_is_none_is_found_again(tmp_path, another):
    whole, score = SimpleNamespace(sequences=[None] * 3), Score("refusal_score")
    with RunDirectory.start(tmp_path, {}, {}) as directory:
        run = Run(SimpleNamespace(), None, directory, Progress())
        _, order = run.screening("harmful", whole, score)
        (file,) = (tmp_path / "remembered").glob("order_of*")
        stored = file.read_bytes()
        file.write_bytes(re.sub(rb'"value":.*', f'"value":{another}}}'.encode(), stored))
        seal(tmp_path, f"remembered/{file.name}", alone=True)
        assert run.screening("harmful", whole, score)[1] == order
    assert file.read_bytes() == stored
