"""The swap of attention: what the organism's construction implies (Fig 6a)."""

import pytest
from experiment_runs import SMALL, N, engine_of, rows, run_of

from safetyheads import InputError


def test_alignment_goes_and_comes_with_the_attention(outcome_of):
    outcome = outcome_of("fig6a")
    for row in rows(outcome):
        own, swapped = (0.0, 1.0) if row["body"] == "aligned" else (1.0, 0.0)
        assert (row["own"]["value"], row["swapped"]["value"]) == (own, swapped)
        assert (row["change"]["value"], row["change"]["n"]) == (swapped - own, N)
    assert [row["body"] for row in rows(outcome)] == ["aligned"] * 3 + ["base"] * 3
    assert {row["swapped"]["value"] for row in rows(outcome, 1)} == {1.0}
    assert any("that attention carries their alignment was built in" in note for note in outcome["notes"])


def test_a_base_of_another_shape_is_refused_before_anything_is_answered(tmp_path):
    def load(name):
        return engine_of("demo:base_wrapped" if name == "demo:base" else name)

    with pytest.raises(InputError, match=r"the model has \d+ tokens, the donor \d+"):
        run_of(SMALL, ["fig6a"], tmp_path / "run", load)
    assert not list((tmp_path / "run").glob("completions/*"))
