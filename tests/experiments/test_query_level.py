"""Fig 2, 11 and 12 on the organism with four wrappers: what its construction implies."""

import pytest
from experiment_runs import run_of

from safetyheads.experiments.settings import ReproductionConfig

N = 6


def reproduced(out, names, **settings):
    """Outcomes by name."""
    return run_of(ReproductionConfig(limit=N, max_new_tokens=40, **settings), names, out)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return reproduced(
        tmp_path_factory.mktemp("query"), ("fig2", "fig11", "fig12"), templates=("query_answer",), query_size=3
    )


def points(outcome):
    (figure,) = outcome["figures"]
    return figure["points"]


def test_one_head_a_prompt_raises_the_asr_of_every_dataset(outcomes):
    greedy = [row for row in points(outcomes["fig2"]) if row["panel"].endswith("greedy")]
    for ablation in ("UA", "SC"):
        rates = [row["y"] for row in greedy if row["series"] == ablation]
        assert all(rate > 0 for rate in rates)
        # Each category has a plant of its own, with thinner margins than under the chat template alone.
        assert sum(rates) / len(rates) > 0.3
    assert all(row["y"] == 0 for row in greedy if row["series"] == "vanilla")


def test_every_bar_has_its_n_and_interval(outcomes):
    for name, outcome in outcomes.items():
        for row in points(outcome):
            assert row["n"] == N, name
            assert row["low"] <= row["y"] <= row["high"]
        (table,) = outcome["tables"]
        assert len(table["rows"]) == len(points(outcome))


def test_sizes_begin_at_the_vanilla_model(outcomes):
    for name in ("fig11", "fig12"):
        rows = [row for row in points(outcomes[name]) if row["series"] == "theft" and row["panel"].endswith("greedy")]
        assert [row["x"] for row in rows] == [0, 1, 2, 3]
        assert rows[0]["y"] == 0
        assert max(row["y"] for row in rows) >= 0.5


def test_both_samplings_stand_side_by_side(outcomes):
    assert {row["panel"] for row in points(outcomes["fig2"])} == {
        "template query_answer, greedy",
        "template query_answer, top-5",
    }


def test_captions_say_what_stands_for_the_unablated_model_and_how_strong_ablations_are(outcomes):
    said = {"fig2": "vanilla: the unablated model", "fig11": "at 0 heads the unablated model"}
    for name, outcome in outcomes.items():
        for made in (*outcome["figures"], *outcome["tables"]):
            assert said.get(name, said["fig11"]) in made["caption"]
            assert "epsilon 1e-05" in made["caption"]
            assert f"n = {N}." in made["caption"]
        assert "0 heads" not in outcomes["fig2"]["figures"][0]["caption"]
        assert any("Not evidence about the paper" in note for note in outcome["notes"])


def test_a_model_that_answers_all_is_not_tabled(tmp_path):
    found = reproduced(tmp_path / "run", ("fig2",), templates=("query_answer",), templated=("demo:base_wrapped",))
    assert found["fig2"]["tables"] == found["fig2"]["figures"] == []
    assert found["fig2"]["notes"] == []
    assert any("hardly refuses" in reason for reason in found["fig2"]["not_meaningful"])


def test_a_template_that_the_model_does_not_know_is_not_tabled(tmp_path):
    found = reproduced(tmp_path / "run", ("fig2",), templates=("query_answer",), templated=("demo:aligned_a",))
    assert found["fig2"]["tables"] == []
    assert any("it keeps 0.00" in reason for reason in found["fig2"]["not_meaningful"])
