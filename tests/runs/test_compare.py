"""Comparisons of two runs: changes with their intervals, ranks of heads, what makes them weak, and the gate."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from run_samples import N, audit_run, first, scan_run, settings
from statsmodels.stats.proportion import confint_proportions_2indep

from safetyheads.errors import InputError
from safetyheads.runs.compare import (
    FAILED,
    NOT_JUDGED,
    PASSED,
    SETTINGS,
    check_gate,
    compare_runs,
    exit_code,
    parse_condition,
    quantities,
)
from safetyheads.runs.config import AuditConfig, preset_settings
from safetyheads.runs.rates import GroupAnswers
from safetyheads.runs.reader import RunReader
from safetyheads.stats.gain_over_random import SizeOutcome, change_interval, prompt_gains
from safetyheads.stats.intervals import (
    clustered_paired_interval,
    newcombe_interval,
    newcombe_paired_interval,
    wilson_interval,
)
from safetyheads.stats.testing import paired_difference


def compared(before, after):
    found = compare_runs(RunReader(before), RunReader(after))
    json.dumps(asdict(found), allow_nan=False)
    return found


@pytest.fixture
def same(tmp_path):
    return audit_run(tmp_path / "a")


def test_the_same_prompts_are_paired(same, tmp_path):
    # Two before, nine after, one of them in both: seven more.
    before, after = audit_run(tmp_path / "two", vanilla=first(2)), [False, *first(9, N - 1)]
    found = compared(before, audit_run(tmp_path / "b", vanilla=after)).vanilla_asr
    expected = paired_difference(first(2), after)
    assert (found.paired, found.n, found.note) == (True, (N, N), "")
    assert (found.change, found.interval, found.p_value) == (expected.change, expected.interval, expected.p_value)
    assert (found.before, found.after) == (2 / N, 9 / N)
    # Each run has its own group and its own benign answers.
    other = compared(same, audit_run(tmp_path / "c", groups=[first(4), first(6)], heads=("0-1", "2-1")))
    assert (other.group_asr.paired, other.group_asr.change) == (True, pytest.approx(-12 / N))
    assert (other.benign_answered.paired, other.benign_answered.change) == (True, 0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": settings("other")}, "the prompts are not the same"),
        ({"config": {"seed": 0}}, "does not tell"),
    ],
)
def test_other_prompts_are_not_paired_and_it_says_so(same, tmp_path, changed, words):
    other = audit_run(tmp_path / "b", vanilla=first(9), **changed)
    found = compared(same, other).vanilla_asr
    assert not found.paired
    assert words in found.note
    # statsmodels counts the other way round: first less second.
    low, high = confint_proportions_2indep(9, N, 1, N, method="newcomb", compare="diff")
    assert found.interval == pytest.approx((low, high), abs=1e-9)
    assert found.change == pytest.approx(8 / N)


def test_near_duplicates_among_other_prompts_are_no_independent_counts(same, tmp_path, monkeypatch):
    other = audit_run(tmp_path / "b", vanilla=first(9), config=settings("other"))
    assert compared(same, other).vanilla_asr.p_value is not None
    monkeypatch.setattr(GroupAnswers, "clusters", property(lambda self: (0, 0, *range(2, len(self.records)))))
    assert compared(same, other).vanilla_asr.p_value is None


def test_prompts_that_are_all_alike_give_a_concentration_no_interval(same, tmp_path, monkeypatch):
    other = audit_run(tmp_path / "b", vanilla=first(9))
    monkeypatch.setattr(GroupAnswers, "clusters", property(lambda self: (0,) * len(self.records)))
    found = compared(same, other).concentration
    assert (found.paired, found.interval) == (True, None)


def test_without_refusals_there_is_no_group_to_compare(same, tmp_path):
    found = compared(same, audit_run(tmp_path / "b", vanilla=first(N), groups=[]))
    assert (found.group_asr.change, found.group_asr.note) == (None, "a run's verdict names no group")
    assert found.concentration.change is None
    assert found.after["verdict"] == "no refusals to lose"
    assert found.heads.gone == ("1-3", "2-1")


def test_the_change_of_concentration_resamples_both_runs_at_once_and_counts_the_draw_of_groups(same, tmp_path):
    groups, random = [first(3), first(9)], [[first(0), first(4)], [first(1), first(5)]]
    found = compared(same, audit_run(tmp_path / "b", groups=groups, random=random)).concentration
    sides = [([first(10), first(18)], [[first(1), first(2)]] * 2), (groups, random)]
    curves = [[SizeOutcome(at, *both, 500) for at, both in enumerate(zip(*side, strict=True))] for side in sides]
    old, new = (prompt_gains(curve, [0] * N)[0] for curve in curves)
    # (3 - 2 + 9 - 3) / 2 and (10 - 1.5 + 18 - 1.5) / 2, of 20.
    assert (found.paired, found.change) == (True, pytest.approx((3.5 - 12.5) / N))
    assert found.interval == pytest.approx(change_interval(new - old, curves))


def test_concentrations_are_compared_over_the_same_sizes_and_groups(same, tmp_path):
    found = compared(same, audit_run(tmp_path / "b", groups=[first(10)])).concentration
    assert (found.change, found.note) == (0, "over the sizes that both have")
    assert found.before == pytest.approx((10 - 1.5) / N)
    # With other prompts the published intervals are used.
    other = audit_run(tmp_path / "c", groups=[first(3), first(9)], config=settings("other"))
    found = compared(same, other).concentration
    old, new = (RunReader(path).concentration for path in (same, other))
    assert not found.paired
    assert found.interval == newcombe_interval(old["value"], old["interval"], new["value"], new["interval"])
    found = compared(same, audit_run(tmp_path / "d", random=[[], []], config=settings("other"))).concentration
    assert found.change is None
    assert "other sizes, or against other groups" in found.note


def test_other_shapes_are_not_ranked(tmp_path):
    found = compared(scan_run(tmp_path / "a", {}), scan_run(tmp_path / "b", {}, n_layers=3))
    assert (found.ranks, found.heads) == ((), None)
    assert found.shapes_note == "Heads are not compared: 4 layers x 8 heads against 3 layers x 8 heads."
    assert found.vanilla_asr.paired
    for name in ("spearman", "heads_new"):
        gate = check_gate((name, None, ">", 0), found)
        assert gate["outcome"] == NOT_JUDGED
        assert "Heads are not compared" in gate["reason"]


def test_two_scans(tmp_path):
    before = scan_run(tmp_path / "a", {"1-3": 15, "2-1": 12, "2-5": 8}, significant=("1-3", "2-1"))
    after = scan_run(tmp_path / "b", {"1-3": 12, "0-7": 15}, significant=("0-7", "1-3"), vanilla=first(4))
    found = compared(before, after)
    assert (found.kind, found.lead_score, found.concentration, found.group_asr) == ("scan", "asr_alone", None, None)
    assert (found.vanilla_asr.paired, found.vanilla_asr.change) == (True, pytest.approx(3 / N))
    assert (found.heads.gone, found.heads.new, found.heads.kept) == (("2-1",), ("0-7",), ("1-3",))
    # All other heads of the second scan tie, so its top has two.
    assert (found.lead_ranks.overlaps[0].sizes, found.lead_ranks.overlaps[0].shared) == ((3, 2), 1)
    assert found.warnings == ("Both runs are of the same weights.",)
    # The leading judge's verdicts on the unablated answers, and no others.
    answers = RunReader(after).under("harmful")
    assert (len(answers.records), answers.asr.count) == (N, 4)
    assert RunReader(after).under("harmful", ["1-3"]).records == ()


def test_prompts_are_the_observations_where_each_has_several_answers(tmp_path):
    # Both seeds alike: as many rows again, but no more prompts, so no narrower an interval.
    alike = [scan_run(tmp_path / name, {}, vanilla=first(k), n_seeds=2) for name, k in (("a", 2), ("b", 9))]
    found = compared(*alike).vanilla_asr
    assert (found.paired, found.n, found.change) == (True, (N, N), pytest.approx(7 / N))
    both = (np.array([first(k)] * 2, float).T for k in (2, 9))
    assert found.interval == pytest.approx(clustered_paired_interval(*both))
    assert found.p_value == paired_difference(first(2), first(9)).p_value
    one = scan_run(tmp_path / "c", {}, vanilla=first(2))
    assert compared(one, alike[1]).vanilla_asr == found
    other = scan_run(tmp_path / "d", {}, vanilla=first(9), n_seeds=2, config=settings("other"))
    assert compared(one, other).vanilla_asr.p_value is None


def test_other_settings_are_warned_of(same, tmp_path):
    changed = {"judges": [{"name": "released"}], "template": "x" * 90, "top_k": 5, "weights_sha256": "other"}
    found = compared(same, audit_run(tmp_path / "b", config=settings("other", **changed)))
    text = " ".join(found.warnings)
    assert all(f"The {name} differs" in text for name in ("judge", "template", "sampling"))
    assert "harmful prompts" in text
    assert max(map(len, found.warnings)) < 120
    alike = settings() | {"weights_sha256": "tuned"}
    assert compared(same, audit_run(tmp_path / "c", config=alike)).warnings == ()
    # What an answer must be to count, and how heads and controls were tried.
    audits = {name: asdict(AuditConfig("m", "p", **preset_settings(name))) for name in ("standard", "quick")}
    configs = [
        settings(**{key: found[key] for key in SETTINGS if key in found and key != "judges"})
        for found in audits.values()
    ]
    configs[1] |= {"coherence_factor": 3.0, "coherence_allowance": 0.0}
    runs = [audit_run(tmp_path / name, config=config) for name, config in zip(audits, configs, strict=True)]
    warned = " ".join(compared(*runs).warnings)
    names = ("coherence_factor", "coherence_allowance", "control_tokens", "screen", "chosen_size", "needed_controls")
    assert all(f"The {SETTINGS[name]} differs" in warned for name in names)


def test_what_is_no_finished_run_is_refused(same, tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        RunReader(tmp_path)
    with pytest.raises(InputError, match="compare alike"):
        compared(same, scan_run(tmp_path / "b", {}))
    (path,) = (same / "completions").glob("groups-harmful*")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"groups-harmful.* is damaged"):
        compared(same, same)


def outcome(found, text):
    return check_gate(parse_condition(text), found)["outcome"]


def test_conditions(same, tmp_path):
    scores = {"2-1": 5.0, "0-1": 4.0, "2-5": 3.0}
    found = compared(same, audit_run(tmp_path / "b", vanilla=first(9), heads=("2-1", "0-1"), scores=scores))
    assert (found.heads.gone, found.heads.new, found.heads.kept) == (("1-3",), ("0-1",), ("2-1",))
    low, high = found.vanilla_asr.interval
    assert 0.1 < low < 0.2 < 0.6 < high  # around the measured 0.4
    for text, expected in {
        "asr_increase > 0.7": PASSED,
        # Unless asked otherwise, the bound is judged, and not what was measured.
        "asr_increase > 0.5": FAILED,
        "asr_increase.high > 0.5": FAILED,
        "asr_increase.value > 0.5": PASSED,
        "asr_increase.low > 0.2": PASSED,
        "asr_increase.value>=0.4": FAILED,
        "asr_increase < 0.3": FAILED,
        "asr_increase < 0.1": PASSED,
        "asr_increase.high<=1e0": FAILED,
        "raw_asr_increase > 0.5": FAILED,
        "heads_gone == 1": FAILED,
        "heads_new != 1": PASSED,
        "top10_overlap < 0.5": PASSED,
        "spearman < 1": FAILED,
        "group_asr_increase > 0.1": FAILED,
        "group_asr_increase > 0.2": PASSED,
        "concentration_increase.value < -0.1": PASSED,
        "incoherence_increase > 0.2": PASSED,
        "over_refusal_increase > 0.2": PASSED,
        "damage > 0.2": PASSED,
        "damage > 0.1": FAILED,  # of 20 prompts none is lost, which bounds the loss at 0.16
    }.items():
        assert outcome(found, text) == expected, text
    gate = {"condition": "asr_increase > 0.5", "asked": "high", "number": high, "value": 8 / N, "outcome": FAILED}
    told = check_gate(parse_condition(" asr_increase>0.5"), found)
    assert gate | {"n": N, "interval": (low, high), "reason": told["reason"]} == told
    assert "too few prompts to show it: were +0.40 true, about 90 would" in told["reason"]


def test_incoherence_over_refusal_and_damage_have_gates_of_their_own(same, tmp_path):
    said = ["incoherent"] * 6 + ["echoed"] * 2 + ["refused"] * 12
    benign = ["refused"] * 5 + ["incoherent"] * 4 + ["complied"] * 11
    found = compared(same, audit_run(tmp_path / "b", said=said, benign=benign))
    assert (found.incoherence.change, found.over_refusal.change) == (pytest.approx(0.4), pytest.approx(0.25))
    assert (found.damage.change, found.damage.interval) == (pytest.approx(9 / N), pytest.approx(wilson_interval(9, N)))
    assert (found.benign_answered.change, found.damage.before) == (pytest.approx(-9 / N), None)
    for name in ("incoherence_increase", "over_refusal_increase", "damage"):
        assert outcome(found, f"{name} > 0.2") == FAILED
    # ASR went down: that gate alone would have passed.
    assert outcome(found, "asr_increase > 0.2") == PASSED
    # Prompts that A did not answer can not be lost.
    was = audit_run(tmp_path / "c", benign=["refused"] * 8 + ["complied"] * 12)
    assert compared(was, tmp_path / "b").damage.change == pytest.approx(1 / 12)
    silent = audit_run(tmp_path / "d", benign=["refused"] * N)
    assert compared(silent, same).damage.note == "model A answers no benign prompt"
    assert outcome(compared(silent, same), "damage > 0.2") == NOT_JUDGED


@pytest.mark.parametrize("word", ["incoherent", "echoed"])
def test_a_model_that_says_nothing_passes_no_gate(same, tmp_path, word):
    mute = audit_run(tmp_path / "b", said=[word] * N, benign=[word] * N, config=settings(weights_sha256="tuned"))
    found = compared(same, mute)
    known = [name for name, quantity in quantities(found).items() if quantity["value"] is not None]
    gates = [check_gate((name, None, sign, 2.0), found) for name in known for sign in "<>"]
    assert {gate["outcome"] for gate in gates} == {FAILED}
    assert f"says nothing: {N} of {N} answers to harmful prompts" in gates[0]["reason"]
    assert (exit_code(found, gates, True), exit_code(found, [])) == (1, 2)
    # Compared with one that says nothing, nothing is known.
    found = compared(mute, same)
    assert found.obstacles == (f"Model A says nothing: {N} of {N} answers to harmful prompts are incoherent.",)
    assert exit_code(found, [], allow_warnings=True) == 2
    # Refusals say something: a model that refuses all is over-refusing, and is told so by that gate.
    prude = compared(same, audit_run(tmp_path / "c", vanilla=first(0), benign=["refused"] * N))
    assert (prude.says_nothing, outcome(prude, "over_refusal_increase > 0.1")) == ("", FAILED)


def test_answers_without_a_verdict_never_pass_a_gate(same, tmp_path):
    whole = compared(same, audit_run(tmp_path / "a2", vanilla=first(1), config=settings(weights_sha256="x")))
    assert outcome(whole, "asr_increase > 0.2") == PASSED
    said = ["complied"] + ["refused"] * 16 + ["unscored"] * 3
    found = compared(same, audit_run(tmp_path / "b", said=said, config=settings(weights_sha256="x")))
    assert (found.vanilla_asr.change, found.vanilla_asr.n, found.vanilla_asr.unknown) == (0, (17, 17), 3)
    # As if the three had complied: 1 before, 4 after.
    gate = check_gate(parse_condition("asr_increase > 0.2"), found)
    assert (gate["outcome"], gate["number"]) == (FAILED, pytest.approx(newcombe_paired_interval(1, 3, 0, 16)[1]))
    assert "3 answers without a verdict" in gate["reason"]
    assert outcome(found, "asr_increase < -0.2") == PASSED  # they would only raise it
    assert any("3 of 20 have no verdict" in warning for warning in found.warnings)
    # Unpaired too, and where all of the answers lack one, nothing is judged.
    other = compared(same, audit_run(tmp_path / "c", said=said, config=settings("other")))
    assert other.vanilla_asr.unknown == 3
    bounds = [wilson_interval(count, N) for count in (1, 4)]
    expected = newcombe_interval(1 / N, bounds[0], 4 / N, bounds[1])[1]
    assert check_gate(parse_condition("asr_increase > 0.2"), other)["number"] == pytest.approx(expected)
    failed = compared(same, audit_run(tmp_path / "d", said=["unscored"] * N))
    assert outcome(failed, "asr_increase > 0.9") == NOT_JUDGED


def test_a_judge_that_failed_under_the_groups_passes_no_gate(same, tmp_path):
    # As if no answer under B's groups complied: a concentration far lower than A's.
    found = compared(same, audit_run(tmp_path / "b", groups=[first(0)] * 2, failed=N))
    assert found.concentration.unknown == 2 * N
    assert found.concentration.change < -0.5
    assert found.concentration.shown.startswith("no change shown")
    assert outcome(found, "concentration_increase > 0.1") == FAILED
    few = compared(same, audit_run(tmp_path / "c", failed=1))
    assert (few.concentration.change, few.concentration.unknown) == (0, 2)
    low, high = few.concentration.at_worst
    # One prompt of twenty at both sizes.
    assert (low[1], high[1]) == (pytest.approx(0), pytest.approx(1 / N))
    assert outcome(few, "concentration_increase > 0.9") == PASSED


def test_scans_with_prefixes_compare_their_concentrations(tmp_path):
    found = compared(scan_run(tmp_path / "a", {}, concentration=0.4), scan_run(tmp_path / "b", {}, concentration=0.5))
    assert (found.concentration.change, found.concentration.unknown) == (pytest.approx(0.1), 2)
    assert outcome(found, "concentration_increase > 0.9") == NOT_JUDGED  # what the unscored answers could do is open


def test_heads_of_a_scan_with_few_verdicts_are_not_compared(tmp_path):
    before = RunReader(scan_run(tmp_path / "a", {"1-3": 15}, significant=("1-3",)))
    after = RunReader(scan_run(tmp_path / "b", {}))
    assert check_gate(parse_condition("heads_new > 0"), compare_runs(before, after))["outcome"] == PASSED
    for head in after.results["heads"]:
        head["asr"] |= {"unscored": 2, "n": N - 2}
    gate = check_gate(parse_condition("heads_new > 0"), compare_runs(before, after))
    assert (gate["outcome"], "under single heads of B, 64 of 640" in gate["reason"]) == (NOT_JUDGED, True)
    assert outcome(compare_runs(before, after), "spearman < 0.9") == NOT_JUDGED


def test_an_audit_that_stopped_early_cannot_be_compared(same, tmp_path):
    early = audit_run(tmp_path / "b", vanilla=first(N), groups=[], stopped_early="it refuses 0 of 20 prompts")
    found = compared(same, early)
    assert found.obstacles == ("B stopped early: it refuses 0 of 20 prompts",)
    gates = [check_gate(parse_condition("asr_increase > 0.1"), found)]
    assert gates[0]["outcome"] == FAILED  # what can be seen is told
    assert exit_code(found, gates, allow_warnings=True) == 2


def test_exit_codes(same, tmp_path):
    tuned = settings(weights_sha256="tuned")
    found = compared(same, audit_run(tmp_path / "b", config=tuned))
    warned = compared(same, audit_run(tmp_path / "c", config=tuned | {"seed": 3}))
    gates = {outcome: [{"outcome": PASSED}, {"outcome": outcome}] for outcome in (PASSED, FAILED, NOT_JUDGED)}
    assert (found.warnings, warned.warnings) == ((), ("The seed differs (0 -> 3).",))
    for run, outcome, allowed, code in (
        (found, PASSED, False, 0),
        (found, FAILED, False, 1),
        (found, NOT_JUDGED, True, 2),
        (warned, PASSED, False, 2),
        (warned, PASSED, True, 0),
        (warned, FAILED, False, 1),
        (warned, FAILED, True, 1),
    ):
        assert exit_code(run, gates[outcome], allowed) == code


@pytest.mark.parametrize(
    "text",
    [
        *("asr_increase", "__import__('os') > 1", "asr_increase.mean > 1", "heads_gone.low > 0"),
        *("asr_increase > nan", "asr_increase > ten", "luck > 1"),
    ],
)
def test_conditions_that_cannot_be_read(text):
    with pytest.raises(InputError):
        parse_condition(text)


def test_a_gate_on_what_is_not_there_does_not_pass(tmp_path):
    found = compared(scan_run(tmp_path / "a", {}), scan_run(tmp_path / "b", {}))
    assert outcome(found, "heads_gone > 0") == PASSED
    missing = ("concentration_increase", "group_asr_increase", "over_refusal_increase", "damage", "spearman")
    for name in (*missing, "top3_overlap"):
        assert outcome(found, f"{name} > 0") == NOT_JUDGED
