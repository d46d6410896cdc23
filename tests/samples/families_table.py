"""Writes docs/families.md from what was measured: ``python tests/samples/families_table.py``."""

from __future__ import annotations

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

COLUMNS = {
    "packs": "packs",
    "segments": "segments",
    "replays": "replays",
    "prunes": "prunes",
    "starts_late": "starts late",
    "plain_head": "plain head",
    "pads": "pads",
}
"""Quick path -> the head of its column."""

INTRODUCTION = """\
# Families

`python tests/samples/families_table.py` writes this page from what the tests measure. A test fails if it is out of
date.

Each row is a tiny random model of the family. Its slow twin runs one prompt and one head or group at a time through
the family's own code, with the softmax written out token by token; it packs nothing, replays nothing and caches
nothing. By the quick paths and by the plain one, these hold in float32:

- The last hidden states differ by less than 2e-5 of the largest: under every kind of ablation, for single heads of the
  first, a middle and the last layer, for heads that share their keys, and for groups over several layers.
- Ships of the single heads differ by less than 1e-5 nats. At the paper's epsilon they differ by less than 2e-4 nats
  from Ships under exactly even weights.
- Greedy answers are the twin's, token by token. Prompts of unequal length share a left-padded batch with a cache, each
  row under its own group; a scaled key, and for alternate families a scaled query or output, is tested. Answers by
  drafts equal the plain ones.

A quick path that is not exact on a family costs time, never exactness: the proofs at load test it on the loaded
weights (`safetyheads check MODEL` prints them), and the plain path is taken instead. The package knows no family by
name.

- **packs**: prompts share a row. **segments**: attention is taken prompt by prompt in it.
- **replays**: only the layers from the ablated one on run again. **starts late**: the ablated layer starts from its
  heads' outputs. **prunes**: only last tokens get past the last layer's attention.
- **plain head**: logits are the head of the normed state; else the family's own forward makes them.
- **pads**: prompts of unequal length are answered in one batch; else a batch holds prompts of one length.
- **ablations**: how many of the six kinds equal the twin. **answers**: whether answers do, plainly and by drafts.
"""

NOTES = """
## What undifferentiated attention is

Attention that is uniform over the keys that the mask allows the token: those of the window in a sliding layer, of
the chunk in a chunked one, those an indexer chose, and never padding. A sink keeps the share that it has against
even scores: the keys' weights are equal, and with the sink's they sum to 1. At the paper's epsilon of 1e-5 scores
are not quite equal; the tests above hold Ships to 2e-4 nats of the exact limit (measured: 2e-5).

The mean key of a layer with one key head is that head's own: `mean_key` does nothing there (Gemma).

## Layers without heads

Linear attention, state spaces and convolutions mix tokens too, but have no attention heads: their layers are left
out, tables of scores hold no number there, and runs and reports say so. Prompts are not packed in such models,
since what a layer carries from token to token would run from one prompt into the next.

## Lengths

Windows, chunks, temperatures of positions (`floor_scale`), chosen keys (`index_topk`) and long-context RoPE
(`longrope`) come into play beyond some length only. The proofs at load go beyond every such length that a row of 64
tokens reaches; a run whose rows reach further proves the model again, at that length, before it goes on. Where RoPE
turns while an answer is being made, the rows are read anew; prompts on both sides of the turn never share a batch.
Drafts are compared under the RoPE of the whole row there, so that answers which cross the turn are decoded plainly.

## Refused
"""


def page() -> str:
    """All of docs/families.md."""
    heads = ["family", "unlike a plain Llama", *COLUMNS.values(), "ablations", "answers", "layers left out", "notes"]
    lines = [INTRODUCTION, _line(heads), _line(["---"] * len(heads)), *(_row(name) for name in FAMILIES), NOTES]
    lines += [_line(["family", "reason"]), _line(["---"] * 2)]
    lines += [_line([f"`{name}`", refused.why]) for name, refused in REFUSED.items()]
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    family, engine, found = FAMILIES[name], proved(name), measured(name)
    quick = ["yes" if getattr(engine.capabilities, each) else "no" for each in COLUMNS]
    exact = [kind for kind, difference in found.states.items() if difference < STATES]
    ships = found.ships < SHIPS_NATS and found.limit < LIMIT_NATS
    missing = [
        f"{each.name} is not in the table" for each in fields(Capabilities) if each.name not in (*COLUMNS, "caches")
    ]
    notes = [f"{', '.join(COLUMNS[path] for path in family.given_up)}: {family.because}"] if family.given_up else []
    left_out = ", ".join(map(str, engine.architecture.without_heads))
    n_layers = engine.architecture.n_layers
    return _line(
        [
            f"`{name}`",
            family.shows,
            *quick,
            f"{len(exact)} of {len(found.states)}" if ships else "Ships differ",
            "yes" if found.answers and found.drafts and engine.capabilities.caches else "no",
            f"{left_out} of 0-{n_layers - 1}" if left_out else "none",
            "; ".join([*notes, *missing]),
        ]
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
