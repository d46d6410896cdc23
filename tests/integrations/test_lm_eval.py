"""lm-eval's likelihood calls (padded on the right, without a mask) on each way of attending, against the slow twin."""

import pytest
import torch
from families import oracle_of, proved
from lm_eval.api.instance import Instance

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, parse_heads
from safetyheads.integrations.lm_eval import ablated_lm, chat_of, harness_model
from safetyheads.runs.config import TaskOptions

GROUP = parse_heads("0-1,1-0,1-3,2-2")
# Sums of a few float32 log-probabilities, from attention written out as loops.
TOLERANCE = 1e-4
# Contexts of uneven lengths, on both sides of the windows, with two continuations each.
CONTEXTS = ("w5 w9 w12 w40 w41 w8 w3 w17 w22", "w30 w2 w11", "w20", "w5 w9 w12 w1 w2 w60")
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in (" w7 w33 w50", " w19")]
FAMILIES = ("llama2", "mistral", "gemma2", "gpt_oss", "llama4")


def requests():
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]


def by_hand(name, group, ablation):
    oracle, sums = oracle_of(name), []
    for context, continuation in PAIRS:
        ids = [int(word[1:]) for word in (context + continuation).split()]
        total = 0.0
        for at in range(len(context.split()), len(ids)):
            seen = oracle.run(ids[:at], group, ablation)
            total += torch.log_softmax(seen.logits.double(), -1)[ids[at]].item()
        sums.append(total)
    return sums


@pytest.mark.parametrize(
    ("name", "group", "ablation"),
    [
        *((name, GROUP, UNDIFFERENTIATED_ATTENTION) for name in FAMILIES),
        ("llama2", GROUP, SCALING_CONTRIBUTION),
        ("llama2", (), SCALING_CONTRIBUTION),
    ],
)
def test_likelihoods_equal_the_oracles_at_any_batch_size(name, group, ablation):
    expected = pytest.approx(by_hand(name, group, ablation), abs=TOLERANCE)
    for batch_size in (1, 8):
        with ablated_lm(proved(name), group, ablation, batch_size) as lm:
            assert [likelihood for likelihood, _ in lm.loglikelihood(requests(), disable_tqdm=True)] == expected
            assert lm.n_truncated == 0


def test_requests_longer_than_the_context_are_counted_and_the_engines_tokenizer_gets_no_padding_token():
    engine = proved("llama2")
    before = engine.tokenizer.pad_token
    lm = harness_model(engine, 8)
    assert lm.tokenizer.pad_token is not None
    assert engine.tokenizer.pad_token == before
    assert lm.max_length == 128
    long = " ".join(["w5"] * 140)
    lm.loglikelihood([*requests(), Instance("loglikelihood", {}, (long, " w7"), 99)], disable_tqdm=True)
    assert lm.n_truncated == 1
    # Of 128 tokens 120 are left beside an answer of 8 tokens: the last two contexts do not fit.
    asked = [(" ".join(["w5"] * n), {"until": [], "max_gen_toks": 8}) for n in (3, 119, 121, 125)]
    generated = [Instance("generate_until", {}, pair, number) for number, pair in enumerate(asked)]
    lm.generate_until(generated, disable_tqdm=True)
    assert lm.n_truncated == 1 + 2


@pytest.mark.parametrize(
    ("options", "described", "expected"),
    [
        ({"template": "chat"}, False, "<|user|>hi<|assistant|>"),
        ({"template": "chat"}, True, "<|user|>Task.\n\nhi<|assistant|>"),  # the task's own, folded with a warning
        ({"system": "Be kind.", "fold_system": True}, False, "<|user|>Be kind.\n\nhi<|assistant|>"),
        ({"system": "Be kind.", "fold_system": True}, True, "<|user|>Be kind.\n\nTask.\n\nhi<|assistant|>"),
    ],
)
def test_tasks_stand_under_the_chat_template_as_in_every_other_command(engine, options, described, expected):
    model = harness_model(engine, 1, chat_of(engine, TaskOptions(**options)))
    system = [{"role": "system", "content": "Task."}] * described
    assert model.apply_chat_template([*system, {"role": "user", "content": "hi"}]) == expected
    assert model.folds_system is (described and "system" not in options)
