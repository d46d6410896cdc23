"""The paper's numbers: whose they are, and that they stand beside its own models alone."""

import pytest

from safetyheads.baselines import METHODS
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.experiments.outcome import Measured, Outcome
from safetyheads.experiments.paper_numbers import paper_dataset, paper_model, paper_numbers, quoted
from safetyheads.experiments.table7_course_correction import show_ways


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b-chat"),
        ("models/vicuna-7b-v1.5/", "Vicuna-7b-v1.5"),
        ("meta-llama/Llama-2-13b-chat-hf", None),
        ("demo:aligned_a", None),
    ],
)
def test_numbers_are_quoted_for_the_papers_models_only(name, known):
    assert paper_model(name) == known


def test_quoted_datasets_and_methods_are_known_and_others_have_no_numbers():
    names = {*paper_numbers()["table7"], *quoted("changes", "Vicuna-7b-v1.5", "query", "SC")}
    assert {paper_dataset(f"data/{name.upper()}.jsonl") for name in names} == names
    assert set(paper_numbers()["table1"]) <= set(METHODS)
    assert quoted("changes", None, "query") is None
    assert quoted("table7", "own", "UA") is None


@pytest.mark.parametrize(
    ("model", "level", "ablation", "dataset", "mean"),
    [
        ("Llama-2-7b-chat", "dataset", "UA", "maliciousinstruct", 0.68),
        ("Llama-2-7b-chat", "query", "SC", "jailbreakbench", 0.30),
        ("Vicuna-7b-v1.5", "dataset", "UA", "jailbreakbench", 0.33),
        ("Vicuna-7b-v1.5", "query", "SC", "maliciousinstruct", 0.15),
    ],
)
def test_quoted_changes_have_the_papers_means(model, level, ablation, dataset, mean):
    # Table 3's own mean column, to its rounding.
    assert sum(quoted("changes", model, level, ablation, dataset)) / 5 == pytest.approx(mean, abs=0.0051)


@pytest.mark.parametrize(("model", "is_quoted"), [("Llama-2-7b-chat-hf", True), ("vicuna-7b-v1.5", False)])
def test_table_7_quotes_for_the_papers_model_alone(model, is_quoted):
    known = [(dataset, label) for dataset, labels in paper_numbers()["table7"].items() for label in labels]
    cells = [
        {"dataset": f"data/{dataset}.jsonl", "label": label, "p": None, "asr": Measured(0.5, 4)}
        for dataset, label in known
    ]
    outcome = Outcome("table7", "", "", shown=EXPERIMENTS["table7"].shown)
    show_ways(outcome, model, cells)
    expected = [quoted("table7", *place) if is_quoted else None for place in known]
    assert [row.get("paper") for row in outcome.tables[0].rows] == expected
    assert (outcome.tables[0].columns[-1].key == "paper") is is_quoted
