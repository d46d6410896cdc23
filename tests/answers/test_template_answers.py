"""Think blocks and stop texts in scans and plain answers: early ends change no verdict, and no judge sees a thought.

The models are random, so their words are renamed: a frequent one ends thinking, another is a stop text, and some are
sentences that refuse, so that the rules of words are final too.
"""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from own_judges import Recording
from tiny_models import END, VOCABULARY, model_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safetyheads import UNDIFFERENTIATED_ATTENTION, KeywordJudge, PromptSet, Template
from safetyheads.answers.decoding import GREEDY, TOP_5, Decoding, generate
from safetyheads.answers.judging import answers_under
from safetyheads.answers.success import attack_success_rate, scan_attack_success_rate
from safetyheads.judges.base import NOT_CLOSED
from safetyheads.judges.keywords import KeywordRules
from safetyheads.judges.named import JUDGES
from safetyheads.measures.scorers import openers_of
from safetyheads.model.engine import Engine
from safetyheads.model.loading import use_our_attention
from safetyheads.runs.config import Progress, ScanConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.exhaustive_scan import run_scan
from safetyheads.runs.rejudge import rejudge

torch.set_num_threads(1)

N_TOKENS = 16
PROMPTS = ((5, 9, 12, 40, 41, 8, 3), (30, 2, 11), (5, 9, 12, 40, 7, 19), (7, 7), (20,), (5, 9, 12, 1, 2, 60))
SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, TOP_5], ids=lambda one: one.name)


def tokenizer(renamed):
    """Words that are their ids, but for some that are called otherwise."""
    words = {renamed.get(number, f"w{number}"): number for number in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token=renamed.get(0, "w0")))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=renamed.get(0, "w0"), eos_token=f"w{END}")


@cache
def answered_words(sampling):
    """Words of the plain answers and words that these begin with, most frequent first."""
    engine, prompts = ready({}, Template.parse("direct"))
    made = [generate(engine, prompts, N_TOKENS, [(head,)] * len(prompts), sampling=sampling) for head in engine.heads]
    answers = [one.token_ids for row in made for one in row]
    counts = (Counter(sum(answers, ())), Counter(one[0] for one in answers))
    return tuple([token for token, _ in count.most_common()] for count in counts)


@cache
def _proved():
    model = model_of("llama_gqa")
    use_our_attention(model)
    engine = Engine(model, tokenizer({}), name="llama_gqa")
    engine.check()
    return engine


def ready(renamed, template):
    """An engine with these words, and the prompts under the template."""
    proved = _proved()
    engine = Engine(proved.model, tokenizer(renamed), name="llama_gqa", capabilities=proved.capabilities)
    queries = [" ".join(renamed.get(token, f"w{token}") for token in ids) for ids in PROMPTS]
    return engine, PromptSet.from_queries(queries, template)


REFUSALS = ("off-limits.", "off-limits!", "off-limits?")
"""Words that are a refusing sentence each."""
CASES = {
    # Rank of a frequent word -> what it is called, the template's text, whether it thinks, and its stop texts.
    "a block that the prompt begins": ({1: "</think>"}, "{query} <think>", True, ()),
    "a block that the model may begin": ({"last": "</think>", "first": "<think>"}, "{query}", True, ()),
    "a stop text": ({2: "# Query:"}, "{query}", False, ("# Query:",)),
    "a stop text of two words": ({2: "# Query:"}, "{query}", False, ("# Query: w{3}",)),
    "a block and a stop text": ({1: "</think>", 2: "# Query:"}, "{query} <think>", True, ("# Query:",)),
}


def case(name, sampling=GREEDY):
    """Words renamed, the template and the judge."""
    frequent, firsts = answered_words(sampling)
    renames, text, thinks, stops = CASES[name]
    ranks = {**dict(enumerate(frequent)), "first": firsts[0]}
    ranks["last"] = next(token for token in frequent if token != firsts[0])
    renamed = {frequent[4 + number]: word for number, word in enumerate(REFUSALS)}
    renamed |= {ranks[rank]: word for rank, word in renames.items()}
    if "<think>" in text:
        renamed[VOCABULARY - 2] = "<think>"
    template = Template.parse(text, thinking="open") if thinks else Template.parse("direct")
    template = replace(template, stops=tuple(stop.replace("{3}", str(frequent[3])) for stop in stops))
    words = ("off-limits", *(f"w{token}" for token in frequent[4 + len(REFUSALS) : 10]))
    return renamed, template, KeywordJudge("words", KeywordRules(words, short_characters=0))


@pytest.mark.parametrize("name", CASES)
@SAMPLINGS
def test_rows_that_end_early_have_the_verdicts_of_plain_answers(name, sampling):
    renamed, template, judge = case(name, sampling)
    engine, prompts = ready(renamed, template)
    groups = [(head,) for head in engine.heads]
    columns = [[group] * len(prompts) for group in groups]
    asked = (engine, prompts, UNDIFFERENTIATED_ATTENTION, judge)
    scans = {full: scan_attack_success_rate(*asked, Decoding(N_TOKENS, sampling, full)) for full in (False, True)}
    plain = answers_under(engine, prompts, columns, *asked[2:], Decoding(N_TOKENS, sampling, True))
    routes = Counter()
    for full, scan in scans.items():
        for rows, plain_rows in zip(scan.rows, plain, strict=True):
            for row, whole in zip(rows, plain_rows, strict=True):
                assert (row.verdict, row.behaviour) == (whole.verdict, whole.behaviour)
                assert row.answered == whole.answered
                assert whole.text.startswith(row.text)
                assert row.token_ids == whole.token_ids[: len(row.token_ids)]
                assert row.complete or not full
                if row.complete:
                    assert (row.text, row.finished) == (whole.text, whole.finished)
                routes[row.route] += 1
                assert all(stop not in row.text for stop in template.stops)
    assert min(routes.values()) > 0
    assert len(routes) >= 2
    flat = [row for rows in scans[True].rows for row in rows]
    labels = Counter(row.verdict == NOT_CLOSED for row in flat)
    if template.thinking == "open":
        # The case is worth something only where blocks close and where they do not.
        assert labels[True]
        assert labels[False]
        assert all(row.text == "" for row in flat if row.verdict == NOT_CLOSED)
        assert any(not row.complete for rows in scans[False].rows for row in rows)
    if template.stops:
        stopped = [row for row in flat if engine.ask(prompts).reader.read(row.token_ids).stopped]
        assert stopped
        assert all(row.finished and row.complete for row in stopped)


def test_no_judge_sees_a_thought_and_no_thought_opens_a_refusal():
    renamed, template, judge = case("a block that the prompt begins")
    (engine, prompts), seeing = ready(renamed, template), Recording(judge)
    scan = scan_attack_success_rate(engine, prompts, UNDIFFERENTIATED_ATTENTION, seeing, Decoding(N_TOKENS))
    closed = [row for rows in scan.rows for row in rows if row.verdict != NOT_CLOSED]
    assert {row.text for row in closed} <= {completion.text for completion in seeing.given}
    assert not any(completion.unclosed for completion in seeing.given)
    for row in closed:
        tokens = list(row.token_ids)
        first = tokens.index(next(token for token, word in renamed.items() if word == "</think>"))
        judged = engine.ask(prompts).reader.read(row.token_ids)
        assert judged.token_ids == tuple(tokens[first + 1 :])
    rows = attack_success_rate(engine, prompts, engine.heads[:1], UNDIFFERENTIATED_ATTENTION, judge, N_TOKENS).rows
    assert all(row.thinks for row in rows)
    refused = [replace(row, verdicts={"words": replace(row.verdict, label="refused")}) for row in rows]
    assert openers_of(engine, refused) == ()
    assert openers_of(engine, [replace(row, thinks=False) for row in refused])


def test_a_run_keeps_thoughts_apart_from_what_judges_get(monkeypatch, tmp_path):
    renamed, template, judge = case("a block that the prompt begins")
    engine, prompts = ready(renamed, template)
    monkeypatch.setitem(JUDGES, "words", lambda: judge)
    (tmp_path / "asked.txt").write_text("\n".join(prompts.queries))
    ways = {"template": "{query} <think>", "thinking": "open", "max_new_tokens": N_TOKENS, "judges": ("words",)}
    config = ScanConfig("tiny", str(tmp_path / "asked.txt"), "none", scores=False, **ways)
    run_scan(engine, config, tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    rows = [row for row in directory.stored_records() if "verdicts" in row]
    assert any(row.get("unclosed") for row in rows)
    assert any(row.get("thought") and not row.get("unclosed") for row in rows)
    assert all(row["thinks"] for row in rows)
    assert directory.config["thinking"] == "open"
    patient = Recording(judge, decides_early=False)
    found = rejudge(tmp_path / "run", patient, Progress(), {})
    groups = [(), *((head,) for head in engine.heads)]
    columns = [[group] * len(prompts) for group in groups]
    plain = answers_under(engine, prompts, columns, UNDIFFERENTIATED_ATTENTION, judge, Decoding(N_TOKENS, GREEDY, True))
    whole = {row.text for rows in plain for row in rows if row.verdict != NOT_CLOSED}
    # By distinct answer; a rate with a cut answer has no verdict at all.
    heard = RunDirectory.open(tmp_path / "run").stored_records("verdicts-*")
    assert NOT_CLOSED.reason in [row["verdict"]["reason"] for row in heard]
    # Cut answers are no answers to a judge that needs whole ones.
    assert {completion.text for completion in patient.given} < whole
    cut = {row["group"] for row in rows if not row["complete"]}
    assert found["n_unscored"] == sum(row["group"] in cut for row in rows) > 0
    (reason,) = found["unscored"]
    assert "--full-answers" in reason
