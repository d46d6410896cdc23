"""(c) of the scan's bench: TransformerLens on the same weights, batched. Owns how it is driven and checked.

TransformerLens 4 has one model class, ``TransformerBridge``: the hooks are laid into transformers' own Llama, which
runs with its attention spelled out in plain tensor operations. It runs in an environment of its own (README.md).
"""

from typing import TYPE_CHECKING, Any

import torch
from passes import EPSILON, Batch, HeadOf, Measured, States, Work, hooked_states, padded, timed

if TYPE_CHECKING:
    from torch import Tensor

# Largest difference from transformers' last states, of RMS about 1, in float32; measured 1e-5 at 8 layers.
_TOLERANCE = 1e-4


def transformerlens(work: Work) -> Measured:
    """Time the pass; in float32 the last states are proved first against transformers', ablated and not."""
    batches = padded(work)
    states = bridged_states(bridge(work), batches)
    if work.dtype == torch.float32:
        _prove(work, states, batches)
    return timed(work, states, work.dtype, library="transformer-lens")


def bridge(work: Work) -> Any:
    """The bench's model under TransformerLens's hooks."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]
    from transformers import PreTrainedTokenizerFast

    # Prompts are token ids already, but without a tokenizer the bridge looks for one on the hub.
    words = Tokenizer(models.WordLevel({"end": 0}, unk_token="end"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end")
    return TransformerBridge.boot_transformers(
        "bench", hf_model=work.model("eager"), device=work.device, dtype=work.dtype, tokenizer=tokenizer
    )


def bridged_states(model: Any, batches: list[Batch]) -> States:
    """The last states that the bridge gives; logits of one token a prompt is the least it makes."""

    def states(head: HeadOf | None) -> "Tensor":
        hooks: list[tuple[str, Any]] = []
        if head is not None:
            layer, index = head

            def scale(query: "Tensor", hook: Any) -> "Tensor":
                query[:, :, index] *= EPSILON  # [n_prompts, n_tokens, n_heads, d_head]
                return query

            hooks.append((f"blocks.{layer}.attn.hook_q", scale))
        parts: list[Tensor] = []
        for batch in batches:

            def keep(normed: "Tensor", hook: Any, last: "tuple[Tensor, Tensor]" = batch.last) -> None:
                parts.append(normed[last])

            model.run_with_hooks(
                batch.token_ids,
                attention_mask=batch.mask,
                fwd_hooks=[*hooks, ("ln_final.hook_out", keep)],
                return_type=None,
                logits_to_keep=1,
                use_cache=False,
            )
        return torch.cat(parts)

    return states


@torch.inference_mode()
def _prove(work: Work, states: States, batches: list[Batch]) -> None:
    """Compare the last states with transformers', unablated and with each sampled layer's first head ablated."""
    expected = hooked_states(work.model("sdpa"), batches)
    for head in (None, work.sample[0], work.sample[-1]):
        difference = float((states(head) - expected(head)).abs().max())
        assert difference < _TOLERANCE, f"TransformerLens differs by {difference} with head {head} ablated"
    moved = float((expected(work.sample[0]) - expected(None)).abs().max())
    assert moved > 100 * _TOLERANCE, f"ablating {work.sample[0]} moves the states by {moved} only, which proves nothing"
