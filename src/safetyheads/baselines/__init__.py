"""Other methods that undo refusals, for comparison: they name heads, prune or edit weights, or steer activations."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from types import MappingProxyType

from safetyheads.baselines import act_svd, direction, heads, layers, neurons, pruning
from safetyheads.baselines.base import Intervention, Material, Method

_WORDS = tomllib.loads(files(__package__).joinpath("methods.toml").read_text(encoding="utf-8"))
_METHODS: dict[str, tuple[Callable[[Material, Sequence[float]], list[Intervention]], tuple[float, ...]]] = {
    "sahara": (heads.by_sahara, heads.PAPERS_SIZES),
    "ships_query": (heads.by_ships, heads.PAPERS_SIZES),
    "random_heads": (heads.at_random, heads.PAPERS_SIZES),
    "logit_attribution": (heads.by_logit_attribution, heads.PAPERS_SIZES),
    "rdsha": (heads.by_refusal_projection, heads.RDSHA_SIZES),
    "refusal_direction": (direction.interventions, (0.25, 0.5, 0.75, 1.0)),
    "actsvd": (act_svd.interventions, (0.002, 0.01, 0.02, 0.05, 0.1)),
    "actsvd_orthogonal": (partial(act_svd.interventions, orthogonal=True), (0.01, 0.023, 0.05, 0.1, 0.2, 0.4)),
    "gtac_dap": (neurons.interventions, (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)),
    "lsp": (layers.interventions, (3 / 32, 4 / 32, 6 / 32, 8 / 32)),
    "wanda": (partial(pruning.to_sparsity, pruning.wanda), pruning.SPARSITIES),
    "sparsegpt": (partial(pruning.to_sparsity, pruning.sparse_gpt), pruning.SPARSITIES),
    "wanda_difference": (partial(pruning.by_difference, pruning.wanda_scores_of), pruning.SAFETY_SHARES),
    "snip_difference": (partial(pruning.by_difference, pruning.snip_scores_of), pruning.SAFETY_SHARES),
}
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        name: Method(name, strengths=strengths, interventions=interventions, **_WORDS[name])
        for name, (interventions, strengths) in _METHODS.items()
    }
)
"""Name -> method, in the order of tables. A new one is a line above and an entry of methods.toml."""
