"""What experiments do alike: sets of heads answered once, what leaves nothing to measure, and what a kill costs."""

import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain

import pytest
from experiment_runs import SMALL, engine_of, run_of
from run_samples import OneProcess
from test_shards import bytes_of

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.answers.decoding import GREEDY, Answer, Sampling
from safetyheads.baselines import METHODS
from safetyheads.errors import ElsewhereError, InputError, UnsupportedModelError
from safetyheads.experiments import baselines_compared
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.experiments.lab import Lab, Subject, quoted
from safetyheads.heads import Head
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.shards import Shard, owners
from safetyheads.runs.stored_files import content_key

FIRST, SECOND, THIRD = Head(0, 1), Head(1, 0), Head(1, 2)
LLAMA, VICUNA = "meta-llama/Llama-2-7b-chat-hf", "models/vicuna-7b-v1.5/"


class Keys(OneProcess):
    """A run directory that computes nothing and has the key of each thing that it was asked for."""

    def __init__(self):
        self.keys = []

    def remember(self, _, value, *__):
        return value

    def remembered(self, _=""):
        return {}

    def recalled(self, *_):
        return None

    def records(self, stage, fields, *_, **__):
        self.keys.append(content_key(fields))
        if stage.startswith("drafts-"):
            return [asdict(Answer((), True, 1))] * len(fields["prompts"])
        return [{}] if "groups" in fields else []  # the cost of a chunk comes first


PLAIN = {"model": "demo:aligned_a", "dataset": "damage", "heads": (FIRST,), "ablation": UNDIFFERENTIATED_ATTENTION}
CHANGES = [
    {},
    *({"model": "demo:aligned_b"}, {"dataset": "theft"}, {"reference": "Another right answer."}),
    *({"heads": (SECOND,)}, {"heads": (FIRST, SECOND)}),
    *({"ablation": SCALING_CONTRIBUTION}, {"ablation": UNDIFFERENTIATED_ATTENTION.at(0.5)}),
    *({"sampling": Sampling(5)}, {"sampling": Sampling(5, seed=1)}),
    *({"max_new_tokens": 41}, {"judges": ("released",)}, {"judges": ("paper", "released")}),
    # These need whole answers, so where answers may end tells nothing of them.
    *({"judges": (f"python:own_judges:{name}",)} for name in ("seen_answers", "says_yes")),
]


def refused(material, strengths):
    raise UnsupportedModelError("no place for it")


def key_of(model, dataset, heads, ablation, sampling=GREEDY, reference=None, donor=None, **settings):
    directory = Keys()
    lab = Lab(replace(SMALL, **settings), directory, Progress(), engine_of)
    subject = lab.subject(model, dataset)
    if reference:
        prompts = tuple(replace(prompt, reference=reference) for prompt in subject.prompts)
        subject = Subject(lab, model, dataset, replace(subject.prompts, prompts=prompts))
    if donor:
        subject.swapped(donor)
    else:
        subject.by_group([heads], ablation, sampling)
    return directory.keys[-1]


def test_whatever_changes_an_answer_or_its_verdict_changes_its_key():
    keys = [key_of(**{**PLAIN, **changed}) for changed in CHANGES]
    # With the attention of another model, greedy and without ablation.
    unswapped = ("heads", "ablation", "sampling")
    changes = [{"donor": "demo:base", **changed} for changed in CHANGES if not set(changed) & set(unswapped)]
    keys += [key_of(**{**PLAIN, **changed}) for changed in (*changes, {"donor": "demo:aligned_single"})]
    assert len(set(keys)) == len(keys)
    assert key_of(**PLAIN) == keys[0]


def test_each_set_of_heads_is_answered_once_whatever_its_order():
    directory = Keys()
    subject = Lab(SMALL, directory, Progress(), engine_of).subject("demo:aligned_a", "theft")
    answered = subject.by_group([(SECOND, FIRST), (FIRST, SECOND), (THIRD,)], UNDIFFERENTIATED_ATTENTION)
    assert list(answered) == [(SECOND, FIRST), (FIRST, SECOND), (THIRD,)]
    assert answered[SECOND, FIRST] is answered[FIRST, SECOND]
    assert answered[FIRST, SECOND].group == "0-1,1-0"
    assert len(directory.keys) == 1
    assert subject.by_group([], UNDIFFERENTIATED_ATTENTION) == {}


def test_a_model_that_does_not_refuse_has_reasons_and_no_numbers(tmp_path):
    models = {"models": ("demo:base",), "templated": ("demo:base_wrapped",), "related": None}
    config = replace(SMALL, limit=2, datasets=("damage",), **models)
    # The study measures such a model too, as a null.
    names = [name for name in EXPERIMENTS if name not in ("table5", "fig6a", "fig15", "study")]
    for name, outcome in run_of(config, names, tmp_path / "run").items():
        assert any("hardly refuses" in reason for reason in outcome["not_meaningful"]), name
        assert outcome["tables"] == outcome["figures"] == outcome["headline"] == [], name
        assert not any("Not evidence" in note for note in outcome["notes"]), name


def test_a_kill_before_the_outcomes_loses_no_measurement(outcome_of, shared_run, tmp_path, monkeypatch):
    names = ("fig4a", "table3", "fig13", "fig2", "fig6a")
    before = {name: outcome_of(name) for name in names}
    shutil.copytree(
        shared_run, tmp_path / "again", ignore=shutil.ignore_patterns("outcome-*", ".lock", "stages", "results.json")
    )

    def measured(*_):
        pytest.fail("measured again")

    for place in (
        "answers.drafts.VerifiedDrafts.answers",
        "runs.kept_answers.answer",
        "runs.kept_answers.unablated_answers",
        "measures.head_pass.HeadPass._read",
    ):
        monkeypatch.setattr(f"safetyheads.{place}", measured)
    assert run_of(SMALL, names, tmp_path / "again") == before


def test_shards_of_one_directory_write_the_bytes_of_one_process(tmp_path, monkeypatch):
    few = {name: METHODS[name] for name in ("wanda", "rdsha")}
    few["rdsha"] = replace(few["rdsha"], learn=refused)  # what is not applicable is not asked again by each
    monkeypatch.setattr(baselines_compared, "METHODS", few)
    config, names = replace(SMALL, limit=3, datasets=("damage",), size=1), ("table1", "fig13")
    before = run_of(config, names, tmp_path / "one")
    ended = 0
    for number in range(12):
        with suppress(ElsewhereError):
            assert run_of(config, names, tmp_path / "many", shard=Shard(1 + number % 2, 2)) == before
            ended += 1
        if ended == 2:
            break
    assert ended == 2
    one, many = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "many")
    assert sorted(one) == sorted(many)
    assert [place for place in one if one[place] != many[place]] == []
    owned = [owners(units, 2) for _, units in RunDirectory.look(tmp_path / "many").planned()]
    assert min(Counter(chain.from_iterable(of.values() for of in owned)).values()) > 10


def test_what_is_damaged_or_lost_is_computed_again_whichever_experiment_it_is_of(tmp_path):
    config = replace(SMALL, limit=3)
    run_of(config, ["fig8", "table2"], tmp_path)
    parts = [path for folder in ("completions", "shards") for path in (tmp_path / folder).rglob("[!.]*.*")]
    before = {path: path.read_bytes() for path in (*parts, tmp_path / "results.json")}
    for number, path in enumerate(parts):
        path.unlink() if number % 2 else path.write_bytes(b"{}")
    with pytest.raises(InputError, match=r"is damaged.*; start it once without --shard"):
        run_of(config, ["table2"], tmp_path, shard=Shard(1, 2))
    run_of(config, ["table2"], tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def test_quoted_numbers_are_the_papers_and_of_its_models_datasets_and_methods_alone():
    # Table 3's own mean column, to its rounding.
    for mean, *keys in (
        (0.68, LLAMA, "changes", "dataset", "UA", "maliciousinstruct"),
        (0.30, LLAMA, "changes", "query", "SC", "jailbreakbench"),
        (0.33, VICUNA, "changes", "dataset", "UA", "jailbreakbench"),
        (0.15, VICUNA, "changes", "query", "SC", "maliciousinstruct"),
    ):
        assert sum(quoted(*keys)) / 5 == pytest.approx(mean, abs=0.0051)
    for name, numbers in quoted(LLAMA, "table7").items():
        assert quoted(LLAMA, "table7", f"data/{name.upper()}.jsonl") == numbers
    assert set(quoted(LLAMA, "table1")) <= set(METHODS)
    for others in ("meta-llama/Llama-2-13b-chat-hf", "demo:aligned_a"):
        assert quoted(others, "changes", "query") is None
    assert quoted(LLAMA, "table7", "own", "UA") is None
    assert quoted(VICUNA, "table7") is None
