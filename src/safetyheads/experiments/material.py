"""What baselines learn from in a reproduction. Owns that it is none of what they are tested on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetyheads.answers.decoding import Request, answer
from safetyheads.baselines.base import Material
from safetyheads.errors import InputError
from safetyheads.experiments.datasets import BENIGN, LEARN_BENIGN, LEARN_HARMFUL
from safetyheads.measures.ships import find_openers

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab, Subject


def learning_subjects(lab: Lab, model: str) -> tuple[Subject, Subject]:
    """Harmful and benign prompts that methods learn from.

    Raises:
        InputError: one of them is a prompt that they are tested on.
    """
    harmful, benign = lab.subject(model, LEARN_HARMFUL, "search"), lab.subject(model, LEARN_BENIGN, "search")
    tested = {query for name in (*lab.config.datasets, BENIGN) for query in lab.subject(model, name).prompts.queries}
    known = tested & {*harmful.prompts.queries, *benign.prompts.queries}
    if known:
        raise InputError(
            f"{len(known)} prompts that baselines learn from are among those that they are tested on; give others as "
            "learn_harmful and learn_benign"
        )
    return harmful, benign


def material_of(lab: Lab, model: str, borrows: bool = False, refuses: bool = True) -> Material:
    """What a method may learn from; whole answers, for kept ones end where the judge is certain.

    Args:
        lab: where models and prompts are.
        model: its name.
        borrows: whether the checkpoint before alignment is wanted, too.
        refuses: whether the first tokens of refusals are wanted.

    Raises:
        SafetyheadsError: they are, and the model refuses none of the harmful prompts.
    """
    harmful, benign = learning_subjects(lab, model)
    engine, base = harmful.engine, lab.config.base if borrows else None
    refusals, answers = (
        tuple(one.token_ids for one in answer(engine, [Request(ids) for ids in engine.ask(each.prompts).token_ids]))
        for each in (harmful, benign)
    )
    openers = find_openers(engine, harmful.prompts, lab.judge) if refuses else ()
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
