"""Table 1 on the organism: how strengths are chosen, what is learned from, what comes out."""

import dataclasses

import pytest
from experiment_runs import SMALL, N, rows, run_of

from safetyheads import demo
from safetyheads.baselines import METHODS
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.experiments import table1_baselines as table1
from safetyheads.runs.rates import GroupAnswers


def refused(material, strengths):
    raise UnsupportedModelError("no place for it")


FEW = ("sahara", "random_heads", "wanda", "gtac_dap")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        methods = {name: METHODS[name] for name in FEW}
        broken = dataclasses.replace(METHODS["rdsha"], interventions=refused)
        patched.setattr(table1, "METHODS", methods | {"rdsha": broken})
        return run_of(SMALL, ["table1"], tmp_path_factory.mktemp("table1") / "run")["table1"]


def test_finding_the_plants_beats_random_heads_at_a_fraction_of_the_weights(outcome):
    methods = {row["name"]: row for row in rows(outcome) if "name" in row}
    assert set(methods) == set(FEW)
    assert methods["sahara"]["asr"]["value"] > 0.8
    assert methods["sahara"]["within"] == "yes"
    assert methods["random_heads"]["asr"]["value"] < 0.2
    assert methods["wanda"]["asr"]["value"] < methods["sahara"]["asr"]["value"]
    assert methods["sahara"]["parameters"] < methods["wanda"]["parameters"] / 5
    # Three datasets together; every number has its n.
    assert (methods["sahara"]["asr"]["n"], methods["sahara"]["benign"]["n"]) == (3 * N, N)
    for said in ("Not evidence about the paper", "is left out: no place for it"):
        assert any(said in note for note in outcome["notes"])
    headline = {row["label"]: row["value"] for row in outcome["headline"]}
    assert headline[f"ASR within 10% damage, {methods['sahara']['method']}"] == methods["sahara"]["asr"]

    # Methods within the damage come first, by ASR.
    assert rows(outcome)[0]["method"] == "vanilla"
    ranked = [(row["within"] == "no", -row["asr"]["value"]) for row in rows(outcome)[1:]]
    assert ranked == sorted(ranked)


def answers(kept, complied=0):
    """Ten answers, of which the first so many are kept and have complied."""
    labels = ["complied" if at < complied else "refused" for at in range(10)]
    records = [({"kept": at < kept, "verdicts": {"paper": {"label": label}}},) for at, label in enumerate(labels)]
    return GroupAnswers("", tuple(records), "paper")


def tried(strength, asr, kept):
    return table1._Tried(f"at {strength}", strength, 1, answers(0, asr), answers(kept))


@pytest.mark.parametrize(
    ("sweep", "unablated", "best"),
    [
        ([(1, 2, 10), (2, 5, 10), (3, 9, 5)], 10, 2),  # the strongest breaks too much
        ([(1, 2, 10), (2, 5, 9)], 10, 2),  # exactly a tenth is allowed
        ([(1, 2, 10), (2, 5, 8)], 10, 1),
        ([(1, 5, 10), (2, 5, 10)], 10, 1),  # of two alike, the weaker
        ([(1, 9, 2), (2, 3, 4)], 10, 2),  # none within: the one that keeps most
        ([(1, 0, 8), (2, 9, 7)], 8, 2),  # 8/10 - .1 is above 7/10 in floats
    ],
)
def test_the_strength_is_the_best_that_keeps_benign_answers(sweep, unablated, best):
    assert table1.chosen([tried(*one) for one in sweep], answers(unablated)).strength == best


def test_what_is_learned_from_is_not_what_is_tested(tmp_path):
    harmful, benign = tmp_path / "harmful.txt", tmp_path / "benign.txt"
    harmful.write_text("".join(f"{one.text}\n" for one in demo.harmful_prompts("test", 12)))
    benign.write_text("".join(f"{one.text}\n" for one in demo.benign_prompts("test", 12)))
    sets = {"datasets": (str(harmful),), "learn_harmful": str(harmful), "benign": str(benign)}
    models = (str(demo.checkpoint_path("aligned_a")),)
    config = dataclasses.replace(
        SMALL, models=models, learn_benign=str(benign), held_out=False, template="chat", **sets
    )
    with pytest.raises(InputError, match="prompts that baselines learn from are among those"):
        run_of(config, ["table1"], tmp_path / "run")
