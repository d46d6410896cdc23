"""Utility of the organism by heads and by sparsity (Fig 6b)."""

from dataclasses import replace

import pytest
from experiment_runs import SMALL, run_of

from safetyheads.baselines import METHODS
from safetyheads.experiments import fig6b_utility as fig6b


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fig6b, "MEANS", ("mean_query",))
        few = {name: replace(METHODS[name], strengths=(0.25, 0.5)) for name in fig6b.PRUNERS}
        patched.setattr(fig6b, "METHODS", few)
        return run_of(replace(SMALL, size=2), ["fig6b"], tmp_path_factory.mktemp("fig6b") / "run")["fig6b"]


def test_utility_stands_by_heads_and_by_sparsity(outcome):
    by_heads, by_sparsity = outcome["figures"]
    assert {row["series"] for row in by_heads["points"]} == {"UA", "SC", "mean query"}
    assert {row["x"] for row in by_heads["points"]} == {0, 1, 2}
    places = {(row["series"], row["x"]) for row in by_sparsity["points"]}
    assert places == {(method, sparsity) for method in ("Wanda", "SparseGPT") for sparsity in (0, 0.25, 0.5)}
    assert len({row["y"] for row in by_heads["points"] if row["x"] == 0}) == 1
    assert all(row["n"] == 8 for row in by_heads["points"])
    shown = {row["variant"] for row in outcome["tables"][0]["rows"]}
    assert shown == {"vanilla", "UA, 2 heads", "SC, 2 heads", "mean query, 2 heads", "Wanda, 50%", "SparseGPT, 50%"}
