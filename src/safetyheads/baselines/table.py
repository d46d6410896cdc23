"""All baselines by name, in the order of tables. Owns the order; a new method is one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from safetyheads.baselines.act_svd import ACT_SVD, ACT_SVD_ORTHOGONAL
from safetyheads.baselines.base import Method
from safetyheads.baselines.direction import REFUSAL_DIRECTION
from safetyheads.baselines.heads import (
    ATTRIBUTION_PATCHING,
    LOGIT_ATTRIBUTION,
    OUTPUT_NORM,
    RANDOM_HEADS,
    RDSHA,
    SAHARA,
    SHIPS_QUERY,
)
from safetyheads.baselines.layers import LSP
from safetyheads.baselines.neurons import GTAC_DAP
from safetyheads.baselines.parameters import head_parameters as head_parameters
from safetyheads.baselines.pruning import SPARSEGPT, WANDA
from safetyheads.baselines.set_difference import SNIP_DIFFERENCE, WANDA_DIFFERENCE
from safetyheads.errors import InputError

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            SAHARA,
            SHIPS_QUERY,
            RANDOM_HEADS,
            OUTPUT_NORM,
            LOGIT_ATTRIBUTION,
            ATTRIBUTION_PATCHING,
            RDSHA,
            REFUSAL_DIRECTION,
            ACT_SVD,
            ACT_SVD_ORTHOGONAL,
            GTAC_DAP,
            LSP,
            WANDA,
            SPARSEGPT,
            WANDA_DIFFERENCE,
            SNIP_DIFFERENCE,
        )
    }
)
"""Name -> method: ours and the paper's query level, controls and rankings of heads, directions, the paper's Table 1
(ActSVD, GTAC & DAP, LSP), then pruning."""


def method_named(name: str) -> Method:
    """The method of that name; dashes count as underscores.

    Raises:
        InputError: there is none; the message lists the names.
    """
    found = METHODS.get(name.strip().lower().replace("-", "_"))
    if found is None:
        raise InputError(f"unknown baseline {name!r}; known are {', '.join(METHODS)}")
    return found
