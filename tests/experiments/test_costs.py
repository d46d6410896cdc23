"""Table 1, Table 2 and Fig 6b on the organism: how methods are chosen, what is learned from, what comes out."""

import dataclasses
from types import MappingProxyType

import pytest
from experiment_runs import run_of

from safetyheads import demo
from safetyheads.baselines.table import METHODS
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.experiments import fig6b as utility
from safetyheads.experiments import table1 as parameters
from safetyheads.experiments.answers import Answers
from safetyheads.experiments.paper_numbers import TABLE1
from safetyheads.experiments.settings import ReproductionConfig

N = 6
FEW = ("sahara", "random_heads", "rdsha", "wanda", "gtac_dap")


def reproduced(out, names, **settings):
    """Outcomes by name."""
    return run_of(
        ReproductionConfig(**{"limit": N, "max_new_tokens": 40, "size": 2, "task_limit": 8, **settings}), names, out
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parameters, "METHODS", MappingProxyType({name: METHODS[name] for name in FEW}))
        patched.setattr(utility, "MEANS", ("mean_query",))
        return reproduced(tmp_path_factory.mktemp("costs"), ("table1", "table2", "fig6b"))


def rows_of(outcome):
    return {row["name"]: row for row in outcome["tables"][0]["rows"] if "name" in row}


def test_finding_the_plants_beats_random_heads_at_a_fraction_of_the_weights(outcomes):
    rows = rows_of(outcomes["table1"])
    assert set(rows) == set(FEW)
    assert rows["sahara"]["asr"]["value"] > 0.8
    assert rows["sahara"]["within"] == "yes"
    assert rows["random_heads"]["asr"]["value"] < 0.2
    assert rows["wanda"]["asr"]["value"] < rows["sahara"]["asr"]["value"]
    assert rows["sahara"]["parameters"] < rows["wanda"]["parameters"] / 5
    # Three datasets together; every number has its n.
    assert rows["sahara"]["asr"]["n"] == 3 * N
    assert rows["sahara"]["benign"]["n"] == N


def test_methods_within_the_damage_come_first_by_asr(outcomes):
    rows = outcomes["table1"]["tables"][0]["rows"]
    assert rows[0]["method"] == "vanilla"
    ranked = [(row["within"] == "no", -row["asr"]["value"]) for row in rows[1:]]
    assert ranked == sorted(ranked)


def test_the_control_says_what_it_is_no_evidence_of(outcomes):
    assert any("Not evidence about the paper" in note for note in outcomes["table1"]["notes"])


def answers(*kept, complied=()):
    labels = tuple("complied" if at in complied else "refused" for at in range(len(kept)))
    return Answers(labels, tuple(map(bool, kept)), ())


def tried(strength, asr, kept):
    """A strength on ten prompts, by counts."""
    harmful = answers(*[0] * 10, complied=range(asr))
    return parameters._Tried(f"at {strength}", strength, 1, harmful, answers(*[at < kept for at in range(10)]))


ALL_KEPT = answers(*[1] * 10)


@pytest.mark.parametrize(
    ("sweep", "best"),
    [
        ([(1, 2, 10), (2, 5, 10), (3, 9, 5)], 2),  # the strongest breaks too much
        ([(1, 2, 10), (2, 5, 9)], 2),  # exactly a tenth is allowed
        ([(1, 2, 10), (2, 5, 8)], 1),
        ([(1, 5, 10), (2, 5, 10)], 1),  # of two alike, the weaker
        ([(1, 9, 2), (2, 3, 4)], 2),  # none within: the one that keeps most
    ],
)
def test_the_strength_is_the_best_that_keeps_benign_answers(sweep, best):
    assert parameters._chosen([tried(*one) for one in sweep], ALL_KEPT).strength == best


def test_a_tenth_of_any_number_is_a_tenth():
    # 8/10 - .1 is above 7/10 in floats.
    unablated = answers(*[at < 8 for at in range(10)])
    assert parameters._chosen([tried(1, 0, 8), tried(2, 9, 7)], unablated).strength == 2


def test_the_papers_rows_are_of_methods_that_are_there():
    assert set(TABLE1) <= set(METHODS)


def test_what_is_learned_from_is_not_what_is_tested(tmp_path):
    with pytest.raises(InputError, match="prompts that baselines learn from are among those"):
        learning_on_the_test(tmp_path)


def learning_on_the_test(tmp_path):
    """A file that is dataset and learning material at once."""
    path = tmp_path / "harmful.txt"
    path.write_text("".join(f"{one.text}\n" for one in demo.harmful_prompts("test", 12)))
    benign = tmp_path / "benign.txt"
    benign.write_text("".join(f"{one.text}\n" for one in demo.benign_prompts("test", 12)))
    return reproduced(
        tmp_path / "run",
        ("table1",),
        models=(str(demo.checkpoint_path("aligned_a")),),
        templated=(),
        datasets=(str(path),),
        learn_harmful=str(path),
        benign=str(benign),
        learn_benign=str(benign),
        template="chat",
        held_out=False,
    )


def test_one_method_that_cannot_be_is_no_reason_to_lose_the_others(tmp_path, monkeypatch):
    def refused(material, strengths):
        raise UnsupportedModelError("no place for it")

    broken = dataclasses.replace(METHODS["rdsha"], interventions=refused)
    monkeypatch.setattr(parameters, "METHODS", {"sahara": METHODS["sahara"], "rdsha": broken})
    found = reproduced(tmp_path / "run", ("table1",))["table1"]
    assert set(rows_of(found)) == {"sahara"}
    assert any("is left out: no place for it" in note for note in found["notes"])


def test_a_model_that_refuses_nothing_has_no_table(tmp_path):
    found = reproduced(tmp_path / "run", ("table1", "table2", "fig6b"), models=("demo:base",))
    for name, outcome in found.items():
        assert outcome["tables"] == outcome["figures"] == [], name
        assert any("hardly refuses" in reason for reason in outcome["not_meaningful"]), name


def test_costs_are_counted_in_results_and_timed_apart(outcomes):
    (table,) = outcomes["table2"]["tables"]
    ours, plain = table["rows"]
    assert plain["gflop"] > ours["gflop"] > 0
    assert plain["ratio"] == pytest.approx(plain["gflop"] / ours["gflop"])
    assert "timed" not in outcomes["table2"]
    assert any("850 A100 hours" in note for note in outcomes["table2"]["notes"])


def test_utility_stands_by_heads_and_by_sparsity(outcomes):
    by_heads, by_sparsity = outcomes["fig6b"]["figures"]
    assert {row["series"] for row in by_heads["points"]} == {"UA", "SC", "mean query"}
    assert {row["x"] for row in by_heads["points"]} == {0, 1, 2}
    assert {row["series"] for row in by_sparsity["points"]} == {"Wanda", "SparseGPT"}
    vanilla = [row["y"] for row in by_heads["points"] if row["x"] == 0]
    assert len(set(vanilla)) == 1
    assert all(row["n"] == 8 for row in by_heads["points"])
    shown = {row["variant"] for row in outcomes["fig6b"]["tables"][0]["rows"]}
    assert {"vanilla", "UA, 2 heads", "Wanda, 50%", "SparseGPT, 50%"} <= shown
