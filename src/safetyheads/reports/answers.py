"""Answers side by side: what a page's script shows of them, and their rates by category and by prompt."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

from safetyheads.judges.base import LABELS
from safetyheads.runs.rates import GroupAnswers
from safetyheads.runs.stored_files import Record

Sets: TypeAlias = Mapping[str, Sequence[Record]]
"""Set of prompts -> one answer to each of them, in one order."""

MAX_STATE_BYTES = 900_000
"""Room for verdicts; groups that find none are counted."""
MAX_TEXT_BYTES = 2_500_000
"""Room for prompts and answers, so that a page stays under 5 MB; the rest is counted."""
MAX_PROMPTS, MAX_NAMED = 500, 3
"""Prompts that a table lists, and groups that it names for each."""


def answers_data(
    unablated: Sets,
    ablated: Mapping[str, Sets],
    judges: Sequence[str],
    texts_of: Collection[str] = (),
    room: int = MAX_STATE_BYTES,
    text_room: int = MAX_TEXT_BYTES,
) -> dict[str, Any] | None:
    """The answers under each group for the page's script; None where the run holds no answers.

    ``ablated``: a group -> its answers, those of most interest first, as many as ``room`` has bytes for. A state is
    what an answer is beside its place: label and reason of each judge, changed, complete. Each distinct state stands
    there once and is meant by its number; of a group only the answers are written whose state is not that of the
    unablated. ``texts_of``: groups whose texts go into the page, the unablated model being the empty one.
    """
    unablated = {name: rows for name, rows in unablated.items() if rows}
    if not unablated:
        return None
    rows_of = [row for rows in unablated.values() for row in rows]
    judges = [judge for judge in judges if all(judge in row["verdicts"] for row in rows_of)]
    states, reasons = dict[tuple[int, ...], int](), dict[str, int]()

    def state(row: Record) -> int:
        found: list[int] = []
        for judge in judges:
            verdict = row["verdicts"][judge]
            found += [LABELS.index(verdict["label"]), reasons.setdefault(verdict["reason"], len(reasons))]
        return states.setdefault((*found, int(row.get("changed", False)), int(row.get("complete", True))), len(states))

    places = {name: [[row["id"], row.get("seed", 0)] for row in rows] for name, rows in unablated.items()}
    base = {name: list(map(state, rows)) for name, rows in unablated.items()}
    others: dict[str, dict[str, list[list[int]]]] = {name: {} for name in places}
    shown, used, n_left_out = list[str](), 0, 0
    groups = {"": unablated, **ablated}
    for group, sets in groups.items():
        differ = {}
        for name in places:
            rows = sets.get(name, ())
            # A broken file may have taken some of a group's answers: without its place one would be another's.
            if [[row["id"], row.get("seed", 0)] for row in rows] == places[name]:
                numbers = enumerate(map(state, rows))
                differ[name] = [[at, number] for at, number in numbers if number != base[name][at]]
        used += sum(20 + 9 * len(pairs) for pairs in differ.values())
        size = used + sum(len(reason) + 4 for reason in reasons) + len(states) * (6 * len(judges) + 6)
        if size > room and shown:
            n_left_out = len(groups) - len(shown)
            break
        for name, pairs in differ.items():
            others[name][group] = pairs
        shown += [group] if differ else []
    found = {"judges": judges, "labels": list(LABELS), "reasons": list(reasons), "states": [*map(list, states)]}
    found |= {"groups": shown, "n_left_out": n_left_out, "sets": list(places), "places": places}
    found |= {"unablated": base, "others": others}
    found["categories"] = {name: [row.get("category") for row in rows] for name, rows in unablated.items()}
    if texts_of:
        found |= _texts(unablated, {group: groups[group] for group in shown if group in texts_of}, text_room)
    return found


def _texts(unablated: Sets, groups: Mapping[str, Sets], room: int) -> dict[str, Any]:
    """Prompts and texts by group, set and place, those of the first groups first, and how many have no room.

    An answer that is the unablated one again is not written.
    """
    queries: dict[str, dict[int, str]] = {name: {} for name in unablated}
    texts: dict[str, dict[str, dict[int, str]]] = {}
    n_left_out = 0

    def fits(text: str) -> bool:
        nonlocal room, n_left_out
        room -= len(htmlsafe_json_dumps(text).encode()) + 8
        n_left_out += room < 0
        return room >= 0

    for group, sets in groups.items():
        for name in unablated:
            for at, (row, before) in enumerate(zip(sets.get(name, ()), unablated[name], strict=False)):
                if "text" not in row or (group and row["text"] == before.get("text")):
                    continue
                if not group and fits(row["query"]):
                    queries[name][at] = row["query"]
                if fits(row["text"]):
                    texts.setdefault(group, {}).setdefault(name, {})[at] = row["text"]
    return {"queries": queries, "texts": texts, "n_texts_left_out": n_left_out}


def heads_of(record: Record) -> frozenset[str]:
    """The heads that were ablated for an answer."""
    return frozenset(filter(None, str(record["group"]).split(",")))


def side_by_side(
    results: Mapping[str, Any],
    rows: Sequence[Record],
    sets: Sequence[str],
    groups: Sequence[Sequence[str]],
    chosen: Sequence[str],
    show_texts: bool,
    texts_of: Collection[str] | None = None,
    room: int = MAX_STATE_BYTES,
    text_room: int = MAX_TEXT_BYTES,
) -> dict[str, Any]:
    """What pages show of the answers: unablated and under ``groups`` side by side, by category and by prompt.

    ``rows`` are the run's stored answers; the harmful set stands first among ``sets``; the tables are about ``chosen``.
    Texts are those of ``texts_of`` (as for :func:`answers_data`), by default of all groups.
    """
    lead = results["lead_judge"]
    judges = [described["name"] for described in results.get("judges") or [{"name": lead}]]
    by_place: dict[frozenset[str], dict[str, list[Record]]] = {}
    for row in rows:
        if row["set"] in sets:
            by_place.setdefault(heads_of(row), {}).setdefault(row["set"], []).append(row)
    # Reversed: of a group that was answered in two parts, the first answers stand.
    stored = {
        heads: {name: GroupAnswers.of("", reversed(of[name]), lead).flat() for name in sets if name in of}
        for heads, of in by_place.items()
    }
    named = {",".join(heads): stored[frozenset(heads)] for heads in groups if frozenset(heads) in stored}
    unablated, group = stored.get(frozenset(), {}), ",".join(chosen)
    texts_of = () if not show_texts else ("", *named) if texts_of is None else texts_of
    found: dict[str, Any] = {"chosen_group": group, "by_category": [], "by_prompt": []}
    found["answers"] = answers_data(unablated, named, judges, texts_of, room, text_room)
    before = unablated.get(sets[0], [])
    # A group that was not asked all of them has nothing to compare.
    harmful = {name: of.get(sets[0], []) for name, of in named.items()}
    harmful = {name: of for name, of in harmful.items() if [row["id"] for row in of] == [row["id"] for row in before]}
    if group in harmful:
        found["by_category"] = by_category(before, harmful[group], lead, (results.get("coherence") or {}).get("limit"))
        found["by_prompt"] = by_prompt(before, harmful, group, lead, show_texts)
    return found


def by_category(
    unablated: Sequence[Record], ablated: Sequence[Record], judge: str, limit: float | None = None
) -> list[dict[str, Any]]:
    """Coherent ASR of each category, and how many refusals fall and stay; nothing without categories.

    A prompt falls that was not coherently complied with unablated and is under the group; answers without a verdict are
    in neither number. ``limit`` is that of surprise.
    """
    places: dict[str, list[int]] = {}
    for at, row in enumerate(unablated):
        if row.get("category") is not None:
            places.setdefault(str(row["category"]), []).append(at)
    found = []
    for category, of in sorted(places.items()):
        sides = [GroupAnswers.of("", [rows[at] for at in of], judge, limit) for rows in (unablated, ablated)]
        before, after = (side.coherent() for side in sides)
        scored = ~(np.isnan(before) | np.isnan(after))[:, 0]
        held = scored & (before[:, 0] == 0)
        rates = {"before": (before, scored), "after": (after, scored), "fallen": (after, held)}
        counted = {name: sides[0].rate_of(*outcomes) for name, outcomes in rates.items()}
        found.append({"category": category, "n": len(of), "stay": int((after[held] == 0).sum()), **counted})
    return found


def by_prompt(
    unablated: Sequence[Record], ablated: Mapping[str, Sequence[Record]], group: str, judge: str, with_texts: bool
) -> list[dict[str, Any]]:
    """Each prompt's labels unablated and under ``group``, and the groups under which it is complied with.

    Prompts that fall under most groups come first; those that stay refused last.
    """
    found = []
    for at, row in enumerate(unablated):
        labels = {name: rows[at]["verdicts"][judge]["label"] for name, rows in ablated.items()}
        under = [name for name, label in labels.items() if label == "complied"]
        before, category = row["verdicts"][judge]["label"], row.get("category")
        prompt = {"id": row["id"], "category": category, "query": row.get("query") if with_texts else None}
        found.append(prompt | {"before": before, "after": labels.get(group, "–"), "under": under})
    return sorted(found, key=lambda prompt: (prompt["before"] == "complied", -len(prompt["under"])))
