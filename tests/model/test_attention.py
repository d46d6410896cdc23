"""Weights as a witness: where an ablation can be folded into a copy of the weights exactly, the hook does the same.

The published code has two modes, activations and weights, and they differ. Here weights are edited in tests only: the
package has no function for it.
"""

import copy

import pytest
import torch
from families import built, proved
from family_twins import relative

from safetyheads import Ablation, Head
from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION

# The same sums with a factor in another place; measured: at most 1.3e-6 of the largest logit.
TOLERANCE = 1e-5
PROMPT = (5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2)
GROUPS = [(Head(1, 2),), (Head(0, 3), Head(1, 1), Head(2, 0)), (Head(0, 0), Head(0, 1))]
EPSILONS = [1e-5, 0.3]
"""The paper's, and one at which a factor that is forgotten somewhere shows."""


def folded(name, group, ablation, biases=True):
    """A copy of a family's model, under its own eager attention, with an ablation folded into its weights."""
    model = copy.deepcopy(built(name))
    with torch.no_grad():
        for head in group:
            layer = model.get_decoder().layers[head.layer]
            attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
            d_head = getattr(attention, "head_dim", None) or attention.head_size
            own = slice(head.index * d_head, (head.index + 1) * d_head)
            if ablation.kind.tensor == "head_output":  # columns of W_o; its bias is nobody's
                output = attention.dense if hasattr(attention, "dense") else attention.o_proj
                output.weight[:, own] *= ablation.epsilon
                continue
            fused = getattr(attention, "query_key_value", None)  # a head's query, key and value lie together
            projection, start = (attention.q_proj, own.start) if fused is None else (fused, 3 * own.start)
            for part in (projection.weight, projection.bias if biases else None):
                if part is not None:
                    part[start : start + d_head] *= ablation.epsilon
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits


def compared(name, group, ablation, model):
    """The hook's difference from a folded model, and how far that is from the one it was copied from."""
    with proved(name).ablated(group, ablation) as hooked:
        ours = logits(hooked)
    return relative(ours, logits(model)), relative(logits(model), logits(built(name)))


FOLDED = {
    UNDIFFERENTIATED_ATTENTION.name: ("llama2", "llama3", "mistral", "qwen2", "gpt_neox"),
    SCALING_CONTRIBUTION.name: ("llama2", "llama3", "mistral", "qwen2", "qwen3", "gpt_neox"),
}
"""Rows of W_q and its bias are scaled for the one, columns of W_o for the other; not behind a norm of queries."""


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("group", GROUPS, ids=["one", "over_layers", "sharing_keys"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FOLDED.items() for name in names])
def test_the_hook_equals_the_ablation_folded_into_the_weights(kind, name, group, epsilon):
    ablation = Ablation(kind, epsilon)
    difference, effect = compared(name, group, ablation, folded(name, group, ablation))
    assert difference < TOLERANCE
    assert effect > 100 * TOLERANCE  # or there is nothing to compare


def test_where_queries_have_biases_or_a_norm_scaled_rows_are_not_the_ablation():
    """As in the released code's weight mode."""
    for name in ("qwen2", "gpt_neox"):  # the bias stays, and with it a query that says something
        model = folded(name, GROUPS[0], UNDIFFERENTIATED_ATTENTION, biases=False)
        assert compared(name, GROUPS[0], UNDIFFERENTIATED_ATTENTION, model)[0] > 100 * TOLERANCE
    # A norm takes the factor out again: only ablating after it evens attention out.
    model = folded("qwen3", GROUPS[0], UNDIFFERENTIATED_ATTENTION.at(0.3))
    difference, effect = compared("qwen3", GROUPS[0], UNDIFFERENTIATED_ATTENTION, model)
    assert effect < TOLERANCE
    assert difference > 100 * TOLERANCE
