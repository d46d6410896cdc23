"""Describes a model and a prompt for ``safetyheads check``: what was found, what a prompt becomes, what was proved."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import isfinite
from os.path import commonprefix
from typing import Any

from safetyheads.answers.decoding import not_followed_line, settings_not_followed
from safetyheads.demo import demo_prompts
from safetyheads.errors import InputError
from safetyheads.model.engine import Engine
from safetyheads.prompts.prompt_set import PromptSet, builtin_benign
from safetyheads.prompts.templates import BoundTemplate
from safetyheads.runs.config import CheckConfig, Progress
from safetyheads.runs.run import resolved

_PARTS = ("before the query", "the query", "after the query", "prefilled answer")
# Queries that are not like any; of these the one counts that has the least in common with what is shown.
_OTHERS = ("0", "x", "?")
_WORD_STARTS = ("▁", "Ġ")
# Facts of the architecture that are shown unchanged.
_FACTS = (
    *("family", "n_layers", "d_model", "d_mlp", "active_experts"),
    *("vocabulary_size", "context_length", "windows", "turns"),
)


def describe(engine: Engine, config: CheckConfig, prompts: PromptSet | None, progress: Progress) -> dict[str, Any]:
    """The model's facts, the tokens of the first prompt, and the engine's proofs, as JSON.

    Without prompts benign ones are shown, in the organism's own language where the model is one.
    """
    if prompts is None:
        organism = bool(getattr(engine.model.config, "safetyheads_organism", False))
        prompts = demo_prompts("benign", "test") if organism else builtin_benign()
    context = engine.architecture.context_length
    if context is not None and config.longest > context:
        raise InputError(f"longest {config.longest} is beyond the model's context of {context} tokens")
    asked = resolved(engine, prompts, config)
    prompt, facts = describe_prompt(engine, asked), describe_model(engine)
    with progress.track("proving", 1):
        proved = engine.check(config.longest)
    proofs = [
        # An attempt that raised has no figure; the notes tell what it raised.
        {**proof._asdict(), "error": proof.error if isfinite(proof.error) else None, "passed": proof.passed}
        for proof in proved.proofs
    ]
    not_followed = not_followed_line(engine.model)
    notes = [*proved.notes, *[not_followed] * (not_followed is not None)]
    found = {"proofs": proofs, "capabilities": asdict(proved.capabilities), "notes": notes}
    found["generation_settings_not_followed"] = settings_not_followed(engine.model)
    return {"model": config.model, "facts": facts, "prompt": prompt, **found}


def describe_prompt(engine: Engine, asked: PromptSet) -> dict[str, Any]:
    """The tokens of the first prompt under the set's template, each with the part of the prompt that it belongs to."""
    bound = (asked.template or engine.default_template).bound(engine.tokenizer)
    tokenizer, token_ids = engine.tokenizer, bound.encode(asked[0].query)
    parts = _parts(bound, token_ids, asked[0].query)
    special = {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ())}
    tokens = [
        {"id": token, "text": _text(tokenizer, token), "special": token in special, "part": part}
        for token, part in zip(token_ids, parts, strict=True)
    ]
    think_block = None
    if bound.template.thinking == "open":
        begun = "the prompt begins it" if bound.begins_in_block else "the model may begin it"
        marks = f"{bound.block.opener} to {bound.block.closer}" if bound.block else ""
        think_block = f"open ({marks}): {begun}, and what stands in it is not judged"
    elif bound.template.thinking:
        think_block = f"closed, {f'by {bound.switches[0]}=False' if bound.switches else 'by an empty block'}"
    elif bound.block:
        think_block = "none is written by the template; one that the model writes is not judged"
    return {
        **bound.template.settings(),
        "think_block": think_block,
        "note": bound.note,
        "query": asked[0].query,
        "n_tokens": len(token_ids),
        "n_bos": token_ids.count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0,
        "bos_token": tokenizer.bos_token,
        "n_shared": parts.count(_PARTS[0]),
        "has_chat_template": bool(tokenizer.chat_template),
        "tokens": tokens,
    }


def _parts(bound: BoundTemplate, token_ids: Sequence[int], query: str) -> list[str]:
    """The part of each token: what differs from the prompt of another query is the query."""
    alone = bound.tokens(bound.up_to_answer(query))

    def n_same(*token_ids: Sequence[int]) -> int:
        return len(commonprefix([*map(tuple, token_ids)]))  # noqa: RUF071, these are no paths

    def around(other: Sequence[int]) -> tuple[int, int]:
        before = n_same(alone, other)
        return before, min(len(alone) - before, len(other) - before, n_same(alone[::-1], other[::-1]))

    before, after = min((around(bound.tokens(bound.up_to_answer(other))) for other in _OTHERS), key=sum)
    n_prefilled = len(token_ids) - n_same(alone, token_ids) if bound.template.prefill else 0
    n_query = len(alone) - before - after
    rest = len(token_ids) - before - n_query - n_prefilled
    return [part for part, n in zip(_PARTS, (before, n_query, rest, n_prefilled), strict=True) for _ in range(n)]


def _text(tokenizer: Any, token: int) -> str:
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if not text or "\ufffd" in text:
        return piece
    # Some tokenizers leave out the blank before a text's first word.
    return f" {text}" if piece.startswith(_WORD_STARTS) and not text[0].isspace() else text


def describe_model(engine: Engine) -> dict[str, Any]:
    """The facts that the engine works by, and the names of the modules it works on."""
    facts, model = engine.architecture, engine.model
    known = {id(module): name for name, module in model.named_modules()}

    def name(module: Any) -> str:
        return known.get(id(module)) or type(module).__name__

    def within(layers: Iterable[Any], parts: Iterable[Any]) -> list[str]:
        """Distinct names of a part of each layer with heads, from the layer on; none where queries are fused."""
        found = {
            "none" if part is None else name(part).removeprefix(f"{name(layer)}.")
            for layer, part in zip(layers, parts, strict=True)
            if layer is not None
        }
        return sorted(found)

    with_heads = [None if one is None else layer for layer, one in zip(facts.layers, facts.attentions, strict=True)]

    return {
        **{name: getattr(facts, name) for name in _FACTS},
        "n_parameters": model.num_parameters(),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "heads": [None if shape is None else shape._asdict() for shape in facts.shapes],
        "found": {
            "decoder": [name(facts.decoder)],
            "layers": sorted({name(layer).rpartition(".")[0] for layer in facts.layers}),
            "attention": within(with_heads, facts.attentions),
            "query projection": within(facts.attentions, facts.query_projections),
            "output projection": within(facts.attentions, facts.output_projections),
            "final norm": [name(facts.final_norm)],
            "head": [name(facts.head)],
        },
    }
