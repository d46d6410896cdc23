"""Other methods that undo refusals, for comparison: they name heads, prune or edit weights, or steer activations.

Each is a :class:`safetyheads.baselines.base.Method`; :data:`METHODS` lists them in the order of tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from safetyheads.baselines.act_svd import ACT_SVD, ACT_SVD_ORTHOGONAL
from safetyheads.baselines.base import Method
from safetyheads.baselines.direction import REFUSAL_DIRECTION
from safetyheads.baselines.heads import LOGIT_ATTRIBUTION, RANDOM_HEADS, RDSHA, SAHARA, SHIPS_QUERY
from safetyheads.baselines.layers import LSP
from safetyheads.baselines.neurons import GTAC_DAP
from safetyheads.baselines.pruning import SNIP_DIFFERENCE, SPARSEGPT, WANDA, WANDA_DIFFERENCE

_HEADS = (SAHARA, SHIPS_QUERY, RANDOM_HEADS, LOGIT_ATTRIBUTION, RDSHA)
_PAPERS_TABLE_1 = (ACT_SVD, ACT_SVD_ORTHOGONAL, GTAC_DAP, LSP)
_PRUNING = (WANDA, SPARSEGPT, WANDA_DIFFERENCE, SNIP_DIFFERENCE)

METHODS: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in (*_HEADS, REFUSAL_DIRECTION, *_PAPERS_TABLE_1, *_PRUNING)}
)
"""Name -> method. A new method is one line here."""
