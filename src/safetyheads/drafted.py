"""Answers by verified drafts. Owns the three ways to an answer: as drafted, continued, plain; judges nothing.

1. The unablated answers are drafts, each as long as it takes until nobody needs more of it.
2. One packed pass a batch of groups compares them (:mod:`safetyheads.drafts`).
3. Rows that differ go on from the first difference, decoded together with a KV cache.
4. A row with a near-tie anywhere, where packed and plain arithmetic might choose differently, is decoded plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from safetyheads.ablation import Ablation
from safetyheads.batching import Plan
from safetyheads.costs import row_sizes
from safetyheads.drafts import Compared, Draft, DraftPass, near_tie_tolerance
from safetyheads.errors import InputError
from safetyheads.generation import Answer, Request, answer, end_tokens
from safetyheads.heads import Group
from safetyheads.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from safetyheads.engine import Engine

Route: TypeAlias = Literal["drafted", "continued", "plain"]
Stop: TypeAlias = Callable[[Sequence[int]], bool]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are made."""

    max_new_tokens: int = 128
    """Longest answer; the paper has 128."""
    sampling: Sampling = GREEDY
    """Greedy, or top-k with 5 as in Fig 4."""
    full_answers: bool = False
    """Whether a row goes on to its end after every judge is final about it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"an answer needs at least one new token; got {self.max_new_tokens}")


@dataclass(frozen=True, slots=True)
class DraftedAnswer:
    """One prompt's answer under one group."""

    token_ids: tuple[int, ...]
    """New tokens: those of plain ablated decoding, or the first of them where it is not complete."""
    finished: bool
    """Whether the model ended it."""
    complete: bool
    """Whether the model or the limit ended it; else it was cut where every judge was final."""
    route: Route
    """``drafted``: the unablated answer; ``continued``: from the first difference on; ``plain``: a near-tie."""
    changed: bool
    """Whether it differs from the unablated answer."""


@dataclass(frozen=True, slots=True)
class Economy:
    """What answers cost, and what they would have."""

    n_rows: int = 0
    """Answers."""
    n_drafted: int = 0
    """Of these, the unablated answer again."""
    n_continued: int = 0
    """Decoded from the first difference on."""
    n_near_ties: int = 0
    """Decoded plainly, for a choice was too close."""
    n_incomplete: int = 0
    """Ended early, since every judge was final."""
    tokens_computed: float = 0.0
    """Tokens run through the whole model; one that runs through half of its layers counts half."""
    tokens_plain: int = 0
    """Tokens that plain decoding with a cache runs for the same answers, each at least as long as it was read here."""

    def __add__(self, other: Economy) -> Economy:
        return Economy(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class DraftedAnswers:
    """One ablation on some prompts: answers them under any groups of heads."""

    engine: Engine
    """The model."""
    encoded: tuple[tuple[int, ...], ...]
    """The prompts' tokens."""
    ablation: Ablation
    """Of every head in every group."""
    decoding: Decoding
    """How answers are made."""
    stop: Stop | None
    """Whether an answer's first tokens are enough; None where whole answers are wanted."""
    vanilla: tuple[Answer, ...]
    """The unablated answers."""
    tolerance: float
    """Margins below it are near-ties, in logits."""
    drafted: DraftPass
    """The drafts of the prompts that have one."""

    @classmethod
    def begin(
        cls,
        engine: Engine,
        encoded: Sequence[tuple[int, ...]],
        ablation: Ablation,
        decoding: Decoding,
        stop: Stop | None,
        vanilla: Sequence[Answer] | None = None,
        layout: Plan | None = None,
    ) -> DraftedAnswers:
        """Answer the prompts unablated, unless that is given, and measure what a near-tie is."""
        stop = None if decoding.full_answers else stop
        made = tuple(unablated_answers(engine, encoded, decoding, stop) if vanilla is None else vanilla)
        drafts, margins = [], list[float]()
        for prompt, one in zip(encoded, made, strict=True):
            choices = one.token_ids + ((min(end_tokens(engine)),) if one.finished else ())
            if choices:
                drafts.append(Draft(tuple(prompt), choices))
                margins += one.margins
        if not drafts:
            raise InputError("the prompts leave no room for an answer in the model's context")
        drafted = DraftPass.begin(engine, drafts, ablation, decoding.sampling, end_tokens(engine), layout)
        tolerance = near_tie_tolerance(drafted, margins)
        return cls(engine, tuple(encoded), ablation, decoding, stop, made, tolerance, drafted)

    def answers(
        self, groups: Sequence[Group], on_rows: Callable[[int], None] | None = None
    ) -> tuple[list[list[DraftedAnswer]], Economy]:
        """Every prompt's answer under each group [n_groups][n_prompts], and what they cost."""
        drafted = [at for at, one in enumerate(self.vanilla) if one.token_ids or one.finished]
        compared = self.drafted.compare(groups, None if on_rows is None else lambda n: on_rows(n * len(drafted)))
        rows = [
            (prompt, group, one)
            for group, along in zip(groups, compared, strict=True)
            for prompt, one in zip(drafted, along, strict=True)
        ]
        answers, economy = self._finished(rows)
        nothing = DraftedAnswer((), finished=False, complete=True, route="drafted", changed=False)
        table = [[nothing] * len(self.encoded) for _ in groups]
        for at, made in enumerate(answers):
            table[at // len(drafted)][drafted[at % len(drafted)]] = made
        return table, economy + Economy(tokens_computed=self._tokens_compared(self.drafted, groups))

    def answers_of_each(
        self, groups: Sequence[Sequence[Group]], on_rows: Callable[[int], None] | None = None
    ) -> tuple[list[list[DraftedAnswer]], Economy]:
        """Each prompt's answers under groups of its own [n_prompts][its groups], and what they cost."""
        rows: list[tuple[int, Group, Compared]] = []
        economy = Economy()
        at = 0
        for prompt, own in enumerate(groups):
            if not (self.vanilla[prompt].token_ids or self.vanilla[prompt].finished):
                raise InputError("a prompt leaves no room for an answer in the model's context")
            one = DraftPass.begin(
                self.engine, [self.drafted.drafts[prompt]], self.ablation, self.decoding.sampling, self.drafted.ends
            )
            rows += [(prompt, group, along) for group, (along,) in zip(own, one.compare(own), strict=True)]
            economy += Economy(tokens_computed=self._tokens_compared(one, own))
            if on_rows is not None:
                on_rows(len(own))
        answers, finishing = self._finished(rows)
        table = []
        for own in groups:
            table.append(answers[at : at + len(own)])
            at += len(own)
        return table, economy + finishing

    def _finished(self, rows: Sequence[tuple[int, Group, Compared]]) -> tuple[list[DraftedAnswer], Economy]:
        """The answers of compared rows (prompt, group, comparison), and what came after the comparison."""
        made: list[DraftedAnswer | None] = [
            None if one.margin < self.tolerance else self._without_decoding(prompt, one) for prompt, _, one in rows
        ]
        open_rows = [at for at, (_, _, one) in enumerate(rows) if made[at] is None and one.margin >= self.tolerance]
        near_ties = [at for at, (_, _, one) in enumerate(rows) if one.margin < self.tolerance]
        tokens = 0.0
        for at, (request, one) in zip(open_rows, self._decoded([rows[at] for at in open_rows]), strict=True):
            tokens += len(request.token_ids) + len(one.token_ids)
            if min(one.margins, default=float("inf")) < self.tolerance:
                near_ties.append(at)
            else:
                made[at] = DraftedAnswer(one.token_ids, one.finished, one.complete, "continued", changed=True)
        plainly = self._decoded([(prompt, group, None) for prompt, group, _ in (rows[at] for at in near_ties)])
        for at, (request, one) in zip(near_ties, plainly, strict=True):
            tokens += len(request.token_ids) + len(one.token_ids)
            before = self.vanilla[rows[at][0]]
            changed = (one.token_ids, one.finished) != (before.token_ids, before.finished)
            made[at] = DraftedAnswer(one.token_ids, one.finished, one.complete, "plain", changed)
        answers = [one for one in made if one is not None]
        plain = sum(len(self.encoded[row[0]]) + len(one.token_ids) for row, one in zip(rows, answers, strict=True))
        routes = [one.route for one in answers]
        n_incomplete = sum(not one.complete for one in answers)
        counts = (routes.count("drafted"), routes.count("continued"), routes.count("plain"), n_incomplete)
        return answers, Economy(len(rows), *counts, tokens, plain)

    def _without_decoding(self, prompt: int, one: Compared) -> DraftedAnswer | None:
        """The answer, where the comparison alone tells it."""
        vanilla = self.vanilla[prompt]
        if one.other is None:
            return DraftedAnswer(vanilla.token_ids, vanilla.finished, vanilla.complete, "drafted", changed=False)
        if one.other in self.drafted.ends:
            return DraftedAnswer(vanilla.token_ids[: one.n_same], True, True, "continued", changed=True)
        begun = (*vanilla.token_ids[: one.n_same], one.other)
        if len(begun) >= vanilla.limit:
            return DraftedAnswer(begun, False, True, "continued", changed=True)
        if self.stop is not None and self.stop(begun):
            return DraftedAnswer(begun, False, False, "continued", changed=True)
        return None

    def _decoded(self, rows: Sequence[tuple[int, Group, Compared | None]]) -> list[tuple[Request, Answer]]:
        """Rows decoded from their first difference on, or from the start where there is no comparison."""
        requests = []
        for prompt, group, one in rows:
            begun: tuple[int, ...] = ()
            if one is not None and one.other is not None:
                begun = (*self.vanilla[prompt].token_ids[: one.n_same], one.other)
            requests.append(Request(self.encoded[prompt], group, begun, self.stop))
        made = answer(self.engine, requests, self.ablation, self.decoding.max_new_tokens, self.decoding.sampling)
        return list(zip(requests, made, strict=True))

    @property
    def unablated(self) -> Economy:
        """What the unablated answers cost: decoding them, and two packed runs, to measure near-ties and to compare."""
        decoded = sum(len(ids) + len(one.token_ids) for ids, one in zip(self.encoded, self.vanilla, strict=True))
        return Economy(tokens_computed=decoded + 2 * _length(self.drafted))

    def _tokens_compared(self, drafted: DraftPass, groups: Sequence[Group]) -> float:
        """Tokens that comparing the groups runs through the whole model."""
        n_layers = self.engine.n_layers
        runs = (
            len(batch.indices) * (n_layers - batch.start) / n_layers
            for batch in self.engine.batches(groups, drafted.layout)
        )
        return _length(drafted) * sum(runs)


def _length(drafted: DraftPass) -> int:
    """Tokens of the packed rows."""
    return sum(row.n_tokens for row in row_sizes([one.sequence for one in drafted.drafts], drafted.layout))


def unablated_answers(
    engine: Engine, encoded: Sequence[tuple[int, ...]], decoding: Decoding, stop: Stop | None
) -> tuple[Answer, ...]:
    """The drafts: the unablated model's answers, each until ``stop`` has enough of it."""
    stop = None if decoding.full_answers else stop
    requests = [Request(tuple(token_ids), stop=stop) for token_ids in encoded]
    return answer(engine, requests, max_new_tokens=decoding.max_new_tokens, sampling=decoding.sampling)
