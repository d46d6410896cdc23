"""Corrected rates: by hand and at the edges; bench/simulations.py has the coverage of their intervals."""

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.stats.intervals import Rate
from safetyheads.stats.misclassified import Accuracy, accuracy_of, prediction_powered, rogan_gladen

NAN = np.nan


def verdicts(count, n):
    """Verdicts on n answers, of which so many complied."""
    return np.array([at < count for at in range(n)], float)


def test_accuracy_by_hand():
    judged, truth = np.array([1, 1, 0, 0, NAN, 1.0]), np.array([1, 0, 0, 1, 1, 1.0])
    found = accuracy_of(judged, truth)
    assert (found.sensitivity.count, found.sensitivity.n, found.sensitivity.unscored) == (2, 3, 1)
    assert (found.specificity.count, found.specificity.n, found.n) == (1, 2, 5)
    with pytest.raises(InputError, match="6 verdicts for 5 labels"):
        accuracy_of(judged, truth[:5])


def test_rogan_gladen_by_hand_and_where_there_is_none():
    accuracy = Accuracy(Rate(90, 100), Rate(80, 100))
    # 34 of 100 are seen: 20 % of the 80 that did not comply, and 90 % of the 20 that did.
    found = rogan_gladen(verdicts(34, 100), accuracy)
    assert found.rate == pytest.approx(0.2)
    assert found.interval[0] < 0.2 < found.interval[1]
    assert found.n_labelled == 200
    # Fewer than the judge's own false alarms: cut at 0, never below.
    none = rogan_gladen(verdicts(10, 100), accuracy)
    assert (none.rate, none.interval[0]) == (0.0, 0.0)
    # The labels' own uncertainty is carried through: a tenth of them gives a wider interval.
    few = rogan_gladen(verdicts(34, 100), Accuracy(Rate(9, 10), Rate(8, 10)))
    assert np.ptp(few.interval) > 1.2 * np.ptp(found.interval)
    assert (
        rogan_gladen(verdicts(34, 100), Accuracy(Rate(5, 10), Rate(5, 10))).how == "the judge is no better than chance"
    )
    assert rogan_gladen(verdicts(34, 100), Accuracy(Rate(0, 0), Rate(5, 10))).rate is None
    assert rogan_gladen(np.array([NAN]), accuracy).how == "nothing scored"


def test_prediction_powered_by_hand():
    judged = np.array([1.0] * 60 + [0.0] * 40 + [NAN])
    truth = np.full(101, NAN)
    truth[:10] = [1] * 8 + [0] * 2
    truth[60:70] = [1] + [0] * 9
    truth[100] = 1
    found = prediction_powered(judged, truth)
    assert found.rate == pytest.approx(0.6 * 0.8 + 0.4 * 0.1)
    assert found.n_labelled == 20
    assert found.interval[0] < found.rate < found.interval[1]
    assert prediction_powered(judged, np.full(101, NAN)).rate is None
    assert prediction_powered(judged, truth) == found  # drawn with a fixed seed


def test_near_duplicates_are_worth_fewer_answers():
    accuracy = Accuracy(Rate(180, 200), Rate(190, 200))
    fives = rogan_gladen(verdicts(25, 50), accuracy, [at // 5 for at in range(50)])
    assert np.ptp(fives.interval) > 1.5 * np.ptp(rogan_gladen(verdicts(25, 50), accuracy).interval)


def test_labelled_answers_to_one_prompt_are_worth_fewer():
    right = np.repeat([1.0, 1, 1, 0, 1, 1, 1, 0], 5)
    truth, prompts = np.repeat([1.0, 0], 20), [at // 5 for at in range(40)]
    judged = np.where(right == 1, truth, 1 - truth)
    alone, together = accuracy_of(judged, truth), accuracy_of(judged, truth, prompts)
    assert alone.worth == (20, 20)
    # All five of a prompt are right or wrong: four prompts a side.
    assert together.worth == pytest.approx((4, 4))
    assert together.sensitivity.rate == together.specificity.rate == alone.sensitivity.rate == 0.75
    for wide, narrow in ((together.sensitivity, alone.sensitivity), (together.specificity, alone.specificity)):
        assert np.ptp(wide.interval) > 1.5 * np.ptp(narrow.interval)
    seen = verdicts(34, 100)
    assert np.ptp(rogan_gladen(seen, together).interval) > 1.4 * np.ptp(rogan_gladen(seen, alone).interval)
