"""How many weights a baseline touches, counted on the model. Owns the counts; changes no weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import Head

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

DOWN_NAMES = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear")
"""An MLP's last projection, by the names families use."""
WRITING_NAMES = (*DOWN_NAMES, "out_proj")
"""The matrices with which an MLP, or what mixes tokens beside the attention, writes to the residual."""
FUSED_NAMES = ("c_attn", "query_key_value", "qkv_proj")
"""What they call one projection to queries, keys and values together."""


def head_parameters(engine: Engine, group: Sequence[Head], ablation: Ablation) -> int:
    """Weights that ablating a group touches, were it done on the weights (Table 1 counts so).

    Undifferentiated attention and the mean ablations of queries and keys touch the head's rows of W_q, d_head rows as
    wide as what W_q reads, and their biases; ablations of the head's output touch its d_value columns of W_o, and no
    bias. Each layer's own shapes are counted: widths of heads, and the rank behind W_q where queries pass one (MLA).
    Under a norm of queries (Qwen 3) scaling the rows would do nothing; the rows are counted all the same.

    Raises:
        InputError: a head that the model does not have.
    """
    return sum(_of_head(engine, head, ablation) for head in group)


def most_head_parameters(engine: Engine, size: int, ablation: Ablation) -> int:
    """The most that any group of ``size`` heads touches, for methods whose groups differ from prompt to prompt."""
    counts = sorted((_of_head(engine, head, ablation) for head in engine.heads), reverse=True)
    return sum(counts[:size])


def _of_head(engine: Engine, head: Head, ablation: Ablation) -> int:
    facts = engine.architecture
    shape = facts.shapes[head.layer] if head.layer < facts.n_layers else None
    if shape is None or head.index >= shape.n_heads:
        raise InputError(f"head {head} is out of range: layer {head.layer} has no such head")
    if ablation.kind.tensor == "head_output":
        return shape.d_value * facts.d_model
    query, attention = facts.query_projections[head.layer], facts.attentions[head.layer]
    if query is None:
        query = next((getattr(attention, name) for name in FUSED_NAMES if hasattr(attention, name)), None)
        n_read = facts.d_model
    else:
        n_read = getattr(query, "in_features", facts.d_model)
    biased = getattr(query, "bias", None) is not None
    return shape.d_head * (n_read + biased)


def writing_parameters(engine: Engine) -> int:
    """Weights that write to the residual stream: token embeddings, each W_o, and each part's last matrix, with biases.

    Those that the weight form of a direction's removal touches (W_out <- (I - r^ r^T) W_out). Parts beside the
    attention are found by their names (:data:`WRITING_NAMES`); experts are counted all, and embeddings once, also where
    the logits' head is tied to them.
    """
    counted: dict[int, int] = {}
    facts = engine.architecture

    def count(module: nn.Module) -> None:
        for parameter in module.parameters():
            counted[id(parameter)] = parameter.numel()

    count(engine.model.get_input_embeddings())
    for layer, attention, projection in zip(facts.layers, facts.attentions, facts.output_projections, strict=True):
        inside = set() if attention is None else set(attention.modules())
        if projection is not None:
            count(projection)
        for name, parameter in layer.named_parameters():
            owner = layer.get_submodule(name.rpartition(".")[0])
            # Stacked experts are parameters of that name, other parts modules of that name.
            if owner not in inside and any(part in WRITING_NAMES for part in name.split(".")[-2:]):
                counted[id(parameter)] = parameter.numel()
    return sum(counted.values())
