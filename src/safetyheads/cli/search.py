"""``safetyheads sahara``: which score a search uses, and what it found as JSON. Owns the names of the scores."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from safetyheads.cli.ships import extent_of, screening_json
from safetyheads.runs.config import SaharaConfig

if TYPE_CHECKING:
    from safetyheads.measures.head_pass import HeadPass, State
    from safetyheads.measures.ships import Opener, Score
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet
    from safetyheads.runs.progress import Progress


def score_of(config: SaharaConfig) -> Score:
    """The score with its settings."""
    from safetyheads.measures.ships import Score

    return Score(config.score, config.positions, config.rank, cast("State", config.state), config.centred)


def searched(engine: Engine, asked: PromptSet, config: SaharaConfig, watching: Progress) -> dict[str, Any]:
    """Sahara's group and steps, as JSON."""
    from safetyheads.measures.sahara import n_scored, sahara
    from safetyheads.measures.screened_scores import costs_of, screened_sahara
    from safetyheads.measures.ships import scorer_of
    from safetyheads.runs.audit import search_steps
    from safetyheads.runs.estimate import estimate

    score, size, extent, n_heads = score_of(config), config.size, extent_of(config), len(engine.heads)
    n_each = min(n_heads, extent.n_candidates + extent.n_sampled) if config.screen else n_heads
    if not config.screen:
        watching.say(lambda: estimate(engine, engine.ask(asked).token_ids, size, 0, 1))
    measuring, openers = _pass(engine, asked, score, config)
    with watching.track("searching groups", n_scored(n_each, size)) as done:
        scorer = scorer_of(measuring, score, done)
        if config.screen:
            found = screened_sahara(measuring, score, size, extent, done)
            trace = found.trace
            steps = [screening_json(*step) for step in zip(found.proposals, found.missed, strict=True)]
            costs = costs_of(measuring, found.proposals[0], score.forecast)
            watching.say(f"each step: {costs}")
            extra = {"forecast": score.forecast, "screening": steps, "costs": asdict(costs)}
        else:
            trace, extra = sahara(scorer, engine.heads, size), dict[str, Any]()
    return {
        **extra,
        "score": scorer.name,
        "unit": scorer.unit,
        "n": len(asked),
        "template": engine.ask(asked).template.settings(),
        "ablation": asdict(config.parsed_ablation),
        "openers": [asdict(opener) for opener in openers],
        "group": [str(head) for head in trace.group],
        "steps": search_steps(trace),
    }


def _pass(engine: Engine, asked: PromptSet, score: Score, config: SaharaConfig) -> tuple[HeadPass, tuple[Opener, ...]]:
    """What measures the score, and for the refusal score the openers of refusals, which are data."""
    from safetyheads.judges.named import judges_named
    from safetyheads.measures.head_pass import HeadPass
    from safetyheads.measures.ships import answer_sequences, find_openers

    sequences = answer_sequences(engine, asked, config.positions)
    openers: tuple[Opener, ...] = ()
    if score.name == "refusal_score":
        openers = find_openers(engine, asked, judges_named(config.judges, config.judge_device)[0])
    readouts = score.readouts([opener.token_id for opener in openers])
    return HeadPass(engine, sequences, config.parsed_ablation, readouts), openers
