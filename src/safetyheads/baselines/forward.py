"""Plain forward passes of the baselines over packed prompts. Owns which states they read; knows no method.

Activation hooks of others act inside as they do anywhere: a pass is the model's own forward, nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import SCALING_CONTRIBUTION
from safetyheads.errors import UnsupportedModelError
from safetyheads.model.attention import AttentionCall
from safetyheads.model.planning import PackedRow, TokenSequence, pack
from safetyheads.model.replay import wanted_states

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet


def sequences_of(engine: Engine, prompts: PromptSet, n_wanted: int = 1) -> tuple[TokenSequence, ...]:
    """The prompts under their template, whose last ``n_wanted`` tokens are looked at."""
    return tuple(TokenSequence(token_ids, n_wanted) for token_ids in engine.ask(prompts).token_ids)


def rows_of(engine: Engine, sequences: Sequence[TokenSequence]) -> Iterator[PackedRow]:
    """The sequences in packed rows that fit the memory, in their order; where packing is not exact, one a row."""
    engine.prove_up_to(max(len(sequence.token_ids) for sequence in sequences))
    for members in engine.plan(sequences).rows:
        yield pack(sequences, members, engine.device)


@torch.inference_mode()
def states_of(engine: Engine, row: PackedRow) -> Tensor:
    """One run over a packed row: the wanted tokens' last states [n_wanted, d_model], before the final norm.

    Raises:
        SafetyheadsError: heads are ablated at the moment.
    """
    segments = row.segments if engine.capabilities.segments and len(row.members) > 1 else None
    call = AttentionCall(segments=segments)
    calls = dict.fromkeys(engine.architecture.with_heads, call) if segments is not None else {}
    with engine.ablated_rows([()], SCALING_CONTRIBUTION):
        return wanted_states(engine.architecture, row, calls, 1)[0]


def last_states(engine: Engine, sequences: Sequence[TokenSequence]) -> Tensor:
    """Last states [n_wanted of all, d_model] before the final norm, in the order of the sequences."""
    return torch.cat([states_of(engine, row) for row in rows_of(engine, sequences)])


def refuse_streams(engine: Engine) -> None:
    """Refuse families with several residual streams, in which a direction of the stream has no one meaning.

    Raises:
        UnsupportedModelError: the family is such a one.
    """
    if engine.architecture.batch_dimension != 0:
        raise UnsupportedModelError(
            f"{engine.architecture.family}: it keeps several residual streams, so there is no one stream for a "
            "direction to be in"
        )
