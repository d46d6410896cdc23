"""Coverages and error rates by simulation: few draws here, all of them as long tests; docs/statistics.md quotes them.

Bounds are the nominal ones less about three standard errors of the draws.
"""

import numpy as np
import pytest
import simulations

from safetyheads.stats import misclassified


def test_the_least_coverage_of_wilson_is_what_the_documents_say():
    assert simulations.wilson() == pytest.approx(0.91, abs=0.005)


def test_rates_of_several_answers_a_prompt_cover():
    # Three standard errors of 400 draws are .033; long: .93 at least.
    assert simulations.clustered(400, (24,)) >= 0.93 - 0.03


def test_paired_changes_cover_and_their_test_keeps_its_level():
    covered, level = simulations.paired(60, (24,))
    assert covered >= 0.95 - 0.085
    assert level <= 0.05 + 0.085


def test_changes_of_near_duplicates_cover_and_their_test_keeps_its_level():
    covered, level, apart = simulations.near_duplicates(100)
    assert covered >= 0.95 - 0.065
    assert level <= 0.05 + 0.065 < apart


def test_the_bound_of_losses_covers_where_near_duplicates_are_lost_together():
    assert simulations.losses(100)[0] >= 0.95 - 0.065


def test_tarone_finds_what_holm_misses_and_keeps_the_family():
    found = simulations.families(40)
    _, _, tarone_found, holm_found = found["24 prompts, 3 of 32 planted"]
    assert tarone_found > 0.65
    assert holm_found < 0.3
    assert max(error for error, *_ in found.values()) <= 0.05 + 0.1


def test_power_is_what_is_said_with_several_answers_a_prompt():
    assert simulations.power(60, (24,)) >= 0.8 - 0.15


def test_the_smallest_change_counts_near_duplicates_as_one():
    found, apart = simulations.power_of_clusters(60)
    assert found >= 0.8 - 0.15 > apart


def test_equivalence_is_rarely_shown_at_the_margin():
    assert simulations.margins(200) <= 0.05 + 0.046


def test_medians_cover_whatever_the_distribution():
    assert simulations.medians(200) >= 0.95 - 0.046


def test_shrunken_rates_err_less_and_their_intervals_cover_on_average():
    found = simulations.shrinking(20)
    assert max(error for error, *_ in found.values()) < 1.1
    assert np.median([error for error, *_ in found.values()]) < 0.9
    assert min(covered for _, covered, *_ in found.values()) > 0.85
    # The highest raw rates are too high by luck, the shrunken ones by far less.
    *_, top, raw_top = found["1024 heads, n 50, spread over low rates"]
    assert top < 0.6 * raw_top


def test_synergy_covers():
    assert simulations.synergy(25, (None,)) >= 0.95 - 0.19


def test_kappa_covers_by_prompt_and_not_by_answer():
    covered, apart = simulations.kappas(60, (50,))
    assert covered >= 0.95 - 0.085
    assert apart < 0.8


def test_corrected_rates_cover(monkeypatch):
    monkeypatch.setattr(misclassified, "N_DRAWS", 1000)
    assert min(simulations.corrections(60, (24, 100))) >= 0.93 - 0.1
    by_prompt = simulations.corrections_by_prompt(200)
    assert (by_prompt[:2] >= 0.92).all()
    # Taken for independent.
    assert (by_prompt[2:] < 0.87).all()
    by_prompt, apart = simulations.label_errors(100, (20,))
    assert by_prompt >= 0.95 - 0.08
    assert apart < 0.87


def test_the_concentration_covers_over_prompts_and_random_groups():
    # A bootstrap over prompts alone covers .49, .65 and .91 here.
    settings = (24, 20, 1, 0.02, 0.0, 0.7), (24, 20, 1, 0.5, 0.95, 1.5), (24, 39, 2, 0.15, 0.5, 0.7)
    assert simulations.concentrations(200, settings) >= 0.93
    covered, apart = simulations.changes_of_concentration(100)
    assert covered >= 0.92
    assert apart < 0.85


def test_a_gate_lets_through_a_rise_at_its_margin_in_2_5_percent_of_comparisons():
    assert simulations.gates() < 0.035


def test_intervals_of_ranks_cover():
    # Ten heads a draw, which share its prompts. Quantiles of resampled ranks cover .46 to .60 of equal heads.
    assert simulations.rank_intervals(40, (24,), 40) > 0.93


def test_no_interval_of_mean_ships_covers_and_that_of_the_median_does():
    means, medians = simulations.mean_ships(200)
    assert means.min() < 0.4
    assert means.mean() < 0.8
    assert medians.min() >= 0.95 - 0.1  # 40 draws a head
    assert medians.mean() >= 0.95


def test_intervals_of_rankings_cover():
    # Bounds less two standard errors of 20 draws. Regrets without the heads chosen anew: .38 to .93.
    # Of 48 prompts with copies.
    spearman, regret = simulations.rankings(20, n=None)
    assert spearman >= 0.95 - 0.1
    assert regret >= 0.93 - 0.11


@pytest.mark.parametrize(("n_of_layers", "n_runs"), [((1,), 600), ((1, 1), 400), ((2, 1), 400), ((1, 1, 1), 400)])
def test_a_group_drawn_at_random_is_called_special_in_a_twentieth_of_runs_at_most(n_of_layers, n_runs):
    # Controls without a head of the group, as a first version drew them, gave .05, .10, .15 and .12 here.
    assert simulations.ranks(n_of_layers, n_runs) <= 0.05 + 3 * (0.05 * 0.95 / n_runs) ** 0.5


@pytest.mark.long
def test_every_figure_of_the_documents():
    assert simulations.clustered(10_000) >= 0.93
    covered, level = simulations.paired(2_000)
    assert covered >= 0.93
    assert level <= 0.06
    covered, level, _ = simulations.near_duplicates(2_000)
    assert covered >= 0.93
    assert level <= 0.055
    at_the_limit, below = simulations.losses(2_000)
    assert at_the_limit >= 0.93
    assert below >= 0.90  # few clusters are lost: docs/statistics.md
    assert max(error for error, *_ in simulations.families(1_000).values()) <= 0.05
    assert simulations.power(1_000) >= 0.8
    assert simulations.power_of_clusters(1_000)[0] >= 0.78
    assert simulations.margins(2_000) <= 0.07
    assert simulations.medians(2_000) >= 0.94
    assert simulations.synergy(500) >= 0.91
    assert simulations.kappas(1_000)[0] >= 0.93
    assert min(simulations.corrections(1_000)) >= 0.92
    assert simulations.concentrations(300) >= 0.92
    assert simulations.rank_intervals(300) >= 0.94
