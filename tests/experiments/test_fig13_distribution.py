"""Fig 13's curves and tail index: each against its definition, written out."""

import math

import numpy as np
import pytest

from safetyheads.experiments.fig13_distribution import N_GRID, empirical_cdf, gini, kernel_density, top_share

SCORES = np.random.default_rng(3).exponential(2.0, 41)
TIED = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 4.0])


@pytest.mark.parametrize("values", [SCORES, TIED])
def test_cdf_is_the_share_of_heads_with_at_most_a_score(values):
    heights, shares = empirical_cdf(values)
    assert heights.tolist() == sorted(set(values.tolist()))
    assert shares.tolist() == pytest.approx([(values <= height).sum() / len(values) for height in heights])


def test_density_is_the_mean_of_gaussians_around_the_scores():
    places, heights, measured = kernel_density(SCORES)
    # Scott's rule: the sample standard deviation times n to the power -1/5.
    bandwidth = SCORES.std(ddof=1) * len(SCORES) ** (-1 / 5)
    assert measured == pytest.approx(bandwidth)
    for place, height in zip(places, heights, strict=True):
        kernels = np.exp(-(((place - SCORES) / bandwidth) ** 2) / 2)
        assert height == pytest.approx(kernels.mean() / (bandwidth * math.sqrt(2 * math.pi)))
    # Three bandwidths beyond the ends leave at most .0014 of a kernel on each side out.
    assert len(places) == N_GRID
    assert np.trapezoid(heights, places) == pytest.approx(1.0, abs=3e-3)
    for alike in ([], [1.0], [2.0, 2.0, 2.0]):
        assert kernel_density(np.array(alike)) is None


def test_gini_is_half_the_mean_difference_of_two_heads_over_the_mean_for_every_row():
    rows = np.stack([SCORES, SCORES[::-1] * 3, np.ones(41)])
    differences = np.abs(rows[:, :, None] - rows[:, None, :]).mean(axis=(1, 2))
    assert gini(rows).tolist() == pytest.approx((differences / (2 * rows.mean(axis=1))).tolist())
    assert top_share(rows, 2).tolist() == pytest.approx([float(top_share(row, 2)) for row in rows])


def test_indices_by_hand_and_none_of_zeros():
    for values, known in (([1, 1, 1, 1], 0.0), ([0, 0, 0, 1], 0.75), ([0, 1, 0, 1], 0.5)):
        assert float(gini(np.array(values, float))) == pytest.approx(known)
    assert [float(top_share(TIED, k)) for k in (1, 3)] == pytest.approx([4 / 7, 6 / 7])
    assert math.isnan(float(gini(np.zeros(4))))
    assert math.isnan(float(top_share(np.zeros(4), 1)))
