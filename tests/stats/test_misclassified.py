"""Corrected rates: by hand, at the edges, and whether their intervals cover."""

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.stats import misclassified
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


@pytest.mark.parametrize(("se", "sp", "n_labels"), [(0.9, 0.95, 30), (0.97, 0.97, 100), (0.7, 0.8, 50)])
def test_rogan_gladens_interval_covers(se, sp, n_labels):
    random = np.random.default_rng(1)
    for n in (24, 100):
        for p in (0.02, 0.5, 0.9):
            covered = 0
            for _ in range(250):
                seen = verdicts(random.binomial(n, p * se + (1 - p) * (1 - sp)), n)
                labels = (Rate(int(random.binomial(n_labels, share)), n_labels) for share in (se, sp))
                interval = rogan_gladen(seen, Accuracy(*labels)).interval
                covered += interval is None or interval[0] <= p <= interval[1]
            # .93 less two standard errors of 250 draws.
            assert covered / 250 > 0.9, (n, p)


@pytest.mark.parametrize(("se", "sp", "share"), [(0.9, 0.95, 0.4), (0.7, 0.8, 0.6)])
def test_the_prediction_powered_interval_covers(se, sp, share, monkeypatch):
    monkeypatch.setattr(misclassified, "N_DRAWS", 1000)
    random, n = np.random.default_rng(1), 100
    for p in (0.02, 0.5):
        covered = 0
        for _ in range(250):
            truth = (random.random(n) < p).astype(float)
            judged = (random.random(n) < np.where(truth == 1, se, 1 - sp)).astype(float)
            low, high = prediction_powered(judged, np.where(random.random(n) < share, truth, NAN)).interval
            covered += low <= p <= high
        assert covered / 250 > 0.9, p


def test_corrected_intervals_cover_with_several_answers_to_a_prompt(monkeypatch):
    # Five answers to each of 50 prompts, correlation .5: taken for independent, intervals cover about .8.
    monkeypatch.setattr(misclassified, "N_DRAWS", 500)
    random, n, p, se, sp, covered = np.random.default_rng(2), 50, 0.3, 0.9, 0.95, np.zeros(4)
    for _ in range(200):
        own = random.beta(p, 1 - p, (n, 1))
        truth = (random.random((n, 5)) < own).astype(float)
        judged = (random.random((n, 5)) < np.where(truth == 1, se, 1 - sp)).astype(float)
        labelled = np.where(random.random((n, 5)) < 0.4, truth, NAN)
        accuracy = Accuracy(*(Rate(int(random.binomial(200, share)), 200) for share in (se, sp)))
        flat = judged.ravel(), labelled.ravel()
        found = [rogan_gladen(judged, accuracy), prediction_powered(judged, labelled)]
        found += [rogan_gladen(flat[0], accuracy), prediction_powered(*flat)]
        covered += [corrected.interval[0] <= p <= corrected.interval[1] for corrected in found]
    assert (covered[:2] / 200 >= 0.92).all()
    assert (covered[2:] / 200 < 0.87).all()
    assert found[0].rate == pytest.approx(found[2].rate)
    # Near-duplicates are joined alike.
    fives = rogan_gladen(verdicts(25, 50), accuracy, [at // 5 for at in range(50)])
    assert np.ptp(fives.interval) > 1.5 * np.ptp(rogan_gladen(verdicts(25, 50), accuracy).interval)
