"""What linear layers are given while a model reads text. Owns calibration text, and how inputs are gathered.

Inputs X [n_tokens, d_in] are never kept: only X^T X, in float64, is, so that memory does not grow with the text. Where
later layers are to see earlier edits, each decoder layer's inputs are gathered in a run of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safetyheads.answers.decoding import end_tokens
from safetyheads.baselines.linear_layers import LinearLayer, Weights, edited, linear_layers, put
from safetyheads.errors import InputError
from safetyheads.model.planning import TokenSequence, left_padded

if TYPE_CHECKING:
    from safetyheads.baselines.base import Material
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

ACCUMULATED = torch.float64
"""Of X^T X, and of all that is solved with it."""
# Of a batch of calibration text; more gains nothing once every matrix product is this tall.
_TOKENS_AT_ONCE = 4096


class _LayerIsDone(Exception):
    """Leaves the decoder: later layers have nothing to tell."""


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Sequences as one batch, padding first."""

    token_ids: Tensor
    """int64 [n_rows, longest]."""
    mask: Tensor
    """int64 [n_rows, longest]: 1 where a token is real."""
    positions: Tensor
    """int64 [n_rows, longest]: of each token within its own row."""
    counted: Tensor
    """bool [n_rows, longest]: tokens whose inputs count, each sequence's last ``n_wanted``."""

    def arguments(self) -> dict[str, Any]:
        """As a decoder or a whole model takes it."""
        return {
            "input_ids": self.token_ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "use_cache": False,
        }


def refusal_text(material: Material, whole: bool) -> tuple[TokenSequence, ...]:
    """Harmful prompts with the model's refusals; ``whole`` counts prompts too, else refusals alone."""
    return _text(material.engine, material.harmful, material.refusals, whole)


def benign_text(material: Material, whole: bool) -> tuple[TokenSequence, ...]:
    """Benign prompts with the model's answers; ``whole`` counts prompts too, else answers alone."""
    return _text(material.engine, material.benign, material.answers, whole)


def _text(
    engine: Engine, prompts: PromptSet, answers: Sequence[Sequence[int]], whole: bool
) -> tuple[TokenSequence, ...]:
    encoded = engine.ask(prompts).token_ids
    if len(encoded) != len(answers):
        raise InputError(f"{len(answers)} answers for the {len(encoded)} prompts of {prompts.name}")
    context = engine.architecture.context_length
    read = []
    for prompt, answer in zip(encoded, answers, strict=True):
        tokens = (*prompt, *answer)[:context]
        n_counted = len(tokens) if whole else len(tokens) - len(prompt)
        if n_counted > 0:  # an empty answer has no tokens to learn from
            read.append(TokenSequence(tokens, n_counted))
    if not read:
        raise InputError(f"there is no text to learn from: all answers to {prompts.name} are empty")
    return tuple(read)


def batches(engine: Engine, sequences: Sequence[TokenSequence]) -> list[TextBatch]:
    """The sequences in batches of like length; of one length, where padding is not exact on this model."""

    def length(sequence: TokenSequence) -> int:
        return len(sequence.token_ids)

    order = sorted(sequences, key=length)
    runs = [order] if engine.capabilities.pads else [list(same) for _, same in groupby(order, key=length)]
    found = []
    for run in runs:
        together = max(1, _TOKENS_AT_ONCE // length(run[-1]))
        found += [_batch(engine, run[at : at + together]) for at in range(0, len(run), together)]
    return found


def _batch(engine: Engine, members: Sequence[TokenSequence]) -> TextBatch:
    padded = left_padded([member.token_ids for member in members], next(iter(end_tokens(engine)), 0), engine.device)
    wanted = torch.tensor([member.n_wanted for member in members])
    from_end = torch.arange(padded.token_ids.shape[1]).flip(0)
    return TextBatch(
        padded.token_ids, padded.mask, padded.positions, (from_end < wanted[:, None]).to(padded.token_ids.device)
    )


@contextmanager
def inputs_seen(modules: Sequence[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within, ``see`` is told each module's number and its input [n_rows, n_tokens, d_in] whenever it is called."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):

            def told(_: nn.Module, given: tuple[Any, ...], number: int = number) -> None:
                see(number, given[0].detach())

            handle = module.register_forward_pre_hook(told)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def gram_matrices(
    engine: Engine, linears: Sequence[LinearLayer], text: Sequence[TextBatch]
) -> dict[LinearLayer, Tensor]:
    """X^T X of each linear layer, over the counted tokens of all text.

    Args:
        engine: the model, with the weights it has now.
        linears: of any layers; the run ends with the last of theirs.
        text: what the model reads.

    Returns:
        Linear layer -> float64 [d_in, d_in].
    """
    sums: dict[LinearLayer, Tensor] = {}
    counted = text[0].counted

    def see(number: int, given: Tensor) -> None:
        linear = linears[number]
        inputs = given.reshape(*counted.shape, linear.d_in)[counted.to(given.device)].to(ACCUMULATED)
        product = inputs.T @ inputs  # [d_in, d_in]
        sums[linear] = sums[linear].add_(product) if linear in sums else product

    def stop(*_: Any) -> None:
        raise _LayerIsDone

    last = engine.architecture.layers[max(linear.layer for linear in linears)]
    handle = last.register_forward_hook(stop)
    try:
        with inputs_seen([linear.module for linear in linears], see):
            for batch in text:
                counted = batch.counted
                try:
                    engine.architecture.decoder(**batch.arguments())
                except _LayerIsDone:
                    continue
    finally:
        handle.remove()
    return sums


Edit = Callable[[LinearLayer, Mapping[str, Tensor]], Tensor]
"""Makes a linear layer's new W [d_out, d_in] from its X^T X over each named text."""


def edit_layer_by_layer(engine: Engine, texts: Mapping[str, Sequence[TokenSequence]], edit: Edit) -> Weights:
    """New weights of every linear layer, those of later decoder layers made on what edited earlier ones give.

    Within a decoder layer all are made from one run, before any is edited, as Wanda, SparseGPT and ActSVD do it.

    Args:
        engine: the model; its weights are put back before this returns.
        texts: text by name, such as ``utility`` and ``safety``.
        edit: of one linear layer.
    """
    linears = linear_layers(engine)
    laid_out = {name: batches(engine, text) for name, text in texts.items()}
    made: dict[LinearLayer, Tensor] = {}
    unchanged = {linear: linear.weight for linear in linears}
    with edited(engine, unchanged):
        for _, members in groupby(linears, key=lambda linear: linear.layer):
            here = list(members)
            grams = {name: gram_matrices(engine, here, text) for name, text in laid_out.items()}
            for linear in here:
                if all(linear in seen for seen in grams.values()):
                    weight = edit(linear, {name: seen[linear] for name, seen in grams.items()})
                    made[linear] = weight.to(linear.weight.dtype)
            for linear in here:
                if linear in made:
                    put(linear, made[linear])
    return made
