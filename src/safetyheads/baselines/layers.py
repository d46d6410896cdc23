"""Layer-specific pruning (LSP): runs of early layers left out. Owns which run is chosen, and how layers are skipped.

After Zhao et al. 2024, "Defending large language models against jailbreak attacks via layer-specific editing", whose
notebook leaves out runs that start at layer 1 to 6 of 32 and are 3 to 8 layers long. Both are scaled to the model's
depth here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safetyheads.baselines.base import Intervention, Material, Method
from safetyheads.baselines.calibration import batches
from safetyheads.baselines.linear_layers import EDITS
from safetyheads.errors import InputError
from safetyheads.measures.head_pass import log_odds
from safetyheads.model.loading import refuse_wrapped
from safetyheads.model.planning import TokenSequence

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

LAST_START = 6 / 32
"""The last layer at which a run may start, as a share of the depth; the first is layer 1."""


@contextmanager
def skipped(engine: Engine, layers: Sequence[int]) -> Iterator[None]:
    """Within, these layers give on what they were given.

    They are run all the same and what they make is dropped: their caches grow as ever, so positions, masks and layers
    that read another's keys stay right in every family. It costs the time of the full model.
    """

    def give_on(_: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        hidden = given[0] if given else keywords["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with ExitStack() as stack, engine.weights_changed():
        for layer in layers:
            module = engine.architecture.layers[layer]
            handle = module.register_forward_hook(give_on, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def candidate_runs(n_layers: int, share: float) -> tuple[range, ...]:
    """Runs of a share of the layers, at least one, that start early and leave the first and the last layer in place.

    A deep model's first start is layer 1 and its last that of :data:`LAST_START`; a shallow one has two starts where
    they fit.
    """
    length = min(max(1, round(share * n_layers)), n_layers - 2)
    last_start = min(max(2, round(LAST_START * n_layers)), n_layers - 1 - length)
    return tuple(range(start, start + length) for start in range(1, last_start + 1))


@torch.inference_mode()
def refusal_log_odds(engine: Engine, prompts: Sequence[TokenSequence], openers: Sequence[int]) -> float:
    """Mean over prompts of log P(R) / (1 - P(R)) at the last token, in nats; R are the first tokens of refusals."""
    found = []
    for batch in batches(engine, prompts):
        logits = engine.model(**batch.arguments(), logits_to_keep=1).logits[:, -1].double()  # [n_rows, vocabulary]
        found.append(log_odds(logits, openers))
    return float(torch.cat(found).mean())


def chosen_run(
    engine: Engine, prompts: Sequence[TokenSequence], openers: Sequence[int], runs: Sequence[range]
) -> range:
    """The run without which refusals of these prompts are least likely; of equal ones the earliest."""

    def without(run: range) -> float:
        with skipped(engine, run):
            return refusal_log_odds(engine, prompts, openers)

    return min(runs, key=without)


def _interventions(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine = material.engine
    refuse_wrapped("the model", engine.model, EDITS)
    if engine.n_layers < 3:
        raise InputError(f"the model has {engine.n_layers} layers; runs between the first and the last need three")
    if not material.openers:
        raise InputError("no refusal was seen, so no run of layers can be chosen by what it does to refusals")
    for share in strengths:
        if not 0 < share < 1:
            raise InputError(f"a share of the layers lies between 0 and 1; got {share:g}")
    prompts = [TokenSequence(token_ids) for token_ids in engine.ask(material.harmful).token_ids]
    # Shallow models round several shares to one length.
    chosen = {
        runs: chosen_run(engine, prompts, material.openers, runs)
        for runs in dict.fromkeys(candidate_runs(engine.n_layers, share) for share in strengths)
    }

    def ready(share: float) -> Intervention:
        run = chosen[candidate_runs(engine.n_layers, share)]
        parts = [engine.architecture.layers[layer] for layer in run]
        return Intervention(
            setting=f"without layer{'s' if len(run) > 1 else ''} {_named(run)} of {engine.n_layers}",
            strength=share,
            n_parameters=sum(parameter.numel() for part in parts for parameter in part.parameters()),
            at_work=lambda: skipped(engine, run),
        )

    return [ready(share) for share in strengths]


def _named(run: range) -> str:
    return f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])


LSP = Method(
    name="lsp",
    label="LSP",
    source="Zhao et al. 2024, Defending large language models against jailbreak attacks via layer-specific editing",
    touches="weights",
    strengths=(3 / 32, 4 / 32, 6 / 32, 8 / 32),
    interventions=_interventions,
    partial="a run is chosen by the refusal log-odds of the next token, where the original judges whole answers",
)
"""Strength: share of the layers left out, as one run. Shallow models round several shares to one length."""
