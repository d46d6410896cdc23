"""Our attention against the family's own. Owns the proof that unablated they are the same, layer by layer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from safetyheads.model.loading import is_quantised, use_our_attention
from safetyheads.model.planning import PackedRow
from safetyheads.model.quick_paths import difference, largest
from safetyheads.model.replay import first_of

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def against_eager(engine: Engine, rows: list[PackedRow]) -> tuple[float | None, float]:
    """(i) With our attention against the family's eager: what heads say, None where quantisation changes nothing about
    it or no projection of it is known, and each attention block's output. Leaves ours set.

    Every layer is given what it was given under eager attention, so that rounding does not pile up over the layers:
    in bfloat16 even eager and sdpa differ by some percent of the logits at the end of four layers.
    """
    facts = engine.architecture
    reads_heads = is_quantised(engine.model)

    def blocks(row: PackedRow, forced: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs: list[Tensor] = []
        heads: list[Tensor] = []
        outputs: list[Tensor] = []

        def enter(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            hidden = positional[0] if positional else keywords["hidden_states"]
            if forced is not None:
                hidden = forced[len(inputs)]
            inputs.append(hidden)
            if positional:
                return (hidden, *positional[1:]), keywords
            return positional, {**keywords, "hidden_states": hidden}

        with ExitStack() as stack:
            for layer, attention in zip(facts.layers, facts.attentions, strict=True):
                stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if attention is not None:
                    kept = attention.register_forward_hook(lambda _, __, out: outputs.append(first_of(out)))
                    stack.callback(kept.remove)
            for projection in facts.output_projections if reads_heads else ():
                if projection is not None:
                    said = projection.register_forward_pre_hook(lambda _, given: heads.append(given[0]))
                    stack.callback(said.remove)
            engine.model(input_ids=row.token_ids[None], use_cache=False)
        return inputs, heads, outputs

    engine.model.set_attn_implementation("eager")
    try:
        references = [blocks(row, None) for row in rows]
    finally:
        # Whatever happens: under another attention function ablations would do nothing, and not say so.
        use_our_attention(engine.model)
    found = [blocks(row, inputs) for row, (inputs, *_) in zip(rows, references, strict=True)]
    pairs = list(zip(found, references, strict=True))

    def errors(part: int) -> list[float]:
        return [difference(*both) for own, others in pairs for both in zip(own[part], others[part], strict=True)]

    return (largest(errors(1)) if reads_heads and found[0][1] else None), largest(errors(2))
