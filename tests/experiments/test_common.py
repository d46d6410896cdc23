"""What experiments say in common: findings, notes, corrected p values, and sets of heads answered once."""

from __future__ import annotations

from typing import Any

import pytest

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.experiments.common import answered_once, corrected, in_a_sentence, mean_of, say_planted
from safetyheads.experiments.epsilons import swept_over
from safetyheads.experiments.fig5 import Pair, Ranking, in_words
from safetyheads.experiments.outcome import Draft
from safetyheads.experiments.paper_numbers import TABLE7, TABLE_3_AND_5, paper_dataset
from safetyheads.heads import Head
from safetyheads.stats.ranking import top_overlap

FIRST, SECOND, THIRD = Head(0, 1), Head(1, 0), Head(1, 2)


class Asked:
    """A subject that notes which groups it is asked for."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    def under(self, groups: list[Any], ablation: object, sampling: object) -> list[str]:
        self.calls.append(groups)
        return [str(group) for group in groups]


def test_each_set_of_heads_is_answered_once_whatever_its_order() -> None:
    subject: Any = Asked()
    groups = [(SECOND, FIRST), (FIRST, SECOND), (THIRD,), (SECOND, FIRST)]
    found = answered_once(subject, groups, UNDIFFERENTIATED_ATTENTION)
    assert subject.calls == [[(FIRST, SECOND), (THIRD,)]]
    assert list(found) == [(SECOND, FIRST), (FIRST, SECOND), (THIRD,)]
    assert found[SECOND, FIRST] == found[FIRST, SECOND] != found[(THIRD,)]


def test_no_group_is_no_question() -> None:
    subject: Any = Asked()
    assert answered_once(subject, [], UNDIFFERENTIATED_ATTENTION) == {}
    assert subject.calls == []


def test_rows_that_are_no_test_count_for_none_in_holm() -> None:
    # By hand: of two tests the smaller p is doubled, the larger stays.
    assert corrected([None, 0.2, None, 0.01]) == [None, 0.2, None, 0.02]
    assert corrected([]) == []
    assert corrected([None]) == [None]


def test_a_lone_model_is_not_named_in_its_finding() -> None:
    assert in_a_sentence({}) == ""
    assert in_a_sentence({"demo:aligned_a": "mean ASR 0.5 (n 6)"}) == "Mean ASR 0.5 (n 6)."
    assert in_a_sentence({"a": "x (n 6)", "b": "y (n 6)"}) == "a: x (n 6); b: y (n 6)."


def test_a_mean_is_of_what_was_measured() -> None:
    assert mean_of([0.5, None, 1.0]) == "0.75"
    assert mean_of([0.5], signed=True) == "+0.50"
    assert mean_of([None]) == "–"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("demo:aligned_a", "which heads are found was built in, since refusals were planted in 1-3"),
        ("demo:aligned_diffuse", "a small model made for this package"),
        ("demo:base", "a small model made for this package"),
    ],
)
def test_every_embedded_model_says_what_it_is_no_evidence_of(model: str, said: str) -> None:
    draft = Draft()
    say_planted(draft, model, "which heads are found was built in")
    (note,) = draft.notes
    assert note.startswith(f"{model}: {said}")
    assert "Not evidence about the paper" in note


def test_of_other_models_nothing_is_said() -> None:
    draft = Draft()
    say_planted(draft, "meta-llama/Llama-2-7b-chat-hf", "which heads are found was built in")
    assert draft.notes == []


@pytest.mark.parametrize(
    ("epsilons", "said"),
    [
        (
            (1.0, 0.1, 0.0),
            "Epsilons from 1 to 0; 1 is no ablation; 0, at the left end of a figure, is the exact limit.",
        ),
        ((0.5, 1e-5), "Epsilons from 0.5 to 1e-05."),
        ((1e-3,), "Epsilon 0.001."),
    ],
)
def test_ends_of_a_sweep_are_explained_where_they_are_among_it(epsilons: tuple[float, ...], said: str) -> None:
    assert swept_over(epsilons) == said


def test_the_papers_tables_know_a_dataset_by_its_file() -> None:
    names = set(TABLE7) | {dataset for *_, dataset in TABLE_3_AND_5}
    assert {paper_dataset(f"data/{name.upper()}.jsonl") for name in names} == names
    assert paper_dataset("AdvBench") == "advbench"


def test_an_overlap_tells_the_pairs_of_each_comparison_and_chance() -> None:
    def pair(comparison: str, one: tuple[str, ...], other: tuple[str, ...]) -> Pair:
        rankings = (Ranking("m", "theft", "UA", heads) for heads in (one, other))
        return Pair(comparison, *rankings, top_overlap(3, one, other, 32))

    first = ("1-3", "2-1", "2-5")
    pairs = [
        pair("UA against SC", first, first),
        pair("UA against SC", first, ("1-3", "0-0", "0-1")),
        pair("models, UA", first, ("0-0", "0-1", "0-2")),
    ]
    assert in_words(pairs, 32) == (
        "heads shared of the top 3 of 32, where chance gives 0.28: UA against SC: 1–3 (n 2 pairs); models, UA: 0 "
        "(n 1 pair)"
    )
