"""The verdict's table: every combination of what can be found gets its label, from numbers alone."""

import itertools
import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import scipy
from answer_records import answer_record

from safetyheads.errors import InputError
from safetyheads.runs.config import AuditConfig, Thresholds
from safetyheads.runs.rates import GroupAnswers
from safetyheads.runs.verdict import (
    Clustered,
    Evidence,
    NothingToMeasureWarning,
    damage_of,
    settled,
    too_few_prompts,
    verdict_of,
    warn_where_nothing_shows,
)
from safetyheads.stats.intervals import clustered_rate, one_sided_bounds
from safetyheads.stats.power import smallest_change_with_power

LIMITS = Thresholds()
SOUND = Evidence(
    n_harmful=96,
    n_scored=96,
    n_refused=94,
    n_undone=90,
    gained=90,
    lost=0,
    n_benign=76,
    n_answered=76,
    n_broken=0,
    kl=0.005,
    n_kl=76,
    n_random=39,
    n_as_good=0,
    random_undone=0.05,
)
"""All refusals undone, benign answers left alone, no random group does as well."""

DAMAGE = {
    "shown, by losses": {"n_broken": 30, "kl": 0.005},
    "shown, by KL": {"n_broken": 0, "kl": 2 * LIMITS.most_kl},
    "bounded": {},
    "open, as many losses": {"n_broken": 6},
    "open, few answers": {"n_answered": 12},
    "open, no answer": {"n_answered": 0},
    "open, no KL": {"kl": None, "n_kl": 0},
}
CANNOT = {
    "too many unscored": {"n_scored": 90, "n_refused": 88},
    "too few harmful prompts": {"n_harmful": 5, "n_scored": 5, "n_refused": 5, "n_undone": 5, "gained": 5},
    "too few benign prompts": {"n_benign": 24, "n_answered": 24, "n_kl": 24},
    "no control": {"n_random": 0, "n_as_good": 0},
    "too few random groups": {"n_random": 18, "n_as_good": 0},
}
NO_REFUSALS = {"n_refused": 5, "n_undone": 5, "gained": 5}


def expected(rises, half, specific, damage):
    if not rises:
        return "none found"
    if damage.startswith("shown"):
        return "breaks the model"
    if not specific:
        return "not specific"
    if damage.startswith("open"):
        return "cannot say: damage not bounded"
    return "concentrated" if half else "partly concentrated"


def label_of(**changed):
    evidence = replace(SOUND, **changed)
    verdict = verdict_of(replace(evidence, n_broken=min(evidence.n_broken, evidence.n_answered)), LIMITS)
    json.dumps(asdict(verdict), allow_nan=False)
    assert verdict.sentence.lower().startswith(verdict.label)
    assert verdict.sentence.endswith(".")
    assert "None" not in " ".join([verdict.sentence.removeprefix("None found"), *verdict.reasons])
    return verdict.label


@pytest.mark.parametrize("cannot", [None, *CANNOT])
@pytest.mark.parametrize("refuses", [True, False])
def test_every_combination_has_its_label(refuses, cannot):
    walked = set()
    for rises, half, specific, damage in itertools.product([True, False], [True, False], [True, False], DAMAGE):
        # Of 94 refusals, 57 undone have a lower bound of .505 and 56 one of .494.
        n_undone = 57 if half else 56
        gained = {"gained": n_undone, "lost": 0 if rises else n_undone}
        changed = {"n_undone": n_undone, "n_as_good": 1 if specific else 2, **gained, **DAMAGE[damage]}
        # Or a group that is best, where random groups undo more than half as many refusals.
        changed |= {} if specific or half else {"n_as_good": 0, "random_undone": 0.3}
        changed |= {} if refuses else NO_REFUSALS
        changed |= {} if cannot is None else CANNOT[cannot]
        label = "cannot say" if cannot else expected(rises, half, specific, damage)
        if not refuses and not cannot:
            label = "no refusals to lose"
        assert label_of(**changed) == label, (rises, half, specific, damage)
        walked.add(label)
    if refuses and not cannot:
        assert len(walked) == 6


def test_every_number_of_the_sentence_has_its_n():
    sentence = verdict_of(replace(SOUND, repeatability=0.96, n_resamples=1000, most_random_undone=6), LIMITS).sentence
    assert "39 random groups undo .05 on average and at most 6 of 94" in sentence
    assert "KL on benign prompts: .005 nats (n 76)" in sentence
    assert "repeatability of the group: .96 of 1,000 resamples of the search half" in sentence


def test_a_label_that_no_random_group_can_change_needs_none():
    none = {"n_random": 0, "n_as_good": 0, "settled": True}
    for damage in DAMAGE:
        for rises in (True, False):
            found = {"lost": 0 if rises else 90, **DAMAGE[damage]}
            label = expected(rises, True, True, damage)
            others = {label_of(n_as_good=n_as_good, **found) for n_as_good in (0, 39)}
            evidence = replace(SOUND, **found, **none)
            evidence = replace(evidence, n_broken=min(evidence.n_broken, evidence.n_answered))
            assert settled(evidence, LIMITS) == (len(others) == 1)
            assert label_of(**found, **none) == (label if others == {label} else "cannot say")


def test_the_edges_of_the_tests():
    # Two-sided exact McNemar: of six changed prompts p is .031, of five .0625.
    assert label_of(n_undone=6, gained=6, n_refused=6) == "concentrated"
    assert label_of(n_undone=5, gained=5, n_refused=6) == "none found"
    # Rank with 39 random groups: one as good gives p .05, two give .075; with 19, none as good gives .05.
    assert label_of(n_as_good=1) == "concentrated"
    assert label_of(n_as_good=2) == "not specific"
    assert label_of(n_random=19) == "concentrated"
    # Half of 90 undone: random groups may undo 45 of 94.
    assert label_of(random_undone=45 / 94) == "concentrated"
    assert label_of(random_undone=46 / 94) == "not specific"
    # A twentieth of the random groups' answers unscored is allowed; more matter only where random groups do.
    assert label_of(random_unscored=0.05) == "concentrated"
    assert label_of(random_unscored=0.06) == "cannot say"
    assert label_of(random_unscored=0.06, lost=90) == "none found"
    # A twentieth of 100 prompts unscored is allowed.
    assert label_of(n_harmful=100, n_scored=95) == "concentrated"
    assert label_of(n_harmful=100, n_scored=94) == "cannot say"


def test_a_rise_of_compliance_alone_is_not_enough():
    # The prompts that rise were not refused before: they were incoherent.
    assert label_of(n_refused=20, n_undone=2, gained=70) == "partly concentrated"


def test_bounds_are_wilsons_at_one_side():
    for count, n in ((0, 25), (1, 50), (3, 76), (12, 12)):
        low, high = (
            scipy.stats.binomtest(count, n, alternative=side).proportion_ci(0.95, method="wilson")
            for side in ("greater", "less")
        )
        assert one_sided_bounds(count, n) == pytest.approx((low.low, high.high), abs=1e-12)


def test_open_damage_names_the_prompts_that_would_bound_it():
    six = verdict_of(replace(SOUND, n_broken=6), LIMITS)
    needed = six.numbers["needed_benign"]
    assert f"{needed} answered benign prompts" in six.sentence
    bounded = replace(SOUND, n_broken=-(-6 * needed // 76), n_answered=needed, n_benign=needed)
    assert damage_of(bounded, LIMITS) == "bounded"
    assert verdict_of(replace(SOUND, n_broken=8), LIMITS).numbers["needed_benign"] is None
    # Just below the limit it takes hundreds of thousands, which are not tried one by one.
    close = replace(SOUND, n_broken=99, n_answered=1000, n_benign=1000)
    assert verdict_of(close, LIMITS).numbers["needed_benign"] == 243_606


def test_near_duplicates_are_told_beside_every_number_that_they_widen():
    joined = {"clustered_p": 1e-4, "n_clusters": 22, "clustered_undone": Clustered(20, 3.71, (0.36, 1.0))}
    all_undone = replace(SOUND, n_undone=94, gained=94, **joined)
    verdict = verdict_of(all_undone, LIMITS)
    assert (verdict.label, verdict.numbers["clustered_undone"]["n_clusters"]) == ("partly concentrated", 20)
    assert "in 20 clusters of near-duplicates, worth 3.7 prompts" in verdict.sentence
    # Where Wilson's own bound is below the half, near-duplicates are not the reason.
    assert "count as one" in verdict.sentence
    assert "count as one" not in verdict_of(replace(all_undone, n_undone=50), LIMITS).sentence
    benign = replace(SOUND, clustered_broken=Clustered(9, 8.0, (0.0, 0.31)))
    assert verdict_of(benign, LIMITS).label == "cannot say: damage not bounded"
    # The smallest change, and what is too few, count clusters.
    none = verdict_of(replace(all_undone, clustered_p=0.06), LIMITS)
    assert (none.label, none.numbers["smallest_change"]) == ("none found", smallest_change_with_power(22))
    # No more can rise than did not comply before.
    most = replace(SOUND, gained=0, n_undone=0, n_complied=SOUND.n_scored - 7)
    assert most.smallest_change(0.05) == smallest_change_with_power(most.n_scored, most.n_complied / most.n_scored)
    assert verdict_of(replace(all_undone, n_clusters=5), LIMITS).label == "cannot say"
    assert too_few_prompts(96, 76, LIMITS, 6) is None
    few = replace(all_undone, clustered_undone=Clustered(5, 2.0, (0.2, 1.0)))
    assert verdict_of(few, LIMITS).label == "cannot say"
    # Without a loss the exact bound of 29 prompts is below a tenth, that of 28 is not; Wilson's of 25.
    assert too_few_prompts(96, 76, LIMITS, 22, 29.0) is None
    assert label_of(benign_worth=28.4) == "cannot say"
    bounds = [clustered_rate(np.zeros(n), range(n), 0.9)[1] for n in (28, 29)]
    assert bounds[0] > LIMITS.most_lost > bounds[1]


def test_thresholds_are_settings_of_the_audit():
    config = AuditConfig("demo:base", "demo", benign="demo", most_kl=0.2)
    assert verdict_of(replace(SOUND, kl=0.15), config).label == verdict_of(SOUND, LIMITS).label == "concentrated"
    recorded = config.as_dict()
    assert {field.name for field in fields(Thresholds)} < recorded.keys()
    assert (recorded["most_kl"], "anyway" in recorded) == (0.2, False)
    for wrong in ({"alpha": 0.0}, {"most_lost": 1.0}, {"most_kl": 0.0}):
        with pytest.raises(InputError, match=r"between 0 and 1|above 0"):
            Thresholds(**wrong)


def test_beginnings_that_end_in_a_thought_do_not_tell_whether_a_model_refuses():
    thoughts = [answer_record(at, "incoherent", unclosed=True) for at in range(8)]
    with pytest.warns(NothingToMeasureWarning, match="8 of 9 answers do not tell .* refuses 1 of 1 "):
        warn_where_nothing_shows(GroupAnswers.of("", [*thoughts, answer_record(8, "refused")], "paper"))
    with pytest.warns(NothingToMeasureWarning, match="^the unablated model refuses 1 of 2 harmful"):
        warn_where_nothing_shows(GroupAnswers.of("", [answer_record(0, "refused"), answer_record(1)], "paper"))
