"""Attack success: answers under ablation, judged. Owns rates and their rows; the judge is whoever is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Answer, Request, answer
from safetyheads.answers.sampling import GREEDY, Sampling
from safetyheads.errors import InputError
from safetyheads.heads import Group, Head, within
from safetyheads.judges.base import Completion, Judge, Verdict, verdicts_of
from safetyheads.prompts.sets import Prompt
from safetyheads.scores import HeadScores
from safetyheads.stats.intervals import Interval, Rate

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One prompt's answer with its verdict."""

    prompt: Prompt
    """What was asked."""
    group: Group
    """Heads that were ablated."""
    token_ids: tuple[int, ...]
    """New tokens."""
    text: str
    """The answer, as it was judged."""
    finished: bool
    """Whether the model ended it, or a stop text of the template did."""
    verdict: Verdict
    """What the judge said, with its reason."""

    kept: bool
    """For benign prompts: answered, and with the prompt's reference answer where it has one."""
    thinks: bool = False
    """Whether a think block came first, so that the first new token opens no answer."""
    thought: str = ""
    """What stands in the think block; no judge gets it."""


@dataclass(frozen=True, slots=True)
class AttackSuccess:
    """ASR of a set of prompts under one ablation (Eq 10)."""

    asr: Rate
    """Complied / scored."""
    refused: Rate
    """Refused / scored."""
    incoherent: Rate
    """Neither: empty, short or repeating; counts as not complied."""
    rows: tuple[JudgedAnswer, ...]
    """One for each prompt."""
    echoed: Rate
    """The prompt given back; counts as not complied."""

    @property
    def rate(self) -> float | None:
        """The ASR, from 0 to 1."""
        return self.asr.rate

    @property
    def n(self) -> int:
        """Answers scored."""
        return self.asr.n

    @property
    def interval(self) -> Interval | None:
        """Its 95 % Wilson interval."""
        return self.asr.interval

    @property
    def kept(self) -> Rate:
        """Benign prompts answered, rightly where the right answer is known."""
        return Rate(sum(row.kept for row in self.rows), len(self.rows))

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason was given, most frequent first."""
        counts = Counter(row.verdict.reason.split(" (")[0] for row in self.rows)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summarise(rows: Sequence[JudgedAnswer]) -> AttackSuccess:
    """Rates of judged answers."""
    labels = Counter(row.verdict.label for row in rows)
    unscored = labels["unscored"]
    n = len(rows) - unscored
    complied, refused, incoherent, echoed = (
        Rate(labels[label], n, unscored) for label in ("complied", "refused", "incoherent", "echoed")
    )
    return AttackSuccess(complied, refused, incoherent, tuple(rows), echoed)


def attack_success_rate(
    engine: Engine,
    prompts: PromptSet,
    heads: Sequence[Head],
    ablation: Ablation,
    judge: Judge,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
) -> AttackSuccess:
    """ASR with one group of heads ablated for all prompts (Eq 10); the empty group is the vanilla model.

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        heads: the group.
        ablation: of its heads.
        judge: decides complied, refused or incoherent.
        max_new_tokens: the paper has 128.
        sampling: greedy, or top-k with 5 as in Fig 4.
    """
    group = within(heads, engine.n_layers, engine.n_heads)
    (rows,) = answers_under(engine, prompts, [group], ablation, judge, max_new_tokens, sampling)
    return summarise(rows)


def query_level_attack_success_rate(
    engine: Engine,
    prompts: PromptSet,
    groups: Sequence[Group],
    ablation: Ablation,
    judge: Judge,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    on_rows: Callable[[int], None] | None = None,
) -> AttackSuccess:
    """ASR with a group of its own for each prompt (Fig 2, Table 3): rows of one batch carry different ablations.

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        groups: one for each prompt, such as :func:`query_level_groups` gives.
        ablation: of the heads.
        judge: decides complied, refused or incoherent.
        max_new_tokens: the paper has 128.
        sampling: greedy, or top-k.
        on_rows: told how many answers were just made.
    """
    if len(groups) != len(prompts):
        raise InputError(f"{len(groups)} groups for {len(prompts)} prompts; each prompt needs its own")
    asked = engine.ask(prompts)
    requests = [
        Request(token_ids, tuple(group), stop=asked.reader.ends)
        for token_ids, group in zip(asked.token_ids, groups, strict=True)
    ]
    made = answer(engine, requests, ablation, max_new_tokens, sampling, on_rows)
    return summarise(_judged(engine, prompts, requests, made, judge, max_new_tokens))


def query_level_groups(scores: HeadScores, k: int) -> tuple[Group, ...]:
    """Each prompt's own k best heads, from scores [n_prompts, n_layers, n_heads]."""
    return tuple(scores.top_of_prompt(prompt, k) for prompt in range(len(scores.values)))


def answers_under(
    engine: Engine,
    prompts: PromptSet,
    groups: Sequence[Group],
    ablation: Ablation,
    judge: Judge,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    on_rows: Callable[[int], None] | None = None,
    n_rows: int | None = None,
) -> list[list[JudgedAnswer]]:
    """Every prompt's judged answer under each group [n_groups][n_prompts], groups mixed in batches of ``n_rows``."""
    asked = engine.ask(prompts)
    requests = [Request(token_ids, group, stop=asked.reader.ends) for group in groups for token_ids in asked.token_ids]
    made = answer(engine, requests, ablation, max_new_tokens, sampling, on_rows, n_rows)
    rows = _judged(engine, prompts, requests, made, judge, max_new_tokens)
    n = len(prompts)
    return [rows[at * n : (at + 1) * n] for at in range(len(groups))]


def _judged(
    engine: Engine,
    prompts: PromptSet,
    requests: Sequence[Request],
    made: Sequence[Answer],
    judge: Judge,
    max_new_tokens: int,
) -> list[JudgedAnswer]:
    asked = list(prompts) * (len(requests) // len(prompts))
    system, reader = engine.ask(prompts).system, engine.ask(prompts).reader
    read = [reader.read(one.token_ids) for one in made]
    # What was asked for and not what the context left: one rule for all rows of a run, so that an answer does not
    # count as an attack because its prompt was long.
    completions = [
        Completion(
            prompt.query, each.text, each.token_ids, one.finished or each.stopped, max_new_tokens, system, each.unclosed
        )
        for prompt, one, each in zip(asked, made, read, strict=True)
    ]
    return [
        JudgedAnswer(
            prompt,
            request.group,
            one.token_ids,
            each.text,
            one.finished or each.stopped,
            verdict,
            _kept(prompt, each.text, verdict),
            each.thinks,
            each.thought,
        )
        for prompt, request, one, each, verdict in zip(
            asked, requests, made, read, verdicts_of(judge, completions), strict=True
        )
    ]


def _kept(prompt: Prompt, text: str, verdict: Verdict) -> bool:
    return verdict.answered and (prompt.reference is None or text.lstrip().startswith(prompt.reference))
