"""How far a group moves the model from its own answers, against each answer alone through the ablated model."""

import numpy as np
import pytest
import torch
from tiny_models import engine_of

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, parse_heads
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.model.packing import TokenSequence

PROMPTS = [(5, 9, 12, 40, 41, 8, 3), (5, 9, 2), (20,), (5, 9, 12, 1, 2, 60)]
ANSWERS = [(7, 7, 30, 2), (11,), (9, 9, 9, 9, 9, 9), (33, 17)]
GROUPS = [parse_heads(text) for text in ("0-1", "0-1,2-2", "1-0,1-1,1-2", "2-3")]


@torch.no_grad()
def log_probabilities(model, prompt, answer):
    """Of each answer token's position [n_tokens, vocabulary], float64."""
    return model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def alone(engine, group, ablation, prompt, answer):
    """KL divergence and drop of the answer's log-probability, both averaged over its tokens: the slow twin."""
    before = log_probabilities(engine.model, prompt, answer)
    with engine.ablated(group, ablation) as model:
        after = log_probabilities(model, prompt, answer)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    rows = torch.arange(len(answer))
    return float(divergence), float((before - after)[rows, torch.tensor(answer)].mean())


@pytest.mark.parametrize("ablation", [UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION], ids=lambda one: one.name)
@pytest.mark.parametrize("family", ["llama_gqa", "gemma2_softcap"])
def test_each_answer_is_damaged_as_it_is_alone(family, ablation, monkeypatch):
    engine = engine_of(family)
    engine.check()
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    sequences = [TokenSequence(prompt + answer[:-1], len(answer)) for prompt, answer in pairs]
    readouts = Readouts(ships=True, targets=tuple(ANSWERS))
    expected = np.array([[alone(engine, group, ablation, *pair) for pair in pairs] for group in GROUPS])
    # Chunks of logits end within answers too.
    monkeypatch.setattr(type(engine), "logits_at_once", property(lambda self: 5 * 64))
    found = HeadPass(engine, sequences, ablation, readouts).measure(GROUPS)
    # Packed float32 logits of these models differ by up to 2e-6 of their size.
    assert np.allclose(found["ships"], expected[..., 0], atol=1e-5)
    assert np.allclose(found["log_probability_drop"], expected[..., 1], atol=1e-5)
    assert np.abs(expected).max() > 0.1
    nothing = HeadPass(engine, sequences, ablation, readouts).measure([()])
    assert np.allclose(nothing["log_probability_drop"], 0, atol=1e-6)


@pytest.mark.parametrize("n_rows", [1, 2, 7])
def test_how_many_logits_are_in_float64_together_changes_no_bit(n_rows, monkeypatch):
    engine = engine_of("llama_gqa")
    sequences = [
        TokenSequence(prompt + answer[:-1], len(answer)) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    readouts = Readouts(ships=True, openers=(3, 9, 11), targets=tuple(ANSWERS))

    def measured():
        return HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, readouts)

    whole = measured()
    monkeypatch.setattr("safetyheads.measures.head_pass.IN_FLOAT64", n_rows * engine.architecture.vocabulary_size)
    parts = measured()
    assert parts.least_sure_first == whole.least_sure_first
    expected = whole.measure(GROUPS)
    assert all(torch.equal(values, expected[name]) for name, values in parts.measure(GROUPS).items())
