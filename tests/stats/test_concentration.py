"""The concentration: a case by hand, the slow twin, and where there is nothing to measure."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_results import findings, outcome

from safetyheads.errors import InputError
from safetyheads.runs.results import results_of
from safetyheads.scores import HeadScores
from safetyheads.stats.concentration import (
    RANDOM,
    VANILLA,
    SizeOutcome,
    bootstrap_interval,
    concentration,
    concentration_of,
)
from safetyheads.stats.intervals import N_RESAMPLES, mean_with_interval


def drawn(n_sizes, n_random, n_prompts, seed=0):
    generator = np.random.default_rng(seed)
    groups = generator.random((n_sizes, n_prompts)) < 0.7
    return groups, generator.random((n_sizes, n_random, n_prompts)) < 0.2


def slow_value(groups, random, chosen):
    """The definition, in loops, over the prompts ``chosen``."""
    gaps = []
    for size in range(len(groups)):
        asr = sum(bool(groups[size][prompt]) for prompt in chosen) / len(chosen)
        others = [sum(bool(one[prompt]) for prompt in chosen) / len(chosen) for one in random[size]]
        gaps.append(asr - sum(others) / len(others))
    return sum(gaps) / len(gaps)


def test_a_case_worked_out_by_hand():
    # ASR of the groups 2/4 and 3/4; of random ones (1/4 + 0)/2 and (1/4 + 1/4)/2: gaps 3/8 and 1/2.
    groups = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    random = np.array([[[1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [1, 0, 0, 0]]], dtype=bool)
    found = concentration(groups, random)
    assert found.value == pytest.approx(7 / 16, abs=1e-15)
    assert (found.n, found.sizes, found.n_random, found.against) == (4, (1, 2), 2, RANDOM)
    low, high = found.interval
    assert -1 <= low < found.value < high <= 1


def test_the_quick_path_is_the_slow_one():
    # Same draws of prompts, so all that may differ is the order of sums of some dozens of terms.
    groups, random = drawn(3, 4, 17)
    n = groups.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)[:2000]
    drawn_prompts = [np.repeat(range(n), row).tolist() for row in counts]
    means = sorted(slow_value(groups, random, row) for row in drawn_prompts)
    found = concentration(groups, random)
    assert found.value == pytest.approx(slow_value(groups, random, range(n)), abs=1e-12)
    # Of the first 2000 draws: quantiles differ by a few in a hundred of the width, 0.3.
    assert found.interval == pytest.approx((means[49], means[1949]), abs=0.02)


def test_the_interval_holds_its_level(monkeypatch):
    monkeypatch.setattr("safetyheads.stats.intervals.N_RESAMPLES", 1000)
    # 300 made-up runs of 40 prompts whose true concentration is .5; a percentile bootstrap of n 40 covers about 93 %.
    covered = 0
    for seed in range(300):
        groups, random = drawn(2, 3, 40, seed + 1)
        low, high = concentration(groups, random).interval
        covered += low <= 0.5 <= high
    assert covered / 300 > 0.89


def test_it_is_as_wide_as_students_where_that_is_right():
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values)
    student = mean_with_interval(values.tolist()).interval
    assert (low, high) == pytest.approx(student, abs=0.003)


@pytest.mark.parametrize(("group", "random", "value"), [(True, False, 1.0), (False, True, -1.0), (True, True, 0.0)])
def test_equal_prompts_give_no_false_certainty(group, random, value):
    n = 48
    found = concentration(np.full((2, n), group), np.full((2, 3, n), random))
    missed = 1 - 0.025 ** (1 / n)
    assert found.value == value
    assert found.interval == pytest.approx((value - missed * (value + 1), value + missed * (1 - value)))


def test_without_random_groups_it_is_against_the_unablated_model():
    found = concentration(
        np.array([[1, 1, 0, 1]], dtype=bool), np.zeros((1, 0, 4), dtype=bool), vanilla=[True, False, False, False]
    )
    assert (found.value, found.n_random, found.against) == (0.5, 0, VANILLA)
    with pytest.raises(InputError, match="unablated"):
        concentration(np.ones((1, 4), dtype=bool), np.zeros((1, 0, 4), dtype=bool))


def test_nothing_is_none():
    for shape in ((2, 3, 0), (0, 3, 4)):
        found = concentration(np.zeros((shape[0], shape[2]), dtype=bool), np.zeros(shape, dtype=bool))
        assert (found.value, found.interval, found.n) == (None, None, shape[2])
        json.dumps(asdict(found), allow_nan=False)
    one = concentration(np.ones((1, 1), dtype=bool), np.zeros((1, 1, 1), dtype=bool))
    assert (one.value, one.interval) == (1.0, None)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        concentration(np.ones((2, 4), dtype=bool), np.ones((3, 2, 4), dtype=bool))
    with pytest.raises(InputError, match="sizes"):
        concentration(np.ones((2, 4), dtype=bool), np.ones((2, 2, 4), dtype=bool), sizes=(1,))


def test_a_size_without_random_groups_is_left_out():
    outcomes = [SizeOutcome(1, [True, False], [[False, False]]), SizeOutcome(2, [True, True], [])]
    found = concentration_of(outcomes, [False, False])
    assert (found.value, found.sizes, found.n_random) == (0.5, (1,), 1)


ABOUT = {"model": {"n_layers": 4, "n_heads": 8}}


def test_an_audit_writes_it_from_the_lead_search_alone():
    made = findings(
        outcome(1, freed=20, random=(0, 10)),
        outcome(2, freed=40, random=(5, 5)),
        outcome(1, freed=50, random=(0, 0), scorer="generalized_ships_prompt"),
    )
    lead = HeadScores(torch.zeros(4, 8, dtype=torch.float64), "mean_ships", "nats", 0.0)
    data = SimpleNamespace(sets=lambda: {"harmful_search": range(50)})
    made = replace(made, data=data, scores={"mean_ships": lead}, traces={}, heads=(), openers=())
    found = results_of(made, ABOUT, None, (), ())["concentration"]
    # (20/50 - 5/50 + 40/50 - 5/50) / 2
    assert found["value"] == pytest.approx(0.5)
    assert (found["n"], list(found["sizes"]), found["n_random"], found["against"]) == (50, [1, 2], 2, RANDOM)
    assert all(map(math.isfinite, found["interval"]))
    json.dumps(found, allow_nan=False)
