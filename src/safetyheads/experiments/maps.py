"""Attention maps of an ablated head (Fig 7, 8). Owns which head, prompt and ablations are shown; draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.experiments.attention_maps import NOTHING, AttentionMap, Evenness, evenness, map_of
from safetyheads.experiments.common import found_group, meaningful_subjects, search_half
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.experiments.settings import ORGANISM

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment
    from safetyheads.experiments.lab import Lab, Subject
    from safetyheads.heads import Head

EPSILONS = (5e-1, 1e-3, 1e-10)
"""Strengths of Fig 7."""
TOKENS_DRAWN = 40
"""Of a longer prompt, this many tokens at its end are drawn; distances are over all of it."""
_UNABLATED = "unablated"
_SCALED = (
    ("UA on query", "undifferentiated_attention"),
    ("UA on key", "undifferentiated_attention_key"),
    ("SC", "scaling_contribution"),
)
_MEANS = (("mean query", "mean_query"), ("mean key", "mean_key"), ("mean head output", "mean_head_output"))


@dataclass(frozen=True, slots=True)
class _Shown:
    """One map with its name."""

    label: str
    found: AttentionMap
    even: Evenness
    output: float
    """Norm of what the head passes on, of the unablated norm."""


def fig7(lab: Lab, about: Experiment) -> Outcome:
    """One head's map under UA on query and on key, and under SC, at three strengths."""
    wanted = [
        (f"{label}, epsilon {epsilon:g}", Ablation(name, epsilon)) for label, name in _SCALED for epsilon in EPSILONS
    ]
    said = (
        "UA scales the head's query, or its key (where heads share keys, by way of the query, which gives the same "
        "scores); SC scales what the head passes on, so its map stays."
    )
    return _maps(lab, about, wanted, said)


def fig8(lab: Lab, about: Experiment) -> Outcome:
    """One head's map with its query, key or output replaced by the mean over the heads of its layer."""
    said = (
        "The head's query, key or output is replaced by the mean over the heads of its layer (Sec 5.3); the last one "
        "leaves its map."
    )
    return _maps(lab, about, [(label, Ablation(name)) for label, name in _MEANS], said)


def _maps(lab: Lab, about: Experiment, wanted: Sequence[tuple[str, Ablation]], said: str) -> Outcome:
    draft = Draft()
    for model in lab.config.models:
        subject = next(meaningful_subjects(lab, model, draft), None)
        if subject is None:
            continue
        (head,) = found_group(subject, lab.ablations[0], 1)
        shown = _shown(lab, subject, head, [(_UNABLATED, NOTHING), *wanted])
        _show(draft, subject, head, shown, said)
        if model.startswith(ORGANISM):
            draft.notes.append(f"{model}: the map of a head of an embedded model is not evidence about the paper.")
    return draft.finished(about.name, about.title, about.question)


def _shown(lab: Lab, subject: Subject, head: Head, wanted: Sequence[tuple[str, Ablation]]) -> list[_Shown]:
    """The maps of the first prompt, kept in the run directory."""
    token_ids = subject.engine.ask(subject.prompts).token_ids[0]
    maps = []
    for label, ablation in wanted:
        fields = {
            "weights": lab.weights_of(subject.model),
            "token_ids": list(token_ids),
            "head": str(head),
            "ablation": asdict(ablation),
        }

        def compute(ablation: Ablation = ablation) -> dict[str, Tensor]:
            found = map_of(subject.engine, token_ids, head, ablation)
            return {name: getattr(found, name) for name in found.__dataclass_fields__}

        maps.append((label, AttentionMap(**lab.run.tensors(f"maps-{subject.name}", fields, compute))))
    whole = float(maps[0][1].output.norm())
    return [_Shown(label, found, evenness(found), float(found.output.norm()) / whole) for label, found in maps]


def _show(draft: Draft, subject: Subject, head: Head, shown: Sequence[_Shown], said: str) -> None:
    n_searched, dataset = len(search_half(subject).prompts), subject.dataset
    about = (
        f"Head {head}, the first that Sahara finds under UA at epsilon {subject.lab.config.epsilon:g} on {n_searched} "
        f"prompts of {dataset} (by {subject.lab.config.search_score}), on the first test prompt of {dataset}, "
        f"{subject.asked}. {said}"
    )
    n_tokens = len(shown[0].found.weights)
    cut = f" The last {TOKENS_DRAWN} of {n_tokens} tokens are drawn." if n_tokens > TOKENS_DRAWN else ""
    draft.figures.append(
        Figure(
            "attention",
            f"{subject.model}, head {head}",
            f"{about} One prompt, {n_tokens} tokens; keys that the mask hides are left out.{cut}",
            "key",
            "query",
            tuple(row for one in shown for row in _points(subject, one)),
            value="attention, from 0 to 1",
        )
    )
    draft.tables.append(_table(subject, head, shown, about))


def _points(subject: Subject, one: _Shown) -> list[Row]:
    token_ids = subject.engine.ask(subject.prompts).token_ids[0]
    tokens = [str(subject.engine.tokenizer.decode([token])) for token in token_ids]
    first, weights = max(0, len(tokens) - TOKENS_DRAWN), one.found.weights
    return [
        {
            "query": query,
            "key": key,
            "query_token": tokens[query],
            "key_token": tokens[key],
            "value": round(float(weights[query, key]), 6),  # as many as a colour can show
            "panel": one.label,
        }
        for query in range(first, len(tokens))
        for key in range(first, query + 1)
        if bool(one.found.allowed[query, key])
    ]


def _table(subject: Subject, head: Head, shown: Sequence[_Shown], about: str) -> Table:
    """How far each map is from even attention and from the unablated map."""
    unablated = shown[0].found.weights
    rows: list[Row] = []
    for one in shown:
        n = one.even.n
        chooses = one.found.allowed.sum(dim=-1) > 1
        moved = float((one.found.weights - unablated).abs().sum(dim=-1)[chooses].mean()) / 2
        rows.append(
            {
                "ablation": one.label,
                "total_variation": Measured(one.even.total_variation, n),
                "kl": Measured(one.even.kl, n),
                "moved": Measured(moved, n),
                "output": one.output,
                "sink": one.even.sink,
                "n": n,
            }
        )
    columns = [
        Column("ablation", "ablation"),
        Column("total_variation", "from even, total variation (0-1)", "number"),
        Column("kl", "from even, KL (nats)", "number"),
        Column("moved", "from unablated, total variation (0-1)", "number"),
        Column("output", "norm of output (of unablated)", "number"),
        Column("n", "n queries", "count"),
    ]
    if any(one.even.sink > _NO_SINK for one in shown):
        columns.insert(-1, Column("sink", "attention that a sink has", "number"))
    caption = (
        f"{about} Means over the n queries that may see two keys or more; even: the same share for each key that the "
        "mask allows. The queries are of one prompt and no sample, so there is no interval."
    )
    return Table(f"{subject.model}, head {head}: distance from even attention", caption, tuple(columns), tuple(rows))


_NO_SINK = 0.01
"""Less than this is what rounding leaves of a row that sums to 1, bfloat16's included."""
