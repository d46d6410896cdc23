"""Writes the tables of docs/families.md from what was measured: ``python tests/samples/families_table.py``."""

import re
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the oracle is

from families import FAMILIES, REFUSED, proved
from family_twins import measured

from safetyheads.model.architecture import Capabilities

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

# Of the largest value of the last hidden states, in float32.
STATES = 2e-5
SHIPS_NATS = 1e-5
# Between the paper's epsilon and exactly even weights.
LIMIT_NATS = 2e-4

COLUMNS = {each.name: each.name.replace("_", " ") for each in fields(Capabilities) if each.name != "caches"}
"""Quick path -> the head of its column."""


def page() -> str:
    """All of docs/families.md: its text as it is, its two tables anew."""
    heads = ["family", "unlike a plain Llama", *COLUMNS.values(), "ablations", "answers", "layers left out", "notes"]
    tables = [
        [heads, ["---"] * len(heads), *(_row(name) for name in FAMILIES)],
        [["family", "reason"], ["---"] * 2, *([f"`{name}`", refused.why] for name, refused in REFUSED.items())],
    ]
    made = iter("".join(f"| {' | '.join(cells)} |\n" for cells in table) for table in tables)
    return re.sub(r"^\| family \|.*\n(?:\|.*\n)*", lambda _: next(made), PAGE.read_text("utf-8"), flags=re.MULTILINE)


def _row(name: str) -> list[str]:
    family, engine, found = FAMILIES[name], proved(name), measured(name)
    quick = ["yes" if getattr(engine.capabilities, each) else "no" for each in COLUMNS]
    exact = [kind for kind, difference in found.states.items() if difference < STATES]
    ships = found.ships < SHIPS_NATS and found.limit < LIMIT_NATS
    notes = [f"{', '.join(COLUMNS[path] for path in family.given_up)}: {family.because}"] if family.given_up else []
    left_out = ", ".join(map(str, engine.architecture.without_heads))
    n_layers = engine.architecture.n_layers
    return [
        f"`{name}`",
        family.shows,
        *quick,
        f"{len(exact)} of {len(found.states)}" if ships else "Ships differ",
        "yes" if found.answers and found.drafts and engine.capabilities.caches else "no",
        f"{left_out} of 0-{n_layers - 1}" if left_out else "none",
        "; ".join(notes),
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
