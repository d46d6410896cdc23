"""``safetyheads ships``: every head's mean Ships, or with ``--screen`` the exact scores of the best forecasts.

Owns what the command computes, as JSON; the terminal's look is elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from safetyheads.runs.config import ScreenOptions, ShipsConfig

if TYPE_CHECKING:
    from safetyheads.heads import Head
    from safetyheads.measures.screened_scores import Extent, Missed, Proposal
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet
    from safetyheads.runs.progress import Progress

# What counts as best where the bound on missed heads is told.
_TOP = 10
_PAIRED = 8
_PAIRS = 5


def extent_of(config: ScreenOptions) -> Extent:
    """How many heads are scored exactly."""
    from safetyheads.measures.screened_scores import Extent

    given = {"n_candidates": config.candidates, "n_sampled": config.sample}
    return Extent(**{name: value for name, value in given.items() if value is not None})


def ranked(engine: Engine, asked: PromptSet, config: ShipsConfig, watching: Progress) -> dict[str, Any]:
    """The heads that were scored, best first, as JSON."""
    from safetyheads.measures.head_pass import HeadPass, Readouts
    from safetyheads.measures.screened_scores import costs_of, missed, propose, rescore_pairs
    from safetyheads.measures.screening import screen
    from safetyheads.measures.ships import answer_sequences, scorer_of
    from safetyheads.runs.estimate import estimate
    from safetyheads.scores import HeadScores
    from safetyheads.stats.intervals import mean_with_interval

    if not config.screen:
        watching.say(lambda: estimate(engine, engine.ask(asked).token_ids, 1, 0, 1))
    kind, positions = config.parsed_ablation, config.positions
    sequences = answer_sequences(engine, asked, positions)
    measuring = HeadPass(engine, sequences, kind, Readouts(ships=True))
    chosen: Sequence[Head] = engine.heads
    screening, proposal = None, None
    if config.screen:
        with watching.track("screening", 1):
            screening = screen(engine, sequences, kind)
        proposal = propose(screening, extent=extent_of(config))
        costs = costs_of(measuring, proposal)
        watching.say(f"{len(proposal.heads)} of {len(engine.heads)} heads are scored exactly: {costs}")
        chosen = proposal.heads
    with watching.track("scoring heads", len(chosen)) as done:
        values = measuring.measure([(head,) for head in chosen], done)["ships"]
    by_prompt: HeadScores = measuring.table("ships", values, chosen)
    scores = by_prompt.mean()
    result = {
        "score": "mean_ships",
        "unit": "nats",
        "n": len(asked),
        "template": engine.ask(asked).template.settings(),
        "ablation": asdict(kind),
        "positions": positions,
        "heads": [
            {"head": str(head), **asdict(mean_with_interval(by_prompt.values[:, head.layer, head.index].tolist()))}
            for head, _ in scores.ranked()
        ],
        "ties": [[str(head) for head in tie] for tie in scores.ties()],
    }
    if screening is not None and proposal is not None:
        pairs = rescore_pairs(scorer_of(measuring, "mean_ships"), screening.pairs(scores.top(_PAIRED), _PAIRS))
        bound = missed(scores, proposal, _TOP)
        result["screening"] = {
            **screening_json(proposal, bound),
            "costs": asdict(costs),
            "pairs": [
                {
                    "heads": [str(head) for head in pair.heads],
                    "together": pair.together,
                    "alone": list(pair.alone),
                    "synergy": pair.synergy,
                }
                for pair in pairs
            ],
        }
    return result


def screening_json(proposal: Proposal, bound: Missed) -> dict[str, Any]:
    """Who was scored exactly, and the bound on what was missed."""
    return {
        "candidates": [str(head) for head in proposal.candidates],
        "sampled": [str(head) for head in proposal.sampled],
        "missed": {**asdict(bound), "sentence": str(bound)},
    }
