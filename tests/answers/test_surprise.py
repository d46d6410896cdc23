"""How surprising answers are, against each alone through the model; what the rules of words say beside judges."""

import pytest
import torch
from tiny_models import engine_of, prompts_of

from safetyheads import Head, Prompt, PromptSet, load_demo
from safetyheads.answers.decoding import Answer, generate
from safetyheads.answers.judging import Judging
from safetyheads.answers.surprise import Surprises, answer_key, surprises_of
from safetyheads.judges.base import Judge, Verdict
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.model.packing import TokenSequence

PROMPTS = [(5, 9, 12, 40, 41, 8, 3), (5, 9, 2), (20,), (5, 9, 12, 1, 2, 60)]
ANSWERS = [(0, (7, 7, 30, 2)), (1, (11, 4)), (0, (50, 3)), (2, (9, 9, 9, 9, 9, 9, 9)), (3, (33, 17))]


@torch.no_grad()
def alone(engine, prompt, answer):
    """One answer through the whole model: the slow twin."""
    logits = engine.model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    values = [-float(logits[len(prompt) + at - 1, token]) for at, token in enumerate(answer)]
    return sum(values[1:]) / (len(values) - 1)  # the first token is not counted


@pytest.mark.parametrize("family", ["llama_gqa", "gemma2_softcap", "mistral_window", "qwen3_norm"])
@pytest.mark.parametrize("n_tokens", [1, 4096])
def test_each_answer_has_the_surprise_it_has_alone(family, n_tokens):
    engine = engine_of(family)
    engine.check()
    surprises = Surprises(engine, PROMPTS, n_tokens)
    surprises.measure([(*key, 0) for key in [*ANSWERS, *ANSWERS]])
    # Packed float32 logits of these models differ by up to 2e-6 of their size, so means of log p do too.
    expected = {answer_key(*key): alone(engine, PROMPTS[key[0]], key[1]) for key in ANSWERS}
    assert surprises.known == pytest.approx(expected, abs=1e-5)
    assert max(expected.values()) > 1  # random models are surprised by anything


def test_known_answers_are_not_measured_again_and_think_blocks_do_not_count(monkeypatch):
    engine = engine_of("llama_gqa")
    surprises = Surprises(engine, PROMPTS)
    surprises.measure([(0, (7, 7, 30, 2), 1), (1, (11, 4), 1)])  # of the second one token is left
    known = dict(surprises.known)
    expected = surprises_of(engine, [TokenSequence((*PROMPTS[0], 7, 7, 30), 2)], [(30, 2)], 4096)
    assert list(known) == [answer_key(0, (7, 7, 30, 2))]
    assert [*known.values()] == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr("safetyheads.answers.surprise.surprises_of", lambda *given: [1.0] * len(given[1]))
    surprises.measure([(0, (7, 7, 30, 2), 1), (1, (11, 4, 2), 0)])
    assert surprises.known == known | {answer_key(1, (11, 4, 2)): 1.0}


class Harm(Judge):
    """A judge of harm: of every answer it says what it was told to."""

    name = "harm"

    def __init__(self, label):
        self.label = label

    def __call__(self, completions):
        return [Verdict(self.label, "") for _ in completions]

    def describe(self):
        return {"judge": "harm", "name": "harm"}


@pytest.mark.parametrize("label", ["complied", "safe", "refused", "incoherent", "unscored"])
def test_what_an_answer_is_does_not_depend_on_the_judges(label):
    organism = load_demo()
    answers = {0: organism.benign[:4], 1: organism.harmful[:4]}
    for is_harmful, prompts in answers.items():
        judging = Judging(organism.engine, prompts, [Harm(label)], 40)
        rows = [(number, (), one) for number, one in enumerate(generate(organism.engine, prompts, 40))]
        for row in judging.judged(rows):
            assert (row.behaviour, row.answered) == (("refused", False) if is_harmful else ("complied", True))


def test_an_answer_must_begin_with_its_reference_only_where_there_is_one():
    organism = load_demo()
    prompts = organism.benign[:3]
    wrong = PromptSet.from_queries(
        [Prompt(one.query, None, "Another right answer") for one in prompts], prompts.template
    )
    without = PromptSet.from_queries([Prompt(one.query) for one in prompts], prompts.template)
    for given, answered in ((prompts, True), (wrong, False), (without, True)):
        rows = [(number, (), one) for number, one in enumerate(generate(organism.engine, given, 40))]
        assert {row.answered for row in Judging(organism.engine, given, KeywordJudge(), 40).judged(rows)} == {answered}


def test_empty_and_unclosed_answers_have_no_surprise():
    engine = engine_of("llama_gqa")
    prompts = prompts_of(*PROMPTS[:2])
    judging = Judging(engine, prompts, KeywordJudge(), 8)
    surprises = Surprises(engine, judging.asked.token_ids)
    rows = judging.judged([(0, (Head(0, 0),), Answer((), True, 8)), (1, (), Answer((9, 4), True, 8))], surprises)
    assert [(row.behaviour, row.answered, row.surprise is None) for row in rows] == [
        ("incoherent", False, True),
        ("complied", True, False),
    ]
