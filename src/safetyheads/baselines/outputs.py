"""What each head writes at the last prompt token. Owns z_h, W_O[h] and O_h = z_h W_O[h]; knows no ranking.

O_h is the head's part of its attention block's output: the parts of all heads and the bias of W_O sum to it. Norms
after attention (OLMo 2, Gemma 2) and factors of the residual (Granite) come later and are not in it.

A 7B model has 4 million numbers O_h a prompt, so they are reduced as soon as the layer has run: to a norm, one head
after another, or to a product with a direction, which goes through W_O[h] once and meets z_h (128 numbers) prompt by
prompt. Norms and products are taken in float64, of states and weights in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safetyheads.baselines.forward import rows_of, sequences_of, states_of
from safetyheads.errors import UnsupportedModelError

if TYPE_CHECKING:
    from safetyheads.model.architecture import HeadShape
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

Read: TypeAlias = Callable[[int, Tensor], Tensor]
"""From a layer and its z [n_prompts, n_heads, d_value] a number a prompt and head [n_prompts, n_heads]."""


def head_readings(engine: Engine, prompts: PromptSet, read: Read) -> Tensor:
    """What ``read`` makes of every head's z at the last prompt token of the unablated model.

    Args:
        engine: the model.
        prompts: queries under their template.
        read: called layer by layer, for the prompts of one packed row at a time.

    Returns:
        float64 [n_prompts, n_layers, n_heads], NaN where a layer has no such head.

    Raises:
        InputError: a prompt exceeds the context of the model.
        UnsupportedModelError: the output projection of a layer is not known.
    """
    sequences, facts = sequences_of(engine, prompts), engine.architecture
    values = torch.full((len(prompts), engine.n_layers, engine.n_heads), torch.nan, dtype=torch.float64)

    def hook_for(layer: int, shape: HeadShape, members: tuple[int, ...], wanted: Tensor) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            flat = given[0].flatten(0, -2)  # [n_tokens, n_heads * d_value]
            last = flat[wanted.to(flat.device)].view(len(members), shape.n_heads, shape.d_value)
            values[list(members), layer, : shape.n_heads] = read(layer, last).double().cpu()

        return hook

    for row in rows_of(engine, sequences):
        with ExitStack() as stack:
            for layer in facts.with_heads:
                projection, shape = output_projection(engine, layer)
                hook = hook_for(layer, shape, row.members, row.wanted)
                stack.callback(projection.register_forward_pre_hook(hook).remove)
            states_of(engine, row)
    return values


def norms(engine: Engine, prompts: PromptSet) -> Tensor:
    """|O_h| at the last prompt token: float64 [n_prompts, n_layers, n_heads], units of the residual stream."""

    def read(layer: int, outputs: Tensor) -> Tensor:
        weight = output_weight(engine, layer)
        # Head by head, so that one head's O_h of the row's prompts, [n_prompts, d_model], is all that there is.
        by_head = [(outputs[:, head].double() @ of_head.double()).norm(dim=-1) for head, of_head in enumerate(weight)]
        return torch.stack(by_head, dim=1)

    return head_readings(engine, prompts, read)


def projections(engine: Engine, prompts: PromptSet, direction: Tensor) -> Tensor:
    """O_h . direction at the last prompt token, signed.

    Args:
        engine: the model.
        prompts: queries under their template.
        direction: [d_model], of any length.

    Returns:
        float64 [n_prompts, n_layers, n_heads], in units of the residual stream times those of the direction.
    """
    along = weights_along(engine, direction)

    def read(layer: int, outputs: Tensor) -> Tensor:
        return torch.einsum("phv,hv->ph", outputs.double(), along[layer].to(outputs.device))

    return head_readings(engine, prompts, read)


def weights_along(engine: Engine, direction: Tensor) -> dict[int, Tensor]:
    """W_O[h] direction of each layer with heads: layer -> float64 [n_heads, d_value], on the CPU."""
    wanted, found = direction.detach().double(), dict[int, Tensor]()
    for layer in engine.architecture.with_heads:
        weight = output_weight(engine, layer)
        along = wanted.to(weight.device)
        # Head by head: the layer's whole W_O in float64 would be twice the size of its float32 copy.
        found[layer] = torch.stack([of_head.double() @ along for of_head in weight]).cpu()
    return found


def output_projection(engine: Engine, layer: int) -> tuple[nn.Module, HeadShape]:
    """The module that mixes a layer's heads, and the heads' shape.

    Raises:
        UnsupportedModelError: no such module is known.
    """
    facts = engine.architecture
    projection, shape = facts.output_projections[layer], facts.shapes[layer]
    if projection is None or shape is None:
        raise UnsupportedModelError(f"{facts.family}: the output projection of layer {layer} is not known")
    return projection, shape


@torch.inference_mode()
def output_weight(engine: Engine, layer: int) -> Tensor:
    """W_O of one layer, head by head: [n_heads, d_value, d_model], so that O_h = z_h @ weight[h].

    A projection that is no plain linear layer (quantised, offloaded, with an adapter on it) is asked for what it makes
    of unit vectors, less what it makes of nothing.
    """
    projection, shape = output_projection(engine, layer)
    width, weight = shape.n_heads * shape.d_value, getattr(projection, "weight", None)
    if type(projection) in (nn.Linear, Conv1D) and isinstance(weight, Tensor) and not weight.is_meta:
        # Linear layers keep [d_model, width], Conv1D (GPT-2) the transposed.
        by_input = weight.detach().T if isinstance(projection, nn.Linear) else weight.detach()
    else:
        units = torch.eye(width, device=engine.device, dtype=engine.dtype)
        by_input = projection(units) - projection(torch.zeros_like(units[:1]))
    return by_input.reshape(shape.n_heads, shape.d_value, -1)
