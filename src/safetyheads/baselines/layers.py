"""Layer-specific pruning (LSP): leaves out a run of early layers.

After Zhao et al. 2024, "Defending large language models against jailbreak attacks via layer-specific editing", whose
notebook leaves out runs that start at layer 1 to 6 of 32 and are 3 to 8 layers long. Both are scaled to the model's
depth here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from safetyheads.baselines.base import Intervention, Material, refusal_log_odds
from safetyheads.baselines.linear_layers import EDITS
from safetyheads.errors import InputError
from safetyheads.model.engine import Engine
from safetyheads.model.loading import refuse_wrapped
from safetyheads.model.replay import first_input, hooked

LAST_START = 6 / 32
"""The last layer at which a run may start, as a share of the depth; the first is layer 1."""


@contextmanager
def skipped(engine: Engine, layers: Sequence[int]) -> Iterator[None]:
    """Within, these layers return their input.

    They still run and their output is dropped: their caches grow as usual, so positions, masks and layers that read
    another's keys stay right in every family. It costs the time of the full model.
    """

    def return_input(module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        hidden = first_input(module, given, keywords)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    left_out = (engine.architecture.layers[layer] for layer in layers)
    with (
        engine.weights_changed(),
        hooked(*(module.register_forward_hook(return_input, with_kwargs=True) for module in left_out)),
    ):
        yield


def candidate_runs(n_layers: int, share: float) -> tuple[range, ...]:
    """Runs of a share of the layers, at least one, that start early and keep the first and the last layer.

    A deep model's starts are layer 1 to :data:`LAST_START`; a shallow one has two starts where they fit.
    """
    length = min(max(1, round(share * n_layers)), n_layers - 2)
    last_start = min(max(2, round(LAST_START * n_layers)), n_layers - 1 - length)
    return tuple(range(start, start + length) for start in range(1, last_start + 1))


def chosen_run(material: Material, runs: Sequence[range]) -> range:
    """The run without which refusals of the harmful prompts are least likely; of equal ones the earliest."""

    def log_odds_without(run: range) -> float:
        with skipped(material.engine, run):
            return float(refusal_log_odds(material.engine, material.harmful, material.openers).mean())

    return min(runs, key=log_odds_without)


def learn(material: Material, _: Sequence[float]) -> Callable[[float], Intervention]:
    """Strength: share of the layers; shallow models round several shares to one length."""
    engine = material.engine
    refuse_wrapped("the model", engine.model, EDITS)
    if engine.n_layers < 3:
        raise InputError(f"the model has {engine.n_layers} layers; runs between the first and the last need three")
    if not material.openers:
        raise InputError("no refusal was seen, so no run of layers can be chosen by what it does to refusals")
    choose = cache(partial(chosen_run, material))

    def make(share: float) -> Intervention:
        run = choose(candidate_runs(engine.n_layers, share))
        named = f"layers {run[0]}-{run[-1]}" if len(run) > 1 else f"layer {run[0]}"
        n_parameters = sum(parameter.numel() for at in run for parameter in engine.architecture.layers[at].parameters())
        return Intervention(f"without {named} of {engine.n_layers}", share, n_parameters, partial(skipped, engine, run))

    return make
