"""The answers of a scan as its page needs them: in short for the drill-down, and in full where they are asked for.

Owns how rows are put into few bytes, and how many of them the page holds; refuses to know what the page says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.judges.base import LABELS
from safetyheads.runs.tables import Answered, Row, RowTable

if TYPE_CHECKING:
    from safetyheads.runs.directory import RunDirectory

State: TypeAlias = tuple[int, ...]
"""A row without its place: label and reason of each judge, then changed, complete."""

MAX_DRILL_BYTES = 900_000
"""Room for the rows of the drill-down; heads that find none are counted."""
SETS = ("harmful", "benign")
"""The sets of prompts, the first one first."""
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
_SHORT = ("id", "set", "part", "group", "epsilon", "seed", "changed", "complete", "kept", "verdicts")
_TEXTS = ("query", "text")


@dataclass(frozen=True, slots=True)
class DrillRows:
    """What the drill-down shows."""

    data: dict[str, Any]
    """For the page's script, which :func:`decoded_rows` is the slow twin of."""
    shown: tuple[str, ...]
    """Heads with rows in the page, in the order given; the empty one is the unablated model."""
    n_left_out: int
    """Heads for whose rows there was no room."""


def judged_rows(run: RunDirectory, with_texts_of: frozenset[str] = frozenset()) -> Iterator[Row]:
    """The judged answers of a run, with the verdicts of later judges beside those of its own.

    Args:
        run: the run directory of a scan.
        with_texts_of: what was ablated in the rows that keep their texts; the others take no memory for theirs.
    """
    from safetyheads.runs.rejudge import identity

    later: dict[str, dict[str, Any]] = {}
    for row in run.stored_records():
        if "of" in row:
            later.setdefault(row["of"], {})[row["judge"]] = row["verdict"]
    for row in run.stored_records():
        if "verdicts" not in row:
            continue
        kept = {name: row[name] for name in _SHORT}
        if later:
            kept["verdicts"] = {**row["verdicts"], **later.get(identity(row), {})}
        if row["group"] in with_texts_of:
            kept |= {name: row[name] for name in _TEXTS if name in row}
        yield kept


def answers_of(table: RowTable, name: str, head: str, epsilon: float) -> Answered | None:
    """The answers to a set under one head, or unablated where the head is the empty one."""
    return table.part("heads", name, epsilon).get(head) if head else table.vanilla(name)


@dataclass
class _States:
    """Distinct states, numbered as they come; every one is written once and meant by its number."""

    judges: Sequence[str]
    numbers: dict[State, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def number(self, row: Row) -> int:
        state: list[int] = []
        for judge in self.judges:
            verdict = row["verdicts"][judge]
            state += [LABELS.index(verdict["label"]), self.reasons.setdefault(verdict["reason"], len(self.reasons))]
        state += [int(row["changed"]), int(row["complete"])]
        return self.numbers.setdefault(tuple(state), len(self.numbers))

    @property
    def size(self) -> int:
        """Bytes of the tables so far, roughly."""
        return sum(len(reason) + 4 for reason in self.reasons) + len(self.numbers) * (6 * len(self.judges) + 6)


def drill_rows(
    table: RowTable, heads: Sequence[str], judges: Sequence[str], epsilon: float, room: int = MAX_DRILL_BYTES
) -> DrillRows:
    """The rows of the heads, as many as there is room for, first ones first.

    Args:
        table: all rows.
        heads: the empty one, which is the unablated model, and the others by interest.
        judges: whose verdicts are shown.
        epsilon: strength of the ablation.
        room: bytes.
    """
    states = _States(judges)
    places = {name: _places(table.vanilla(name)) for name in SETS}
    numbers: dict[str, dict[str, list[int]]] = {name: {} for name in SETS if places[name]}
    shown: list[str] = []
    used = 0
    for head in heads:
        own = {name: answers_of(table, name, head, epsilon) for name in numbers}
        for name, answered in own.items():
            # A broken file may have taken some of a head's rows: without its place a row would be another's.
            if answered is not None and _places(answered) == places[name]:
                numbers[name][head] = [states.number(row) for prompt in answered.rows for row in prompt]
                used += 3 * len(numbers[name][head]) + 12
        if used + states.size > room and shown:
            for rows in numbers.values():
                rows.pop(head, None)
            break
        if any(head in rows for rows in numbers.values()):
            shown.append(head)
    width = 1 if len(states.numbers) <= 64 else 2 if len(states.numbers) <= 64**2 else 3
    data = {
        "judges": list(judges),
        "labels": list(LABELS),
        "reasons": list(states.reasons),
        "states": [list(state) for state in states.numbers],
        "digits": _DIGITS,
        "width": width,
        "heads": shown,
        "sets": list(numbers),
        "places": {name: places[name] for name in numbers},
        "rows": {
            name: {head: "".join(_digits(number, width) for number in row) for head, row in rows.items()}
            for name, rows in numbers.items()
        },
    }
    return DrillRows(data, tuple(shown), len(heads) - len(shown))


def decoded_rows(data: Mapping[str, Any], name: str, head: str) -> list[dict[str, Any]]:
    """The rows behind one head's digits, as the page's script reads them."""
    text, width, n_judges = data["rows"][name][head], data["width"], len(data["judges"])
    found = []
    for at, (prompt, seed) in enumerate(data["places"][name]):
        number = 0
        for digit in text[at * width : (at + 1) * width]:
            number = number * len(_DIGITS) + _DIGITS.index(digit)
        state = data["states"][number]
        verdicts = {
            judge: (data["labels"][state[2 * i]], data["reasons"][state[2 * i + 1]])
            for i, judge in enumerate(data["judges"])
        }
        changed, complete = map(bool, state[2 * n_judges :])
        found.append({"id": prompt, "seed": seed, "verdicts": verdicts, "changed": changed, "complete": complete})
    return found


def _places(answered: Answered | None) -> list[list[int]]:
    """Prompt and seed of each row."""
    if answered is None:
        return []
    return [[row["id"], row["seed"]] for prompt in answered.rows for row in prompt]


def _digits(number: int, width: int) -> str:
    digits = ""
    for _ in range(width):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits


# In full.


def titled_completions(
    rows: Iterable[Row], heads: Sequence[str], judges: Sequence[str], epsilon: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Completions with the title of their set: harmful ones first, unablated first, then head by head."""
    sets: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        wanted = row["part"] == "vanilla" or (row["part"] == "heads" and row["epsilon"] == epsilon)
        if wanted and "text" in row:
            sets.setdefault((row["set"], row["group"]), []).append(row)
    for name in SETS:
        for head in heads:
            title = f"{name} prompts, {f'{head} ablated' if head else 'nothing ablated'}"
            for row in sorted(sets.get((name, head), ()), key=lambda row: (row["id"], row["seed"])):
                said = [f"{judge}: {row['verdicts'][judge]['label']}" for judge in judges if judge in row["verdicts"]]
                reason = row["verdicts"][judges[0]]["reason"]
                cut = "" if row["complete"] else "; cut where every judge was final"
                label = f"prompt {row['id']}, {', '.join(said)}"
                yield title, {"query": row["query"], "text": row["text"], "label": label, "reason": reason + cut}
