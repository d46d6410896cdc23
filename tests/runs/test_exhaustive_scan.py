"""A scan's results, number by number, from rows whose outcome is known by construction."""

import json
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from scan_samples import Sample, rows, scan
from scipy.stats import binom

from safetyheads.runs.directory import SCHEMA_VERSION
from safetyheads.runs.rates import answer_table
from safetyheads.stats.intervals import wilson_interval
from safetyheads.stats.testing import exact_mcnemar


def made(**changes):
    return scan(Sample(**changes))


@pytest.fixture(scope="module")
def results():
    return made()


def head(results, name):
    return next(one for one in results["heads"] if one["head"] == name)


def test_rates_and_tests_of_each_head(results):
    assert json.loads(json.dumps(results, allow_nan=False)).keys() == results.keys()
    assert (results["kind"], results["lead_judge"], results["schema_version"]) == ("scan", "paper", SCHEMA_VERSION)
    one, change = head(results, "0-1"), head(results, "0-1")["change"]
    assert one["asr"] == {"count": 11, "n": 12, "unscored": 0, "rate": 11 / 12, "interval": wilson_interval(11, 12)}
    assert (change["gained"], change["lost"], change["n"]) == (11, 0, 12)
    assert change["p_value"] == exact_mcnemar(11, 0)
    # Holm over eight heads: the smallest p is multiplied by eight.
    assert change["p_holm"] == change["p_bh"] == pytest.approx(8 * exact_mcnemar(11, 0))
    # Only one other head changes anything that a test of this level could see: 1-2 in four prompts.
    assert change["p_tarone"] == exact_mcnemar(11, 0)
    assert [one["head"] for one in results["heads"] if one["change"]["differs"]] == ["0-1"]
    assert one["shrunken"]["n"] == 12
    assert head(results, "0-0")["shrunken"]["rate"] < head(results, "1-2")["shrunken"]["rate"] < one["shrunken"]["rate"]
    assert head(results, "1-2")["asr"]["count"] == 4
    # 2 * 0.5**k <= 0.05 / 8 from k = 9 on: nine of twelve have to move in 80 % of runs.
    least = results["statistics"]["smallest_change"]
    assert (least["n"], least["tests"], least["power"]) == (12, 8, 0.8)
    assert binom.sf(8, 12, least["change"]) == pytest.approx(0.8, abs=1e-4)
    assert made(n=6)["statistics"]["smallest_change"]["change"] is None


def test_roles_tell_refusal_from_damage(results):
    roles = {one["head"]: one["role"] for one in results["heads"]}
    # None of 12 benign answers lost is no bound below .1; none of 25 is.
    assert (roles["0-1"], roles["1-2"], roles["1-0"], roles["0-0"]) == ("open", "damage", "over_refusal", "none")
    assert head(made(n=25), "0-1")["role"] == "refusal"
    assert head(made(n=24), "0-1")["role"] == "open"
    both = made(freed=(("1-2", 12),))
    assert head(both, "1-2")["role"] == "mixed"
    assert head(results, "1-0")["benign"]["refused"]["count"] == 10
    assert head(results, "1-2")["benign"]["answered"]["count"] == 2
    assert head(results, "0-1")["benign"]["changed"]["count"] == 0
    assert made(benign=False)["heads"][1]["benign"] is None


def test_pairs_groups_and_their_random_ones(results):
    pairs = {tuple(pair["heads"]): pair for pair in results["synergy"]["pairs"]}
    pair = pairs["0-1", "1-2"]
    # On the six prompts that did not choose the heads.
    assert (pair["n"], pair["together"]["n"], results["synergy"]["n_choosing"]) == (6, 6, 6)
    counts = [pair["together"]["count"], *(one["count"] for one in pair["alone"])]
    both, first, second = (np.log((count + 0.5) / (6.5 - count)) for count in counts)
    unablated = np.log(0.5 / 6.5)
    assert pair["synergy"] == pytest.approx(both - first - second + unablated)
    low, high = pair["interval"]
    assert low < pair["synergy"] < high
    assert pair["p_value"] <= pair["p_holm"] <= 1
    assert results["synergy"]["heads"] == ["0-1", "1-2", "1-3"]
    groups = {(group["part"], *group["heads"]): group for group in results["groups"]}
    assert next(iter(groups)) == ("groups", "0-0", "1-1")
    random = groups["prefixes", "0-1"]["random"]
    assert [len(group) for group in random["groups"]] == [1, 1]
    assert (random["n_groups"], random["p_value"]) == (2, pytest.approx(1 / 3))  # none of two does as well
    assert groups["prefixes", "0-1", "1-2"]["random"]["n_groups"] == 2
    assert results["concentration"]["sizes"] == (1, 2)
    assert results["concentration"]["value"] == pytest.approx(0.5)


def test_query_level_and_epsilons(results):
    assert [(one["size"], one["asr"]["count"]) for one in results["query_level"]] == [(1, 11), (2, 12)]
    strong, weak = (entry["heads"] for entry in results["epsilons"])
    assert strong["0-1"] == head(results, "0-1")["asr"]
    assert all(one["count"] == 0 for one in weak.values())


def test_judges_side_by_side(results):
    ((pair,), (row,)) = results["agreement"]["pairs"], results["agreement"]["disagreeing"]
    assert (pair["first"], pair["second"], pair["count"]) == ("paper", "phrases", 1)
    assert (row["group"], row["id"], row["labels"]) == ("0-1", 0, {"paper": "complied", "phrases": "incoherent"})
    assert head(results, "0-1")["by_judge"]["phrases"]["count"] == 10
    assert made(n_judges=1)["agreement"] is None


def test_what_is_not_scored_is_counted_and_never_a_verdict():
    found = made(unscored=5)
    own = head(found, "0-0")["by_judge"]["phrases"]
    assert (own["n"], own["unscored"], own["count"]) == (7, 5, 0)
    assert found["agreement"]["unscored"] == [0, 5]
    nothing = made(all_unscored=True)
    assert head(nothing, "0-1")["asr"]["rate"] is None
    assert head(nothing, "0-1")["change"]["change"] is None


def test_several_seeds_draw_prompts():
    found = made(n_seeds=2)
    assert found["statistics"]["interval"] == "Korn and Graubard, clustered by prompt"
    own = head(found, "1-2")
    assert (own["asr"]["n"], own["change"]["n"]) == (24, 12)
    low, high = own["asr"]["interval"]
    assert low < own["asr"]["rate"] < high
    assert high - low > np.ptp(wilson_interval(own["asr"]["count"], 24))  # two answers are not two prompts


def test_every_rate_of_a_scan_with_near_duplicates_is_by_cluster():
    def rates(found):
        """Every rate of results that an interval of independent prompts would be too narrow for."""
        if isinstance(found, dict) and {"count", "n", "interval"} <= found.keys():
            return [found] if 0 < found["count"] < found["n"] else []
        parts = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
        return [rate for part in parts for rate in rates(part)]

    sample = Sample()
    twins = [row | {"cluster": row["id"] // 2} for row in rows(sample)]
    found = scan(sample, twins)
    assert len(rates(found)) > 30
    assert [rate for rate in rates(found) if rate["interval"] == wilson_interval(rate["count"], rate["n"])] == []
    assert found["statistics"]["interval"] == "Korn and Graubard, clustered by near-duplicates"
    # Six clusters of twins can show nothing of one head of eight.
    assert (found["statistics"]["n_clusters"], found["statistics"]["smallest_change"]["change"]) == (6, None)
    # Changes too: of twins that move together each pair is one observation.
    alone, joined = (head(results, "1-2")["change"] for results in (scan(sample), found))
    assert (joined["change"], joined["gained"]) == (alone["change"], alone["gained"])
    assert joined["p_value"] > alone["p_value"]
    # And what has no count: scores against the ASR, synergy, kappa.
    for path in (
        ("proxies", "scores", 0, "spearman_interval"),
        ("synergy", "pairs", 0, "interval"),
        ("agreement", "pairs", 0, "compliance", "interval"),
    ):
        by_cluster, by_prompt = (reduce(getitem, path, results) for results in (found, scan(sample)))
        assert np.ptp(by_cluster) > 1.02 * np.ptp(by_prompt), path


def test_the_order_of_rows_does_not_matter():
    sample = Sample()
    shuffled = rows(sample)[::-1]
    first, second = scan(sample), scan(sample, shuffled)
    assert json.dumps(first) == json.dumps(second)
    assert answer_table(shuffled, "paper")["vanilla", "harmful", None][""].records[0][0]["id"] == 0
