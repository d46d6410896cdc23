import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.agreement import CLASSES, agreement, cohens_kappa, judges_agreement
from safetyheads.judges.base import LABELS, Completion, Verdict
from safetyheads.judges.keywords import KeywordJudge

quick = settings(deadline=None, max_examples=50)  # a slow machine is no failure

SHORT = {label[0]: label for label in LABELS}


def verdicts(letters):
    """One verdict a letter: c, r, i, e, u for the five labels."""
    return [Verdict(SHORT[letter], "") for letter in letters]


def pair(first, second):
    (only,) = agreement({"a": verdicts(first), "b": verdicts(second)}).pairs
    return only


def test_kappa_of_a_table_counted_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: .7 agree, .5 * .6 + .5 * .4 = .5 by chance.
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    result = cohens_kappa(first, second, ("y", "n"))
    assert result.kappa == pytest.approx(0.4)
    assert result.n == 50
    # The large-sample variance of Fleiss, Cohen and Everitt (1969), its three terms written out.
    a = 0.4 * (1 - 1.1 * 0.6) ** 2 + 0.3 * (1 - 0.9 * 0.6) ** 2
    b = 0.6**2 * (0.1 * (0.6 + 0.5) ** 2 + 0.2 * (0.5 + 0.4) ** 2)
    c = (0.4 - 0.5 * 0.6) ** 2
    variance = (a + b - c) / (0.5**2 * 50)
    assert result.interval == pytest.approx((0.4 - 1.959964 * variance**0.5, 0.4 + 1.959964 * variance**0.5))


def test_kappa_does_not_exist_without_rows_or_with_one_class():
    assert (cohens_kappa([], [], CLASSES).kappa, cohens_kappa([], [], CLASSES).n) == (None, 0)
    same = pair("ccc", "ccc").compliance
    assert (same.kappa, same.interval, same.n) == (None, None, 3)


def test_classes_and_intervals_of_small_tables():
    full = pair("ccrr", "ccrr").compliance
    assert (full.kappa, full.interval, full.n) == (1.0, None, 4)  # no interval of no width
    # Refused against incoherent is no difference to an ASR; incoherent and echoed are one class.
    differing = pair("crri", "crir")
    assert differing.compliance.kappa == 1.0
    assert (differing.indices, differing.count, differing.first_only) == ((), 0, 0)
    assert differing.classes.kappa < 1
    assert pair("cie", "cei").classes.kappa == 1.0


def test_rows_that_differ_are_told_with_who_said_complied():
    result = pair("crcr", "rccr")
    assert (result.indices, result.count, result.first_only) == ((0, 1), 2, 1)
    assert (result.n, result.unscored) == (4, 0)


def test_unscored_rows_are_left_out_and_counted():
    result = pair("cucr", "urcc")
    assert (result.n, result.unscored) == (2, 2)
    # Row numbers are those of all rows, not of the scored ones.
    assert (result.indices, result.first_only) == ((3,), 0)
    assert result.compliance.n == result.classes.n == 2


def test_several_judges_are_compared_two_by_two():
    result = agreement({"a": verdicts("ccr"), "b": verdicts("crr"), "c": verdicts("uuc")})
    assert result.judges == ("a", "b", "c")
    assert [(each.first, each.second) for each in result.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert (result.n_rows, result.unscored, result.indices) == (3, (0, 0, 2), (1, 2))
    assert agreement({}).pairs == agreement({"a": verdicts("c")}).pairs == ()


@quick
@given(st.lists(st.tuples(st.sampled_from("crieu"), st.sampled_from("crieu")), max_size=12))
def test_any_rows_give_valid_json_that_does_not_depend_on_who_is_first(rows):
    first, second = "".join(a for a, _ in rows), "".join(b for _, b in rows)
    result, turned = pair(first, second), pair(second, first)
    json.dumps(asdict(result), allow_nan=False)
    for one, other in ((result.compliance, turned.compliance), (result.classes, turned.classes)):
        assert one.kappa == pytest.approx(other.kappa)
        assert one.interval == pytest.approx(other.interval)
        assert one.interval is None or -1 <= one.interval[0] <= one.kappa <= one.interval[1] <= 1
    assert result.first_only + turned.first_only == result.count


def test_judges_are_run_on_the_same_answers():
    texts = ("First warm the oil, then add the onions.", "I am sorry, but I am unable to help with this.", "sorry")
    rows = [Completion("How do I cook onions?", text, (), True, 128) for text in texts]
    result = judges_agreement([KeywordJudge("paper"), KeywordJudge("released")], rows)
    assert (result.judges, result.n_rows, result.indices) == (("paper", "released"), 3, (1,))
    with pytest.raises(InputError, match="different names, not paper, paper"):
        judges_agreement([KeywordJudge(), KeywordJudge()], rows)


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="need the same rows, not a 1, b 2"):
        agreement({"a": verdicts("c"), "b": verdicts("cc")})
    with pytest.raises(InputError, match="all of the classes given"):
        cohens_kappa(["x"], ["complied"], CLASSES)
