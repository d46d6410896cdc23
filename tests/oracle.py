"""The slow, obvious twin of the engine: one prompt, one group, softmax attention written out as loops.

It shares no code with the engine: the model is a copy that runs its own forward, in float32, on an attention
function of this module; masks are ignored and the allowed keys follow from the indices alone. No packing, no
replay, no cache. What a family needs is data, handed in: where its final norm is, which layers attend in chunks.
"""

import copy
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "oracle"


@dataclass(frozen=True)
class Seen:
    """What one plain run gave."""

    last_hidden: torch.Tensor
    """[d_model]: the last token's state before the final norm."""
    logits: torch.Tensor
    """[vocabulary]: of the token after the last."""
    outputs: dict[int, torch.Tensor]
    """layer -> [n_tokens, n_heads, d_head], the heads' outputs."""


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, sliding_window=None, **keywords):
    """Attention of a single row, head by head and token by token, with the ablation that hangs on the module."""
    del attention_mask, dropout
    softcap, sinks = keywords.get("softcap"), keywords.get("s_aux")
    name, epsilon, ablated, uniform = module.oracle_ablation
    n_heads, n_tokens = query.shape[1:3]
    per_group = n_heads // key.shape[1]
    output = torch.zeros(1, n_tokens, n_heads, value.shape[-1], dtype=value.dtype)
    for head in range(n_heads):
        queries, keys, values = query[0, head], key[0, head // per_group], value[0, head // per_group]
        if head in ablated:
            if name == "undifferentiated_attention":
                queries = queries * epsilon
            elif name == "undifferentiated_attention_key":
                keys = keys * epsilon
            elif name == "mean_query":
                queries = query[0].mean(dim=0)
            elif name == "mean_key":
                keys = key[0].mean(dim=0)
        for token in range(n_tokens):
            first = 0 if sliding_window is None else max(0, token - sliding_window + 1)
            if module.oracle_chunk is not None:
                first = token - token % module.oracle_chunk
            scores = keys[first : token + 1] @ queries[token] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if uniform and head in ablated:
                scores = torch.zeros_like(scores)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            weights = torch.exp(scores - scores.max())
            weights = (weights / weights.sum())[: token + 1 - first]
            output[0, token, head] = weights @ values[first : token + 1]
    before = output.clone()
    for head in ablated:
        if name == "scaling_contribution":
            output[0, :, head] = before[0, :, head] * epsilon
        elif name == "mean_head_output":
            output[0, :, head] = before[0].mean(dim=1)
    module.oracle_output = output[0].clone()
    return output, None


class Oracle:
    """A copy of a model, in float32, that answers slowly."""

    def __init__(self, model, norm="model.norm", chunks=()):
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.model = copy.deepcopy(model).float().eval()
        self.model.set_attn_implementation(NAME)
        self.norm = self.model.get_submodule(norm)
        # Beside the norm: an image's or a sound's encoder has others. Layers that mix tokens in another way have none
        # of these, and nothing to ablate.
        text = self.model.get_submodule(norm.rpartition(".")[0])
        attentions = [module for module in text.modules() if type(module).__name__.endswith("Attention")]
        self.attentions = {module.layer_idx: module for module in attentions}
        for number, attention in self.attentions.items():
            attention.oracle_chunk = dict(chunks).get(number)

    @torch.no_grad()
    def run(self, token_ids, group=(), ablation=None, uniform=False):
        """One forward over one prompt with one group ablated; ``uniform`` gives the group exactly even weights."""
        for number, attention in self.attentions.items():
            heads = [head.index for head in group if head.layer == number]
            name, epsilon = (None, None) if ablation is None else (ablation.name, ablation.epsilon)
            attention.oracle_ablation = (name, epsilon, heads, uniform)
        caught = []
        handle = self.norm.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
        try:
            logits = self.model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits
        finally:
            handle.remove()
        outputs = {number: attention.oracle_output for number, attention in self.attentions.items()}
        return Seen(caught[0][0, -1], logits[0, -1], outputs)

    def hidden(self, prompts, groups, ablation=None, uniform=False):
        """[n_groups, n_prompts, d_model] before the final norm; one forward a group and prompt."""
        return torch.stack(
            [torch.stack([self.run(ids, group, ablation, uniform).last_hidden for ids in prompts]) for group in groups]
        )

    def ships(self, token_ids, group, ablation):
        """KL (nats) of the next token's distribution, unablated against ablated."""
        before = torch.softmax(self.run(token_ids).logits.double(), dim=-1)
        after = torch.softmax(self.run(token_ids, group, ablation).logits.double(), dim=-1)
        return float(sum(p * torch.log(p / q) for p, q in zip(before, after, strict=True)))
