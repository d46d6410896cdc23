"""The study: what it tells of the organism's planted heads, and how a claim is judged."""

from dataclasses import replace

import pytest
from experiment_runs import PLANTED, SMALL, figure_of, points, rows, run_of

from safetyheads.experiments.outcome import Measured
from safetyheads.experiments.study import N_RANDOM, _verdict


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    config = replace(SMALL, datasets=("demo",), limit=12, judges=("phrases",), size=5)
    return run_of(config, ["study"], tmp_path_factory.mktemp("study") / "run")["study"]


def test_planted_heads_lead_and_every_score_has_their_ranks(outcome):
    best = rows(outcome)[:3]
    assert {row["head"] for row in best} <= PLANTED["aligned_a"]
    assert all(row["asr"]["value"] >= row["coherent"]["value"] for row in rows(outcome))
    ranks = [key for key in best[0] if key.endswith("_rank")]
    assert len(ranks) == 4
    assert max(row["mean_ships_rank"] for row in best) <= 3
    marked = {point["panel"] for point in points(figure_of(outcome, "heads"))}
    assert marked == {"ASR", "coherent ASR", "nonsense"}
    assert len(points(figure_of(outcome, "heads"), panel="ASR")) == 32
    names = [row["score"] for row in rows(outcome, 1)]
    assert (len(names), names[-1]) == (5, "split half")


def test_groups_grow_beside_random_ones_and_the_best_pair(outcome):
    groups = rows(outcome, 2, way="mean Ships")
    assert [row["size"] for row in groups] == [1, 2, 3, 4, 5]
    (unablated,) = rows(outcome, 2, way="unablated")
    (random,) = rows(outcome, 2, way="random")
    (alone,) = rows(outcome, 2, way="every head")
    (chosen,) = rows(outcome, 2, way="best pair, chosen on other prompts")
    assert (random["asr"]["n"], alone["asr"]["n"], chosen["asr"]["n"]) == (N_RANDOM, 32, unablated["asr"]["n"])
    assert unablated["asr"]["value"] <= random["asr"]["value"] < groups[2]["asr"]["value"]
    (hindsight,) = rows(outcome, 2, way="best pair, with hindsight")
    assert hindsight["coherent"]["value"] >= max(row["coherent"]["value"] for row in groups[:2]) - 1e-9
    for row in rows(outcome, 2):
        if "nonsense" in row and row["way"] != "random":
            assert row["coherent"]["value"] + row["nonsense"]["value"] <= 1
    # The figure is the table.
    for point, row in zip(points(figure_of(outcome, "lines"), series="ASR"), [unablated, *groups], strict=True):
        assert point["y"] == row["asr"]["value"]


@pytest.mark.parametrize(
    ("ends", "above", "below", "verdict"),
    [
        ((0.4, 0.6), 0.3, None, "agrees"),
        ((0.2, 0.6), 0.3, None, "cannot say here"),
        ((0.1, 0.2), 0.3, None, "does not"),
        ((0.1, 0.2), None, 0.3, "agrees"),
        ((0.1, 0.4), None, 0.3, "cannot say here"),
        ((0.4, 0.5), None, 0.3, "does not"),
        ((None, None), 0.0, None, "cannot say here"),
    ],
)
def test_a_verdict_needs_the_whole_interval(ends, above, below, verdict):
    assert _verdict(Measured(0.3, 9, *ends), above, below) == verdict
