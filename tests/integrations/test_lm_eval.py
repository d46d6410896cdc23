"""lm-eval's likelihood calls (padded on the right, without a mask) on each way of attending, against the slow twin."""

import pytest
import torch
from families import oracle_of, proved
from lm_eval.api.instance import Instance

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, parse_heads
from safetyheads.integrations.lm_eval import ablated_lm, harness_model

GROUP = parse_heads("0-1,1-0,1-3,2-2")
# Sums of a few float32 log-probabilities, from attention written out as loops.
TOLERANCE = 1e-4
# Contexts of uneven lengths, on both sides of the windows, with two continuations each.
CONTEXTS = ("w5 w9 w12 w40 w41 w8 w3 w17 w22", "w30 w2 w11", "w20", "w5 w9 w12 w1 w2 w60")
CONTINUATIONS = (" w7 w33 w50", " w19")
FAMILIES = ("llama2", "mistral", "gemma2", "gpt_oss", "llama4")


def requests():
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def likelihoods(lm):
    return [likelihood for likelihood, _ in lm.loglikelihood(requests(), disable_tqdm=True)]


def by_hand(name, group, ablation):
    oracle, sums = oracle_of(name), []
    for context in CONTEXTS:
        for continuation in CONTINUATIONS:
            ids = [int(word[1:]) for word in (context + continuation).split()]
            total = 0.0
            for at in range(len(context.split()), len(ids)):
                seen = oracle.run(ids[:at], group, ablation)
                total += torch.log_softmax(seen.logits.double(), -1)[ids[at]].item()
            sums.append(total)
    return sums


@pytest.mark.parametrize("ablation", [UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION], ids=lambda one: one.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_ablated_likelihoods_equal_the_oracles_at_any_batch_size(name, ablation):
    expected = pytest.approx(by_hand(name, GROUP, ablation), abs=TOLERANCE)
    for batch_size in (1, 8):
        with ablated_lm(proved(name), GROUP, ablation, batch_size) as lm:
            assert likelihoods(lm) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_vanilla_likelihoods_equal_the_oracles(name):
    lm = harness_model(proved(name), 8)
    assert likelihoods(lm) == pytest.approx(by_hand(name, (), None), abs=TOLERANCE)
    assert lm.n_truncated == 0


def test_requests_longer_than_the_context_are_counted():
    lm = harness_model(proved("llama2"), 8)
    assert lm.max_length == 128
    long = " ".join(["w5"] * 140)
    lm.loglikelihood([*requests(), Instance("loglikelihood", {}, (long, " w7"), 99)], disable_tqdm=True)
    assert lm.n_truncated == 1
    # Of 128 tokens 120 are left beside an answer of 8 tokens: the last two contexts do not fit.
    asked = [(" ".join(["w5"] * n), {"until": [], "max_gen_toks": 8}) for n in (3, 119, 121, 125)]
    generated = [Instance("generate_until", {}, pair, number) for number, pair in enumerate(asked)]
    lm.generate_until(generated, disable_tqdm=True)
    assert lm.n_truncated == 1 + 2


def test_the_tokenizer_of_the_engine_gets_no_padding_token():
    engine = proved("llama2")
    before = engine.tokenizer.pad_token
    assert harness_model(engine, 8).tokenizer.pad_token is not None
    assert engine.tokenizer.pad_token == before
