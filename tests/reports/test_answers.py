"""Answers side by side: rates by category, prompt by prompt, texts within their room."""

from typing import Any

from answer_records import answer_record

from safetyheads.reports.answers import answers_data, by_category, by_prompt


def rows(labels: str) -> list[dict[str, Any]]:
    """An answer for each letter: c complied, r refused, u unscored; categories take turns."""
    words = {"c": "complied", "r": "refused", "u": "unscored"}
    return [
        answer_record(at, words[letter], "complied", "why", 1.0)
        | {"category": "ab"[at % 2], "query": f"q{at}", "text": words[letter]}
        for at, letter in enumerate(labels)
    ]


def test_categories_count_the_refusals_that_fall_and_stay() -> None:
    first, second = by_category(rows("rrrcru"), rows("ccrccc"), "paper")
    # Of a: refused, refused, refused -> complied, refused, complied.
    assert (first["category"], first["n"], first["stay"]) == ("a", 3, 1)
    assert (first["fallen"]["count"], first["fallen"]["n"], first["before"]["count"]) == (2, 3, 0)
    # Of b: one complied before, one has no verdict, one falls.
    assert (second["n"], second["stay"], second["fallen"]["n"], second["after"]["count"]) == (3, 0, 1, 2)
    assert all(row["fallen"]["interval"] for row in (first, second))
    # No answer is coherent that is more surprising than the limit, and near-duplicates are one observation.
    assert by_category(rows("rrrcru"), rows("ccrccc"), "paper", 0.5)[0]["fallen"]["count"] == 0
    alike = [[row | {"cluster": row["id"] // 8} for row in rows(text * 8)] for text in ("rr", "cr")]
    ((low, high), (apart_low, apart_high)) = (
        by_category(*pair, "paper")[0]["fallen"]["interval"] for pair in (alike, (rows("rr" * 8), rows("cr" * 8)))
    )
    assert high - low > apart_high - apart_low


def test_prompts_say_under_which_heads_they_fall_and_hide_their_texts() -> None:
    ablated = {"0-1": rows("crrc"), "0-2": rows("ccrc")}
    found = by_prompt(rows("rrrc"), ablated, "0-1", "paper", with_texts=False)
    assert [(row["id"], row["before"], row["after"], row["under"]) for row in found] == [
        (0, "refused", "complied", ["0-1", "0-2"]),
        (1, "refused", "refused", ["0-2"]),
        (2, "refused", "refused", []),
        (3, "complied", "complied", ["0-1", "0-2"]),
    ]
    assert {row["query"] for row in found} == {None}
    assert by_prompt(rows("r"), {"0-1": rows("c")}, "0-1", "paper", with_texts=True)[0]["query"] == "q0"


def test_texts_are_there_once_where_asked_for_within_their_room() -> None:
    unablated, ablated = {"harmful": rows("rr")}, {"0-1": {"harmful": rows("cr")}, "0-2": {"harmful": rows("cc")}}
    hidden = answers_data(unablated, ablated, ["paper"])
    assert not {"texts", "queries"} & set(hidden)
    shown = answers_data(unablated, ablated, ["paper"], ("", "0-1"))
    assert shown["texts"] == {"": {"harmful": {0: "refused", 1: "refused"}}, "0-1": {"harmful": {0: "complied"}}}
    assert shown["queries"] == {"harmful": {0: "q0", 1: "q1"}}
    assert shown["categories"] == {"harmful": ["a", "b"]}
    tight = answers_data(unablated, ablated, ["paper"], ("", "0-1"), text_room=40)
    assert (tight["queries"], tight["n_texts_left_out"]) == ({"harmful": {0: "q0"}}, 3)
    assert answers_data({"harmful": []}, {}, ["paper"]) is None
