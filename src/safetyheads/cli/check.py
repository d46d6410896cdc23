"""``safetyheads check``: what the engine found on a model, what a prompt becomes, and what was proved.

Owns what is told of each, as JSON and as tables; the proofs are :mod:`safetyheads.model.proofs`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from safetyheads.cli.inputs import at_least, load_engine, put_to
from safetyheads.cli.options import ModelOptions, OutputOptions, TemplateOptions
from safetyheads.cli.show import print_json, progress_for, stdout

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.model.proofs import CheckReport
    from safetyheads.prompts.sets import PromptSet
    from safetyheads.prompts.templates import BoundTemplate

# What stands for blanks, so that each token is seen whole.
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})
_PARTS = ("before the query", "the query", "after the query", "prefilled answer")
# Queries that are not like any; of these the one counts that has the least in common with what is shown.
_OTHERS = ("0", "x", "?")
_WORD_STARTS = ("▁", "Ġ")


def check(
    model: ModelOptions,
    template: TemplateOptions,
    output: OutputOptions,
    longest: Annotated[int, typer.Option(help="Most tokens that a run will reach.")] = 64,
) -> None:
    """Show what a prompt becomes under a template, what was found in the model, and prove that ablations are exact.

    A model where they are not is refused by name.
    """
    at_least(1, longest=longest)
    from safetyheads.runs.data import template_of

    chosen = template_of(template)
    watching = progress_for(output.quiet)
    engine = load_engine(model, watching, proved=False)
    samples = _samples(engine)
    asked = put_to(engine, samples if chosen is None else samples.with_template(chosen), template)
    prompt, facts = prompt_json(engine, asked), facts_json(engine)
    with watching.track("proving", 1):
        proved = engine.check(longest)
    if output.json_output:
        # An attempt that raised has no figure; the notes tell what it raised.
        errors = [proof.error if isfinite(proof.error) else None for proof in proved.proofs]
        proofs = [
            {**asdict(proof), "error": error, "passed": proof.passed}
            for proof, error in zip(proved.proofs, errors, strict=True)
        ]
        told = {"proofs": proofs, "capabilities": asdict(proved.capabilities), "notes": list(proved.notes)}
        print_json({"model": model.model, "facts": facts, "prompt": prompt, **told})
        return
    _show_facts(f"{engine.architecture.family}: {model.model}", facts)
    _show_prompt(prompt, facts["context_length"])
    _show_proofs(proved)


def _samples(engine: Engine) -> PromptSet:
    """Harmless prompts to show; the organism's in its own language."""
    from safetyheads.prompts.sets import builtin_benign
    from safetyheads.runs.data import demo_set

    organism = bool(getattr(engine.model.config, "safetyheads_organism", False))
    return demo_set("benign", "test") if organism else builtin_benign()


# What a prompt becomes.


def prompt_json(engine: Engine, asked: PromptSet) -> dict[str, Any]:
    """The tokens of the first prompt under the set's template, each with the part of the prompt that it belongs to."""
    bound = (asked.template or engine.default_template).bound(engine.tokenizer)
    tokenizer, token_ids = engine.tokenizer, bound.encode(asked[0].query)
    parts = _parts(bound, token_ids, asked[0].query)
    special = {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ())}
    tokens = [
        {"id": token, "text": _text(tokenizer, token), "special": token in special, "part": part}
        for token, part in zip(token_ids, parts, strict=True)
    ]
    return {
        **bound.template.settings(),
        "think_block": _about_thinking(bound),
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

    def around(other: Sequence[int]) -> tuple[int, int]:
        before = _n_same(alone, other)
        most = min(len(alone), len(other)) - before
        return before, min(most, _n_same(alone[::-1], other[::-1]))

    before, after = min((around(bound.tokens(bound.up_to_answer(other))) for other in _OTHERS), key=sum)
    n_prefilled = len(token_ids) - _n_same(alone, token_ids) if bound.template.prefill else 0
    n_query = len(alone) - before - after
    rest = len(token_ids) - before - n_query - n_prefilled
    return [part for part, n in zip(_PARTS, (before, n_query, rest, n_prefilled), strict=True) for _ in range(n)]


def _n_same(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _text(tokenizer: Any, token: int) -> str:
    """A token as it stands in a text; its name where it is no text by itself, such as part of a character."""
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if not text or "\ufffd" in text:
        return piece
    # Some tokenizers leave out the blank before a text's first word.
    return f" {text}" if piece.startswith(_WORD_STARTS) and not text[0].isspace() else text


def _about_thinking(bound: BoundTemplate) -> str | None:
    """How the think block is dealt with; None where there is none."""
    chat, thinking = bound.chat, bound.template.thinking
    if thinking is None:
        return None
    if thinking == "open":
        begun = "the prompt begins it" if bound.begins_in_block else "the model may begin it"
        marks = f"{bound.block.opener} to {bound.block.closer}" if bound.block else ""
        return f"open ({marks}): {begun}, and what stands in it is not judged"
    switch = f"by {chat.switches[0]}=False" if chat is not None and chat.switches else "by an empty block"
    return f"closed, {switch}"


def _show_prompt(prompt: Mapping[str, Any], context: int | None) -> None:
    console = stdout()
    table = Table("part", "tokens", "blanks as · and ↵, special tokens in ⟦ ⟧", title=_title(prompt), show_lines=True)
    for part in _PARTS:
        tokens = [token for token in prompt["tokens"] if token["part"] == part]
        if tokens:
            table.add_row(part, str(len(tokens)), _line_by_line(tokens))
    console.print(table)
    bos = prompt["bos_token"]
    n_bos = "no BOS token: the tokenizer has none" if bos is None else f"BOS tokens ({bos}): {prompt['n_bos']}"
    shared, n_tokens = prompt["n_shared"], prompt["n_tokens"]
    console.print(f"- {n_bos}", soft_wrap=True)
    first = "first token stands" if shared == 1 else f"first {shared} tokens stand"
    if shared:
        console.print(f"- packed: the {first} once in a row, for all of its prompts", soft_wrap=True)
    if context is not None and n_tokens > context:
        console.print(f"- {n_tokens} tokens do not fit the model's context of {context}", style="yellow")
    if prompt["think_block"]:
        console.print(f"- think block {prompt['think_block']}", soft_wrap=True)
    if prompt["note"]:
        console.print(f"- {prompt['note']}", soft_wrap=True)
    if prompt["has_chat_template"] and prompt["template"] != "chat":
        console.print("- the tokenizer has a chat template too: --template chat", soft_wrap=True)


def _title(prompt: Mapping[str, Any]) -> str:
    named = " ".join(str(prompt["template"]).split())
    system = "" if prompt["system"] is None else ", with a system prompt"
    return f"A prompt under the template {named}{system}: {prompt['n_tokens']} tokens"


def _line_by_line(tokens: Sequence[Mapping[str, Any]]) -> Text:
    """The tokens with blanks between them, and a new line where the prompt has one."""
    shown, between = Text(), ""
    for token in tokens:
        shown.append(between).append_text(_visible(token))
        between = "\n" if "\n" in token["text"] else " "
    return shown


def _visible(token: Mapping[str, Any]) -> Text:
    text = str(token["text"]).translate(_VISIBLE)
    # A checkpoint's tokens are anybody's text, and may hold what terminals obey.
    shown = "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)
    return Text(f"⟦{shown}⟧", style="bold magenta") if token["special"] else Text(shown)


# What was found in the model.


def facts_json(engine: Engine) -> dict[str, Any]:
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
        "family": facts.family,
        "n_parameters": model.num_parameters(),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "n_layers": facts.n_layers,
        "heads": [None if shape is None else asdict(shape) for shape in facts.shapes],
        "d_model": facts.d_model,
        "d_mlp": facts.d_mlp,
        "active_experts": facts.active_experts,
        "vocabulary_size": facts.vocabulary_size,
        "context_length": facts.context_length,
        "windows": list(facts.windows),
        "turns": list(facts.turns),
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


def _show_facts(title: str, facts: Mapping[str, Any]) -> None:
    table, found = Table("fact", "value", "found at", title=title), facts["found"]

    def row(name: str, value: Any, where: str | None = None) -> None:
        table.add_row(name, str(value), ", ".join(found[where]) if where else "")

    row("parameters", f"{facts['n_parameters']:,}, {facts['dtype']} on {facts['device']}", "decoder")
    row("layers", facts["n_layers"], "layers")
    for heads, layers in _alike(facts["heads"]):
        which = "every layer" if len(layers) == facts["n_layers"] else _ranges(layers)
        row(f"heads of {which}", heads, None if facts["heads"][layers[0]] is None else "attention")
    row("width of the model, of its MLP", f"{facts['d_model']}, {facts['d_mlp']}")
    if facts["active_experts"] != 1:
        row("experts that a token is sent to", f"{facts['active_experts']:.0%}")
    row("query projection", "", "query projection")
    row("output projection", "", "output projection")
    row("final norm", "", "final norm")
    row("vocabulary", facts["vocabulary_size"], "head")
    row("longest context", "no bound" if facts["context_length"] is None else facts["context_length"])
    for turn in facts["turns"]:
        row("positions act in another way beyond", f"{turn} tokens")
    stdout().print(table)


def _alike(shapes: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, list[int]]]:
    """The heads in words, each with the layers that have them so."""
    found: dict[str, list[int]] = {}
    for layer, shape in enumerate(shapes):
        found.setdefault(_heads_in_words(shape), []).append(layer)
    return list(found.items())


def _heads_in_words(shape: Mapping[str, Any] | None) -> str:
    if shape is None:
        return "none: tokens are mixed in another way"
    values = f" (values {shape['d_value']})" if shape["d_value"] != shape["d_head"] else ""
    window = "all tokens before" if shape["window"] is None else f"a window of {shape['window']} tokens"
    return (
        f"{shape['n_heads']} of width {shape['d_head']}{values}, {shape['n_kv_heads']} of keys and values; see {window}"
    )


def _ranges(layers: Sequence[int]) -> str:
    """``layers 0-3, 5``, or ``layer 1``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    named = "layer " if len(layers) == 1 else "layers "
    return named + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# What was proved.


def _show_proofs(proved: CheckReport) -> None:
    """Each proof with its difference, and what was given up."""
    console = stdout()
    table = Table("claim", "difference", "allowed", "holds", title="Proved on these weights")
    for proof in proved.proofs:
        table.add_row(proof.name, f"{proof.error:.1e}", f"{proof.tolerance:.0e}", "yes" if proof.passed else "no")
    console.print(table)
    for note in proved.notes:
        console.print(f"note: {note}", soft_wrap=True)
    n_held = sum(proof.passed for proof in proved.proofs)
    console.print(
        f"{n_held} of {len(proved.proofs)} claims hold: ablations are exact on this model"
        + ("" if n_held == len(proved.proofs) else ", on slower paths where one does not"),
        soft_wrap=True,
    )
