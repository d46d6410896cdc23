"""A model so small that its scores are worked out with a pencil: one layer, two heads, two numbers a token, two words.

The words are a = (1, 1) and b = (1, -1). Both have RMS 1, so the first norm leaves them as they are. Let
d = (x1 - x2) / 2, which is 0 for a and 1 for b:

- head 0 has the query sqrt(2) ln 3 d, the key d and the value 4 d, and writes to x2;
- head 1 has no query (so it attends evenly), the value 2 d, and writes to x1;
- the MLP writes nothing; the logits are 0 for a and g (x1 - x2) for b, with g = ln 3 sqrt(10) / 2.

Prompt "a b", at its last token. Attention scores are query times key / sqrt(2), so head 0 has 0 on a and ln 3 on b: its
weights are 1/4 and 3/4 and its output is 3/4 * 4 = 3. Head 1 weighs both by 1/2: its output is 1/2 * 2 = 1. The state
is (1, -1) + (1, 3) = (2, 2). With one head ablated:

    UA of head 0: weights 1/2, output 2, state (2, 1)           SC of head 0: output 0, state (2, -1)
    UA of head 1: it attends evenly already, nothing changes    SC of head 1: output 0, state (1, 2)

Prompt "a a": all values are 0, so the state is (1, 1) whatever is ablated.

The final norm divides by the RMS: (2, 2) and (1, 1) become (1, 1); (2, 1), (2, -1) and (1, 2) have RMS sqrt(5/2) and
become (4, 2) / sqrt(10), (4, -2) / sqrt(10) and (2, 4) / sqrt(10). So the logit of b, g (x1 - x2), is 0 unablated, and
ln 3, 3 ln 3 and -ln 3 in these three cases: P(a) is 1/2, and 1/4, 1/28 and 3/4.
"""

from math import atan, degrees, exp, log, sqrt

import pytest
import torch
from tiny_models import prompts_of, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Engine,
    Head,
    Opener,
    generalized_ships,
    mean_ships,
    rank_heads,
    refusal_score,
    sahara,
    ships,
)
from safetyheads.model.loading import use_our_attention

A, B = 0, 1
PROMPTS = prompts_of((A, B), (A, A))
UA, SC = UNDIFFERENTIATED_ATTENTION.at(0.0), SCALING_CONTRIBUTION.at(0.0)
HEADS = ((Head(0, 0),), (Head(0, 1),))
# Rounding of float32: measured 1e-7 nats and 1e-5 degrees.
TOLERANCE = 5e-5


@pytest.fixture
def engine():
    config = LlamaConfig(
        vocab_size=2,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=2,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    layer, d = model.model.layers[0], torch.tensor([0.5, -0.5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)  # norms have the weight 1
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        # Rows 0 and 1 of the projections are head 0's two numbers, rows 2 and 3 head 1's; each head uses its first.
        layer.self_attn.q_proj.weight[0] = sqrt(2) * log(3) * d
        layer.self_attn.k_proj.weight[0] = d
        layer.self_attn.v_proj.weight[0] = 4 * d
        layer.self_attn.v_proj.weight[2] = 2 * d
        layer.self_attn.o_proj.weight[1, 0] = 1.0
        layer.self_attn.o_proj.weight[0, 2] = 1.0
        model.lm_head.weight[B] = log(3) * sqrt(10) / 2 * torch.tensor([1.0, -1.0])
    use_our_attention(model)
    return Engine(model, tokenizer())


def near(values):
    return pytest.approx(values, abs=TOLERANCE)


def test_ships(engine):
    # KL of (1/2, 1/2) from (p, 1 - p) is ln(1 / (4 p (1 - p))) / 2. For p = 1/4 or 3/4 that is ln(4/3) / 2, for
    # p = 1/28 it is ln(28 * 28 / (4 * 27)) / 2 = ln(196/27) / 2. The second prompt never changes.
    assert ships(engine, PROMPTS, UA).values.flatten().tolist() == near([log(4 / 3) / 2, 0, 0, 0])
    assert ships(engine, PROMPTS, SC).values.flatten().tolist() == near([log(196 / 27) / 2, log(4 / 3) / 2, 0, 0])
    # Over both prompts the mean is half of it.
    assert mean_ships(engine, PROMPTS, UA)(HEADS).tolist() == near([log(4 / 3) / 4, 0])


def test_refusal_score(engine):
    # R = {a}: its log-odds are minus the logit of b: 0 unablated. They drop by ln 3, by 3 ln 3 and by -ln 3.
    scorer = {ablation: refusal_score(engine, PROMPTS, ablation, [Opener(A, "a", 1)]) for ablation in (UA, SC)}
    assert scorer[UA](HEADS).tolist() == near([log(3) / 2, 0])
    assert scorer[SC](HEADS).tolist() == near([3 * log(3) / 2, -log(3) / 2])


def test_generalized_ships_in_prompt_space(engine):
    # A symmetric matrix [[p, q], [q, r]] has its first eigenvector at the angle t with tan 2t = 2 q / (p - r). Before
    # the norm M = [(2, 2), (1, 1)] and M M' = [[8, 4], [4, 2]]: tan 2t = 8/6, that is tan t = 1/2.
    unablated = atan(1 / 2)
    # UA of head 0: M = [(2, 1), (1, 1)], M M' = [[5, 3], [3, 2]], tan 2t = 6/3; SC of head 1, [(1, 2), (1, 1)], has the
    # same. SC of head 0: M = [(2, -1), (1, 1)], M M' = [[5, 1], [1, 2]], tan 2t = 2/3.
    scorer = {ablation: generalized_ships(engine, PROMPTS, ablation, state="before_norm") for ablation in (UA, SC)}
    assert scorer[UA](HEADS).tolist() == near([degrees(atan(2) / 2 - unablated), 0])
    assert scorer[SC](HEADS).tolist() == near([degrees(unablated - atan(2 / 3) / 2), degrees(atan(2) / 2 - unablated)])
    # After the norm both rows are equally long, M M' = [[2, q], [q, 2]]: the first eigenvector is (1, 1) for any q > 0.
    assert generalized_ships(engine, PROMPTS, SC)(HEADS).tolist() == near([0, 0])


def test_generalized_ships_in_representation_space(engine):
    # After the norm M = [(1, 1), (1, 1)]: its right singular vector is at 45 degrees. With (4, 2) / sqrt(10) as the
    # first row M' M = [[2.6, 1.8], [1.8, 1.4]] and tan 2t = 3.6 / 1.2 = 3; with (4, -2) / sqrt(10) it is
    # [[2.6, 0.2], [0.2, 1.4]] and tan 2t = 1/3; with (2, 4) / sqrt(10) the two axes change places.
    scorer = {ablation: generalized_ships(engine, PROMPTS, ablation, "representation") for ablation in (UA, SC)}
    assert scorer[UA](HEADS).tolist() == near([45 - degrees(atan(3) / 2), 0])
    assert scorer[SC](HEADS).tolist() == near([45 - degrees(atan(1 / 3) / 2), 45 - degrees(atan(3) / 2)])


def test_sahara(engine):
    # Head 0 is best alone under SC. Without both heads the state is (1, -1), of RMS 1, and the logit of b is 2 g.
    p = 1 / (1 + exp(sqrt(10) * log(3)))
    trace = sahara(mean_ships(engine, PROMPTS, SC), engine.heads, steps=2)
    assert trace.group == (Head(0, 0), Head(0, 1))
    assert trace.scores == near((log(196 / 27) / 4, log(1 / (4 * p * (1 - p))) / 4))
    assert rank_heads(mean_ships(engine, PROMPTS, UA), engine.heads).top(2) == (Head(0, 0), Head(0, 1))
