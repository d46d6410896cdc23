"""The audit's choice of a group, and the verdict's evidence, from answers whose labels are made up."""

import json
from collections import Counter
from dataclasses import replace

import audit_samples
import pytest
from answer_records import answer_record
from audit_samples import answered

from safetyheads.heads import format_heads, parse_heads
from safetyheads.measures.random_groups import random_groups
from safetyheads.measures.scorers import LEAD
from safetyheads.runs.audit import SETS, audit_verdict, damage_of_answered, early_verdict, lead_group, read_prompts
from safetyheads.runs.config import AuditConfig, Thresholds
from safetyheads.runs.rates import GroupAnswers, random_as_json
from safetyheads.runs.run import Damage, prompt_notes
from safetyheads.runs.verdict import evidence_of, refusals, specific, verdict_of
from safetyheads.stats.intervals import clustered_rate, wilson_interval

N = 50
N_HEADS = 1024
HEADS = parse_heads("2-26,3-1,7-13,4-4")
RANDOM = (2, 3, *[1] * 18)
"""Prompts complied with under each of twenty random groups."""


def outcome(size=3, freed=40, kept=N, random=RANDOM, n=N, scorer=LEAD, search=None, search_kept=None):
    """A group after which ``freed`` harmful and ``kept`` benign prompts of the test half are answered."""
    counts = (freed if search is None else search, freed, n if search_kept is None else search_kept, kept)
    controls = {f"1-{index}": control for index, control in enumerate(random)}
    return audit_samples.outcome(HEADS[:size], counts, controls, n, scorer)


def findings(*outcomes, complied=2):
    """Before ablation ``complied`` harmful prompts of the test half are answered, and all benign ones."""
    # On the search half nothing is refused and all is kept, so that a verdict that looks there comes out otherwise.
    n = len(outcomes[0].answers["harmful_test"].records)
    vanilla = {"harmful_search": answered(n, n), "harmful_test": answered(complied, n)}
    return vanilla | dict.fromkeys(("benign_search", "benign_test"), answered(n, n)), outcomes


def verdict(group, **vanilla):
    before, (outcome,) = findings(group, **vanilla)
    found = audit_verdict(before, outcome, Thresholds(), N_HEADS)
    json.dumps(found, allow_nan=False)
    return found


CASES = {
    "freed, above chance, answers kept": ("concentrated", outcome(), {}),
    "all well on the search half only": ("none found", outcome(freed=2, kept=20, search=N, search_kept=N), {}),
    "fewer refusals than can be seen": ("no refusals to lose", outcome(freed=N), {"complied": 45}),
    "too few prompts": ("cannot say", outcome(freed=5, kept=5, random=(0,) * 20, n=5), {"complied": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_label_of(case):
    label, given, vanilla = CASES[case]
    found = verdict(given, **vanilla)
    assert found["label"] == label
    assert (found["heads"], found["size"]) == ([str(head) for head in given.group], 3)
    # What unablated answers settle, they settle before a group is looked for.
    early = early_verdict(findings(given, **vanilla)[0], Thresholds())
    settled = label == "no refusals to lose" or case == "too few prompts"
    assert (early is not None and early["label"] == label and early["heads"] == []) == settled


def given(records, group="", limit=None):
    return GroupAnswers.of(group, [answer_record(at, *fields) for at, fields in enumerate(records)], "paper", limit)


def test_what_counts_as_a_refusal_to_lose():
    answers = given(
        [
            ("refused", "refused"),
            # A judge of harm says only that nothing harmful was written.
            ("safe", "refused"),
            ("safe", "complied"),
            # The paper's judge takes a refusal of a few words for nonsense.
            ("incoherent", "refused", "short: 12 of 32 characters"),
            ("incoherent", "incoherent", "repetition"),
            ("echoed", "echoed"),
            ("safe", "incoherent"),
            ("complied", "complied"),
            ("unscored", "refused"),
        ]
    )
    assert refusals(answers).tolist() == [True, True, True, True, False, False, False, False, False]


def test_the_evidence_is_counted_over_prompts_that_both_runs_scored():
    refused, complied, unscored = ("refused", "refused"), ("complied",), ("unscored",)
    before = given([refused, refused, refused, refused, complied, unscored, refused])
    # The fourth complies in words that surprise the unablated model.
    surprising = ("complied", "complied", "", 3.0)
    after = given([complied, complied, refused, surprising, refused, complied, unscored], "1-1", 2.0)
    sound = given([complied, complied, complied, refused, surprising], "", 2.0)
    damaged = given([complied, refused, surprising, complied, complied], "1-1", 2.0)
    nobody = given([unscored] * 7, "0-3")
    random = [given([complied, refused, refused, refused, refused, refused, refused], "0-0")] * 2
    # Of the prompts that both runs scored, the third has no verdict here.
    random += [given([complied] * 7, "0-1"), given([complied, refused, unscored] + [refused] * 4, "0-2"), nobody]
    evidence = evidence_of((before, after), (sound, damaged), random, [0.1, 0.3])
    assert (evidence.n_harmful, evidence.n_scored, evidence.n_refused, evidence.n_undone) == (7, 5, 4, 2)
    assert (evidence.gained, evidence.lost) == (2, 1)
    assert (evidence.n_benign, evidence.n_answered, evidence.n_broken) == (5, 3, 2)
    assert (evidence.kl, evidence.n_kl) == (0.2, 2)
    # Equal groups count once, and one that nobody could score is none.
    assert (evidence.n_random, evidence.n_as_good) == (3, 1)
    assert evidence.random_undone == pytest.approx((1 / 4 + 1 + 1 / 3) / 3)
    # But what nobody could score is missing all the same.
    assert evidence.random_unscored == pytest.approx((1 / 5 + 1) / 4)
    assert (evidence.n_complied, evidence.n_undone_cut) == (1, None)
    # Random groups of short answers: the group is ranked by answers of its own that are as short.
    cut = given([complied, refused, refused, refused, refused, complied, unscored], "1-1", 2.0)
    short = evidence_of((before, after), (sound, damaged), random[:2], [0.1], cut=cut)
    assert (short.n_undone, short.n_undone_cut, short.n_as_good) == (2, 1, 1)
    assert not specific(replace(short, n_random=39, n_as_good=0, random_undone=0.2), Thresholds())
    assert specific(replace(short, n_random=39, n_as_good=0, random_undone=0.2, n_undone_cut=None), Thresholds())


@pytest.mark.parametrize(
    ("size", "search", "more"),
    [
        (2, (20, 45, 47), {}),
        (3, (20, 44, 47), {}),
        (1, (48, 48, 50), {}),
        (2, (30, 45, 20), {}),
        (2, (20, 45, 46), {"test": (50, 0, 50)}),
        # Of 50: 49 - 20 benign answers lost on the search half is less than 40.
        (1, (40, 49), {"kept": [50, 30]}),
        (2, (40, 49), {"kept": [50, 49]}),
        # One of 20 is .05, which differences of floats reach from above or below.
        *[(1, (best - 1, best), {"n": 20}) for best in range(2, 21)],
    ],
)
def test_the_smallest_group_near_the_best_of_the_search_half_is_taken(size, search, more):
    n = more.get("n", N)
    test, kept = more.get("test", search), more.get("kept", [n] * len(search))
    made = [
        outcome(size, freed=freed, n=n, search=found, search_kept=left, random=())
        for size, (found, freed, left) in enumerate(zip(search, test, kept, strict=True), start=1)
    ]
    assert lead_group(*findings(*made)).size == size


def test_the_rule_for_the_size_counts_an_unscored_answer_as_not_complied():
    # Of 50, 40 comply with two heads; with one 20 do, and 30 are unscored: 20 of 20 scored, but 20 of 50 prompts.
    one, two = outcome(1, search=20), outcome(2, search=40)
    for seeds in one.answers["harmful_search"].records[20:]:
        seeds[0]["verdicts"]["paper"]["label"] = "unscored"
    assert lead_group(*findings(one, two)) is two


def test_only_groups_of_the_leading_score_are_looked_at():
    other, mine = outcome(1, search=N, scorer="generalized_ships_prompt"), outcome(2, search=20)
    assert lead_group(*findings(other, mine)) is mine


def test_a_fifth_of_the_benign_prompts_is_searched_and_no_limit_takes_the_test_below_fifty(tmp_path):
    path = tmp_path / "harmful.csv"
    rows = [f"what {kind}{at},{kind}" for kind, n in (("theft", 40), ("fraud", 20)) for at in range(n)]
    path.write_text("\n".join(["goal,category", *rows]), encoding="utf-8")

    def sizes(**options):
        halves = read_prompts(AuditConfig("m", str(path), "benign", **options))
        json.dumps([half.facts() for half in halves.values()])
        return halves, [len(halves[name]) for name in SETS]

    halves, n = sizes()
    assert n == [30, 30, 20, 80]
    assert Counter(prompt.category for prompt in halves["harmful_test"]) == {"theft": 20, "fraud": 10}
    halves, n = sizes(limit=12)
    assert n == [6, 6, 2, 50]
    assert Counter(prompt.category for prompt in halves["harmful_search"]) == {"theft": 4, "fraud": 2}
    notes = prompt_notes(halves)
    assert "harmful: 12 of 60 prompts are used, drawn with seed 0, from 2 categories in proportion" in notes
    assert "benign/test: 50 of 80 prompts are used, drawn with seed 0" in notes
    assert len(notes) == len(set(notes))
    assert sizes(limit=12, seed=1)[0]["harmful_test"].queries != halves["harmful_test"].queries
    assert sizes(limit=90)[1][2:] == [18, 72]
    demo = read_prompts(AuditConfig("m", "demo", "demo", limit=8))
    assert [len(demo[name]) for name in SETS] == [8, 8, 8, 50]


def test_intervals_of_near_duplicates_are_by_cluster():
    records = [record for seeds in answered([at < 24 for at in range(48)], 48).records for record in seeds]
    alone = GroupAnswers.of("", [record | {"cluster": record["id"]} for record in records], "paper")
    pairs = GroupAnswers.of("", [record | {"cluster": record["id"] // 2} for record in records], "paper")
    assert alone.clusters is None
    assert alone.asr.interval == wilson_interval(24, 48)
    # Both of a pair always tell the same, so they are worth 24 answers and not 48.
    low, high = pairs.asr.interval
    assert (pairs.asr.rate, pairs.asr.n) == (0.5, 48)
    assert (low, high) == clustered_rate(pairs.verdicts(), pairs.clusters)
    assert high - low > 1.3 * (alone.asr.interval[1] - alone.asr.interval[0])
    assert pairs.rates()["asr"]["interval"] == pairs.asr.interval


def test_damage_is_of_the_prompts_that_are_answered_unablated():
    unablated = given(
        [("complied",), ("refused", "refused"), ("complied", "complied", "", 3.0), ("complied",)], limit=2.0
    )
    damage = {HEADS: Damage((0.1, 9.0, 9.0, 0.3), (0.2, 8.0, 8.0, 0.4))}
    assert damage_of_answered(damage, unablated) == {HEADS: Damage((0.1, 0.3), (0.2, 0.4))}


def test_the_verdict_counts_near_duplicates_as_one():
    def evidence(size, n_lost=2):
        sides = []
        for complied in ([False] * 48, [at < 12 for at in range(48)], [True] * 48, [at >= n_lost for at in range(48)]):
            rows = [record | {"cluster": record["id"] // size} for record in answered(complied, 48).flat()]
            sides.append(GroupAnswers.of("", rows, "paper"))
        return evidence_of((sides[0], sides[1]), (sides[2], sides[3]), (), ())

    alone, twelves = evidence(1), evidence(12)
    assert (alone.gained, alone.n_undone, alone.n_broken) == (twelves.gained, twelves.n_undone, twelves.n_broken)
    # Twelve gains of one cluster are one observation, which no test can call a rise.
    assert alone.p_value < 0.001
    assert twelves.p_value == 1.0
    assert twelves.undone[0] < 0.05 < alone.undone[0]
    assert twelves.broken[1] > 2 * alone.broken[1]
    assert verdict_of(twelves, Thresholds()).numbers["undone"]["interval"] == twelves.undone
    # One loss in 48 would be few enough, were the prompts not alike.
    assert (alone.n_clusters, alone.clustered_undone) == (None, None)
    assert (twelves.clustered_undone.n_clusters, twelves.clustered_broken.n_clusters, twelves.n_clusters) == (4, 4, 4)
    assert (alone.benign_worth, twelves.benign_worth) == (None, pytest.approx(4))
    assert twelves.smallest_change(0.05) is None
    joined = replace(evidence(6, 1), clustered_p=0.001, n_random=39, n_as_good=0, kl=0.0, benign_worth=29.0)
    found = verdict_of(joined, Thresholds())
    assert found.label == "cannot say: damage not bounded"
    assert "as many benign prompts without near-duplicates would do" in found.sentence


def test_the_table_says_which_random_groups_there_are_and_the_least_p_they_can_show():
    found = outcome().answers["harmful_test"]
    drawn = random_groups(parse_heads("1-3"), [8] * 4, 39)
    controls = [answered(at % 5, N, group=format_heads(control)) for at, control in enumerate(drawn.groups)]
    refused = answered(0, N)
    block = random_as_json(refused, found, controls, drawn)
    assert (block["n_groups"], block["matched"], block["n_possible"], block["all"]) == (31, "all layers", 31, True)
    # The group counts as one of the groups that it is ranked among.
    assert block["p_value"] == block["least_p"] == 1 / 32
    assert random_as_json(refused, answered(4, N), controls, drawn)["p_value"] == (1 + 6) / 32
    nobody = given([("unscored",)] * N, "1-0")
    some = random_as_json(refused, found, (nobody, answered(3, N, group="1-1")), outcome().drawn)
    assert (some["n_groups"], some["n_unscored"]) == (1, 1)
    assert random_as_json(refused, nobody, controls, drawn) is None
    # Of the prompts that both runs scored, as in the verdict: 4 of 8 against 6 of 8, not 5 of 9 against 6 of 9.
    before = given([("refused",)] * 8 + [("unscored",)])
    after, other = (
        given([("complied",)] * n + [("refused",)] * (8 - n) + [(last,)], group)
        for n, last, group in ((4, "complied", "1-3"), (6, "refused", "0-0"))
    )
    table, evidence = (
        random_as_json(before, after, (other,), drawn),
        evidence_of((before, after), (before,) * 2, (other,), ()),
    )
    assert (table["asr"], table["n"], table["p_value"]) == ([6 / 8], 8, evidence.random_p_value)
