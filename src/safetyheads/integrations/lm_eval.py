"""Ablated models for scripts that call lm-eval themselves. Owns that context alone.

For numbers beside vanilla's, with intervals, see :func:`safetyheads.integrations.utility.evaluate_tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import Ablation
from safetyheads.heads import Head
from safetyheads.integrations.harness import harness_model, require_harness

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


@contextmanager
def ablated_lm(engine: Engine, heads: Sequence[Head], ablation: Ablation, batch_size: int = 8) -> Iterator[Any]:
    """The engine's model with heads ablated, as an ``lm_eval.models.huggingface.HFLM``; vanilla again after.

    Example:
        >>> with ablated_lm(engine, (Head(2, 26),), UNDIFFERENTIATED_ATTENTION) as lm:
        ...     found = lm_eval.simple_evaluate(model=lm, tasks=["boolq"])
    """
    require_harness()
    with engine.ablated(heads, ablation):
        yield harness_model(engine, batch_size)
