"""What baselines learn from in a reproduction. Owns that it is none of what they are tested on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetyheads.baselines.base import Material
from safetyheads.experiments.datasets import LEARN_BENIGN, LEARN_HARMFUL
from safetyheads.generation import Request, answer
from safetyheads.refusal import openers_or_raise

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab, Subject


def learning_subjects(lab: Lab, model: str) -> tuple[Subject, Subject]:
    """Harmful and benign prompts that methods learn from."""
    return lab.subject(model, LEARN_HARMFUL, "search"), lab.subject(model, LEARN_BENIGN, "search")


def material_of(lab: Lab, model: str) -> Material:
    """What a method may learn from; whole answers, for kept ones end where the judge is certain.

    Raises:
        SafetyheadsError: the model refuses none of the harmful prompts.
    """
    harmful, benign = learning_subjects(lab, model)
    engine, base = harmful.engine, lab.config.base
    refusals, answers = (
        tuple(one.token_ids for one in answer(engine, [Request(ids) for ids in engine.encode(each.prompts)]))
        for each in (harmful, benign)
    )
    openers = openers_or_raise(engine, harmful.prompts, lab.judge)
    return Material(
        engine,
        harmful.prompts,
        benign.prompts,
        refusals,
        answers,
        tuple(opener.token_id for opener in openers),
        None if base is None else lab.engine(base),
        lab.config.seed,
    )
