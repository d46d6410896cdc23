"""``safetyheads sahara``: which score a search uses, and what it found as JSON. Owns the names of the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from safetyheads.cli_options import AngleOptions, AnswerOptions
from safetyheads.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from safetyheads.ablation import Ablation
    from safetyheads.engine import Engine
    from safetyheads.heads import Group
    from safetyheads.progress import Progress
    from safetyheads.prompts import PromptSet
    from safetyheads.refusal import Opener
    from safetyheads.scores import FunctionScorer
    from safetyheads.subspace import Space

_GENERALIZED = "generalized_ships"
SCORES = ("mean_ships", "refusal_score", f"{_GENERALIZED}_prompt", f"{_GENERALIZED}_representation")
"""The scores that a search can use."""
_SPACES = ("prompt", "representation")
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
    def of(cls, score: str, positions: int, answers: AnswerOptions, angle: AngleOptions) -> ScoreChoice:
        """Check the names and that each option belongs to the score."""
        from safetyheads.judges import judge_named

        judge_named(answers.judge)
        if score == _GENERALIZED:
            score = f"{_GENERALIZED}_{angle.subspace or 'prompt'}"
        elif angle.subspace is not None and not score.endswith(f"_{angle.subspace}"):
            raise InputError(f"--subspace {angle.subspace} does not go with --score {score}")
        if score not in SCORES:
            raise InputError(f"unknown score {score!r}; known are {', '.join(SCORES)}")
        if angle.state is not None and angle.state not in _STATES:
            raise InputError(f"unknown state {angle.state!r}; known are {', '.join(_STATES)}")
        given = {"--rank": angle.rank is not None, "--state": angle.state is not None, "--centred": angle.centred}
        if not score.startswith(_GENERALIZED) and any(given.values()):
            raise InputError(f"{next(name for name, is_given in given.items() if is_given)} is for Generalized Ships")
        if positions != 1 and score != "mean_ships":
            raise InputError(f"--positions is for mean_ships, not for {score}")
        return cls(score, positions, answers.judge, angle)

    def refuse_too_few(self, n_prompts: int) -> None:
        """Refuse a number of prompts that the score cannot work with."""
        if self.name.startswith(_GENERALIZED):
            from safetyheads.subspace import refuse_rank

            refuse_rank(self.rank, n_prompts, self.space, self.angle.centred)

    @property
    def rank(self) -> int:
        """Singular vectors kept; the released code's 1 where none are named."""
        return 1 if self.angle.rank is None else self.angle.rank

    @property
    def space(self) -> Space:
        """The side whose singular vectors are compared."""
        return cast("Space", self.name.removeprefix(f"{_GENERALIZED}_"))


@dataclass(frozen=True, slots=True)
class _Watched:
    """A scorer that tells when it has scored the groups of a step."""

    scorer: FunctionScorer
    done: Callable[[int], None]

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        scores = self.scorer(groups)
        self.done(1)
        return scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)


def searched(
    engine: Engine, asked: PromptSet, kind: Ablation, choice: ScoreChoice, size: int, watching: Progress
) -> dict[str, Any]:
    """Sahara's group and steps, as JSON."""
    from safetyheads.results import search_steps
    from safetyheads.search import sahara

    scorer, openers = _scorer(engine, asked, kind, choice)
    with watching.track("searching groups", size) as done:
        trace = sahara(cast("FunctionScorer", _Watched(scorer, done)), engine.heads, size)
    return {
        "score": scorer.name,
        "unit": scorer.unit,
        "n": len(asked),
        "ablation": asdict(kind),
        "openers": [asdict(opener) for opener in openers],
        "group": [str(head) for head in trace.group],
        "steps": search_steps(trace),
    }


def _scorer(
    engine: Engine, asked: PromptSet, kind: Ablation, choice: ScoreChoice
) -> tuple[FunctionScorer, tuple[Opener, ...]]:
    """The scorer, and for the refusal score the openers of refusals, which are data."""
    from safetyheads import refusal, scoring
    from safetyheads.judges import judge_named

    if choice.name == "mean_ships":
        return scoring.mean_ships(engine, asked, kind, choice.positions), ()
    if choice.name == "refusal_score":
        openers = refusal.unablated_openers(engine, asked, judge_named(choice.judge))
        return refusal.refusal_score(engine, asked, kind, openers), openers
    state = cast("Literal['after_norm', 'before_norm']", choice.angle.state or _STATES[0])
    return scoring.generalized_ships(engine, asked, kind, choice.space, choice.rank, state, choice.angle.centred), ()
