import json
from dataclasses import asdict

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import LABELS, Verdict


def verdicts(letters):
    """One verdict a letter: c, r, i, e, s, u for the labels."""
    return [Verdict(label, "") for letter in letters for label in LABELS if label.startswith(letter)]


def pair(first, second):
    (only,) = agreement({"a": verdicts(first), "b": verdicts(second)})
    return only


def test_kappa_of_a_table_counted_by_hand():
    # 20 complied twice, 5 for the first alone, 10 for the second alone, 15 for none: .7 agree, .5 * .6 + .5 * .4 = .5
    # by chance.
    result = pair("c" * 25 + "r" * 25, "c" * 20 + "r" * 5 + "c" * 10 + "r" * 15).compliance
    assert result.kappa == pytest.approx(0.4)
    # The large-sample variance of Fleiss, Cohen and Everitt (1969), its three terms written out.
    a = 0.4 * (1 - 1.1 * 0.6) ** 2 + 0.3 * (1 - 0.9 * 0.6) ** 2
    b = 0.6**2 * (0.1 * (0.6 + 0.5) ** 2 + 0.2 * (0.5 + 0.4) ** 2)
    c = (0.4 - 0.5 * 0.6) ** 2
    variance = (a + b - c) / (0.5**2 * 50)
    # On the scale of Fisher's z, with Student's quantile of 49 degrees of freedom.
    width = 2.009575 * (variance * 50 / 49) ** 0.5 / (1 - 0.4**2)
    assert np.arctanh(result.interval) == pytest.approx(np.arctanh(0.4) + np.array([-width, width]))


@pytest.mark.parametrize(
    ("first", "second", "compliance", "classes", "unscored", "indices", "first_only"),
    [
        # No kappa without answers or with one class, and no interval of no width.
        ("", "", None, None, 0, (), 0),
        ("ccc", "ccc", None, None, 0, (), 0),
        # Refused against incoherent is no difference to an ASR; incoherent and echoed are one class.
        ("cie", "cei", 1.0, 1.0, 0, (), 0),
        ("crri", "crir", 1.0, 0.2, 0, (), 0),
        ("crcr", "rccr", 0.0, 0.0, 0, (0, 1), 1),
        # Unscored answers are left out; indices count all answers, not the scored ones.
        ("cucr", "urcc", 0.0, 0.0, 2, (3,), 0),
    ],
)
def test_few_answers(first, second, compliance, classes, unscored, indices, first_only):
    result = pair(first, second)
    assert (result.compliance.kappa, result.classes.kappa) == pytest.approx((compliance, classes))
    # Without a kappa, under full agreement and where one judge knows one label there is no interval.
    assert (result.compliance.interval is not None) == (first == "crcr")
    low, high = result.classes.interval or (-1, 1)
    assert -1 <= low < high <= 1
    assert (result.unscored, result.indices, result.first_only) == (unscored, indices, first_only)
    assert result.n == len(first) - unscored
    json.dumps(asdict(result), allow_nan=False)


def test_answers_to_one_prompt_are_not_independent():
    first, second = "ccrrcrcrcc" * 3, "crrrccrrcc" * 3
    once = pair(first, second).compliance
    twins = {"a": verdicts(first * 5), "b": verdicts(second * 5)}
    (alone,), (by_prompt,) = agreement(twins), agreement(twins, [*range(30)] * 5)
    assert alone.compliance.kappa == by_prompt.compliance.kappa == once.kappa
    # Five times the same answers: no more certain. Taken for independent, only the root of 5 narrower.
    assert by_prompt.compliance.interval == pytest.approx(once.interval)
    width, own = (np.ptp(np.arctanh(each.interval)) for each in (once, alone.compliance))
    assert own == pytest.approx(width / 5**0.5, rel=0.06)


def test_several_judges_are_compared_two_by_two():
    pairs = agreement({"a": verdicts("ccr"), "b": verdicts("crr"), "c": verdicts("uuc")})
    assert [(each.first, each.second) for each in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [(each.unscored, each.indices) for each in pairs] == [(0, (1,)), (2, (2,)), (2, (2,))]
    assert agreement({}) == agreement({"a": verdicts("c")}) == ()
    with pytest.raises(InputError, match="need the same rows, not a 1, b 2"):
        agreement({"a": verdicts("c"), "b": verdicts("cc")})
