"""Fig 13's curves and tail index: each against its definition, written out."""

import math

import numpy as np
import pytest

from safetyheads.experiments.fig13 import N_GRID, empirical_cdf, gini, kernel_density, top_share

SCORES = np.random.default_rng(3).exponential(2.0, 41)
TIED = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 4.0])


@pytest.mark.parametrize("values", [SCORES, TIED])
def test_cdf_is_the_share_of_heads_with_at_most_a_score(values):
    heights, shares = empirical_cdf(values)
    assert heights.tolist() == sorted(set(values.tolist()))
    assert shares.tolist() == pytest.approx([sum(one <= at for one in values) / len(values) for at in heights])
    assert shares[-1] == 1.0


def test_density_is_the_mean_of_gaussians_around_the_scores():
    density = kernel_density(SCORES)
    # Scott's rule: the sample standard deviation times n to the power -1/5.
    bandwidth = SCORES.std(ddof=1) * len(SCORES) ** (-1 / 5)
    assert density.bandwidth == pytest.approx(bandwidth)
    for at, height in zip(density.at, density.height, strict=True):
        kernels = [math.exp(-(((at - one) / bandwidth) ** 2) / 2) for one in SCORES]
        assert height == pytest.approx(sum(kernels) / (len(SCORES) * bandwidth * math.sqrt(2 * math.pi)))
    # Three bandwidths beyond the ends leave at most .0014 of a kernel on each side out.
    assert len(density.at) == N_GRID
    assert np.trapezoid(density.height, density.at) == pytest.approx(1.0, abs=3e-3)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]])
def test_scores_that_are_all_one_have_no_density(values):
    assert kernel_density(np.array(values)) is None


def test_gini_is_half_the_mean_difference_of_two_heads_over_the_mean():
    for values in (SCORES, TIED):
        differences = [abs(one - other) for one in values for other in values]
        assert float(gini(values)) == pytest.approx(np.mean(differences) / (2 * np.mean(values)))


@pytest.mark.parametrize(("values", "known"), [([1, 1, 1, 1], 0.0), ([0, 0, 0, 1], 0.75), ([0, 1, 0, 1], 0.5)])
def test_gini_of_scores_worked_out_by_hand(values, known):
    assert float(gini(np.array(values, float))) == pytest.approx(known)


def test_gini_and_share_take_every_row_by_itself():
    rows = np.stack([SCORES, SCORES[::-1] * 3, np.ones(41)])
    assert gini(rows).tolist() == pytest.approx([float(gini(row)) for row in rows])
    assert top_share(rows, 2).tolist() == pytest.approx([float(top_share(row, 2)) for row in rows])


def test_share_of_the_highest_scores():
    assert float(top_share(TIED, 1)) == pytest.approx(4 / 7)
    assert float(top_share(TIED, 3)) == pytest.approx(6 / 7)


def test_scores_of_zero_have_no_tail():
    assert math.isnan(float(gini(np.zeros(4))))
    assert math.isnan(float(top_share(np.zeros(4), 1)))
