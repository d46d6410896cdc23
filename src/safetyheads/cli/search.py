"""``safetyheads sahara``: which score a search uses, and what it found as JSON. Owns the names of the scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from safetyheads.cli.options import AngleOptions, ScreenOptions
from safetyheads.cli.ships import screening_json
from safetyheads.errors import InputError

if TYPE_CHECKING:
    from safetyheads.ablation import Ablation
    from safetyheads.measures.head_pass import HeadPass, State
    from safetyheads.measures.ships import Opener, Score
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet
    from safetyheads.runs.progress import Progress

_GENERALIZED = "generalized_ships"
SCORES = ("mean_ships", "refusal_score", f"{_GENERALIZED}_prompt", f"{_GENERALIZED}_representation")
"""The scores that a search can use."""
_STATES = ("after_norm", "before_norm")


@dataclass(frozen=True, slots=True)
class ScoreChoice:
    """The score that was asked for, checked."""

    name: str
    """One of :data:`SCORES`."""
    positions: int
    """Answer tokens over which mean Ships are averaged."""
    judge: str
    """Who finds the refusals whose openers the refusal score counts."""
    angle: AngleOptions
    """How Generalized Ships are read."""

    @classmethod
    def of(cls, score: str, positions: int, judge: str, angle: AngleOptions) -> ScoreChoice:
        """Check the names and that each option belongs to the score."""
        from safetyheads.judges.named import judge_named

        judge_named(judge)
        if score not in SCORES:
            raise InputError(f"unknown score {score!r}; known are {', '.join(SCORES)}")
        if angle.state is not None and angle.state not in _STATES:
            raise InputError(f"unknown state {angle.state!r}; known are {', '.join(_STATES)}")
        given = {"--rank": angle.rank is not None, "--state": angle.state is not None, "--centred": angle.centred}
        if not score.startswith(_GENERALIZED) and any(given.values()):
            raise InputError(f"{next(name for name, is_given in given.items() if is_given)} is for Generalized Ships")
        if positions != 1 and score != "mean_ships":
            raise InputError(f"--positions is for mean_ships, not for {score}")
        return cls(score, positions, judge, angle)

    @property
    def score(self) -> Score:
        """The score with its settings."""
        from safetyheads.measures.ships import Score

        state = cast("State", self.angle.state or _STATES[0])
        rank = 1 if self.angle.rank is None else self.angle.rank
        return Score(self.name, self.positions, rank, state, self.angle.centred)

    def refuse_too_few(self, n_prompts: int) -> None:
        """Refuse a number of prompts that the score cannot work with."""
        self.score.refuse_too_few(n_prompts)


def searched(
    engine: Engine,
    asked: PromptSet,
    kind: Ablation,
    choice: ScoreChoice,
    size: int,
    screened: ScreenOptions,
    watching: Progress,
) -> dict[str, Any]:
    """Sahara's group and steps, as JSON."""
    from safetyheads.measures.sahara import n_scored, sahara
    from safetyheads.measures.screened_scores import costs_of, screened_sahara
    from safetyheads.measures.ships import scorer_of
    from safetyheads.runs.estimate import estimate
    from safetyheads.runs.results import search_steps

    extent, n_heads = screened.extent(), len(engine.heads)
    n_each = min(n_heads, extent.n_candidates + extent.n_sampled) if screened.screen else n_heads
    if not screened.screen:
        watching.say(lambda: estimate(engine, engine.ask(asked).token_ids, size, 0, 1))
    measuring, openers = _pass(engine, asked, kind, choice)
    with watching.track("searching groups", n_scored(n_each, size)) as done:
        scorer = scorer_of(measuring, choice.score, done)
        if screened.screen:
            found = screened_sahara(measuring, choice.score, size, extent, done)
            trace = found.trace
            steps = [screening_json(*step) for step in zip(found.proposals, found.missed, strict=True)]
            costs = costs_of(measuring, found.proposals[0], choice.score.forecast)
            watching.say(f"each step: {costs}")
            extra = {"forecast": choice.score.forecast, "screening": steps, "costs": asdict(costs)}
        else:
            trace, extra = sahara(scorer, engine.heads, size), dict[str, Any]()
    return {
        **extra,
        "score": scorer.name,
        "unit": scorer.unit,
        "n": len(asked),
        "template": engine.ask(asked).template.settings(),
        "ablation": asdict(kind),
        "openers": [asdict(opener) for opener in openers],
        "group": [str(head) for head in trace.group],
        "steps": search_steps(trace),
    }


def _pass(engine: Engine, asked: PromptSet, kind: Ablation, choice: ScoreChoice) -> tuple[HeadPass, tuple[Opener, ...]]:
    """What measures the score, and for the refusal score the openers of refusals, which are data."""
    from safetyheads.judges.named import judge_named
    from safetyheads.measures.head_pass import HeadPass
    from safetyheads.measures.ships import answer_sequences, find_openers

    sequences = answer_sequences(engine, asked, choice.positions)
    openers: tuple[Opener, ...] = ()
    if choice.name == "refusal_score":
        openers = find_openers(engine, asked, judge_named(choice.judge))
    readouts = choice.score.readouts([opener.token_id for opener in openers])
    return HeadPass(engine, sequences, kind, readouts), openers
