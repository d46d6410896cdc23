"""Answers by verified drafts. Owns the three ways to an answer: as drafted, continued, plain; judges nothing.

1. The unablated answers are drafts, each as long as it takes until nobody needs more of it.
2. One packed pass a batch of groups compares them (:mod:`safetyheads.answers.drafts`).
3. Rows that differ go on from the first difference, decoded together with a KV cache.
4. A row with a near-tie anywhere, where packed and plain arithmetic might choose differently, is decoded plainly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Answer, Request, ShortContextWarning, answer, end_tokens
from safetyheads.answers.drafts import Compared, Draft, DraftPass, near_tie_tolerance
from safetyheads.answers.sampling import GREEDY, Sampling
from safetyheads.errors import InputError
from safetyheads.heads import Group
from safetyheads.model.costs import row_sizes
from safetyheads.model.planning import Plan

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

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
    """Whether the model or the limit ended it; else it was cut where nobody needed more of it."""
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
    """Ended early, since every judge was final or a stop text of the template was there."""
    tokens_computed: float = 0.0
    """Tokens run through the whole model; one that runs through half of its layers counts half."""
    tokens_plain: int = 0
    """Tokens that plain decoding with a cache runs for the same answers, each at least as long as it was read here."""

    def __add__(self, other: Economy) -> Economy:
        return Economy(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt under one group, compared."""

    prompt: int
    group: Group
    compared: Compared


_NOTHING = DraftedAnswer((), finished=False, complete=True, route="drafted", changed=False)
"""Where the context leaves no room for an answer."""


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
        """Answer the prompts unablated, unless that is given, and measure what a near-tie is.

        Raises:
            InputError: no prompt leaves room for an answer; or the given answers are cut where whole ones are wanted.
        """
        made = tuple(unablated_answers(engine, encoded, decoding, stop) if vanilla is None else vanilla)
        if stop is None and not all(one.complete for one in made):
            raise InputError("whole answers are wanted, and some of the unablated ones are cut")
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
        drafts = self._draft_of()
        compared = self.drafted.compare(groups, self._teller(list(drafts), on_rows))
        rows = [
            _Row(prompt, tuple(group), one)
            for group, along in zip(groups, compared, strict=True)
            for prompt, one in zip(drafts, along, strict=True)
        ]
        made, economy = self._finished(rows, on_rows)
        answers, prompts = iter(made), range(len(self.encoded))
        table = [[next(answers) if prompt in drafts else _NOTHING for prompt in prompts] for _ in groups]
        n_without = len(groups) * (len(self.encoded) - len(drafts))
        _tell(on_rows, n_without)
        tokens = self._tokens_compared(self.drafted, groups)
        return table, economy + Economy(n_rows=n_without, n_drafted=n_without, tokens_computed=tokens)

    def answers_of_each(
        self, groups: Sequence[Sequence[Group]], on_rows: Callable[[int], None] | None = None
    ) -> tuple[list[list[DraftedAnswer]], Economy]:
        """Each prompt's answers under groups of its own [n_prompts][its groups], and what they cost."""
        rows: list[_Row] = []
        economy, drafts = Economy(), self._draft_of()
        for prompt, own in enumerate(groups):
            if not own:
                continue
            if prompt not in drafts:
                economy += Economy(n_rows=len(own), n_drafted=len(own))
                _tell(on_rows, len(own))
                continue
            draft, sampling = self.drafted.drafts[drafts[prompt]], self.decoding.sampling
            one = DraftPass.begin(self.engine, [draft], self.ablation, sampling, self.drafted.ends)
            compared = one.compare(own, self._teller([prompt], on_rows))
            rows += [_Row(prompt, tuple(group), along) for group, (along,) in zip(own, compared, strict=True)]
            economy += Economy(tokens_computed=self._tokens_compared(one, own))
        made, finishing = self._finished(rows, on_rows)
        answers = iter(made)
        table = [[next(answers) if prompt in drafts else _NOTHING for _ in own] for prompt, own in enumerate(groups)]
        return table, economy + finishing

    def _draft_of(self) -> dict[int, int]:
        """Number of a prompt -> of its draft, for prompts that leave room for an answer."""
        prompts = [at for at, one in enumerate(self.vanilla) if one.token_ids or one.finished]
        return {prompt: number for number, prompt in enumerate(prompts)}

    def _teller(
        self, prompts: Sequence[int], on_rows: Callable[[int], None] | None
    ) -> Callable[[Sequence[Compared]], None]:
        """Tells of the rows that comparing alone has answered; the others are told of when they are decoded."""

        def tell(along: Sequence[Compared]) -> None:
            told = (self._told(_Row(prompt, (), one)) for prompt, one in zip(prompts, along, strict=True))
            _tell(on_rows, sum(one is not None for one in told))

        return tell

    def _finished(
        self, rows: Sequence[_Row], on_rows: Callable[[int], None] | None
    ) -> tuple[list[DraftedAnswer], Economy]:
        """The answers of compared rows, and what came after the comparison."""
        made = {at: told for at, row in enumerate(rows) if (told := self._told(row)) is not None}
        undecided = [at for at in range(len(rows)) if at not in made]
        near_ties = [at for at in undecided if self._is_close(rows[at].compared.margin)]
        differing = [at for at in undecided if not self._is_close(rows[at].compared.margin)]
        tokens = 0.0
        for at, one in zip(differing, self._decoded([rows[at] for at in differing], goes_on=True), strict=True):
            tokens += len(self.encoded[rows[at].prompt]) + len(one.token_ids)
            if any(self._is_close(margin) for margin in one.margins):
                near_ties.append(at)
            else:
                made[at] = DraftedAnswer(one.token_ids, one.finished, one.complete, "continued", changed=True)
                _tell(on_rows, 1)
        for at, one in zip(near_ties, self._decoded([rows[at] for at in near_ties], goes_on=False), strict=True):
            tokens += len(self.encoded[rows[at].prompt]) + len(one.token_ids)
            before = self.vanilla[rows[at].prompt]
            changed = (one.token_ids, one.finished) != (before.token_ids, before.finished)
            made[at] = DraftedAnswer(one.token_ids, one.finished, one.complete, "plain", changed)
            _tell(on_rows, 1)
        answers = [made[at] for at in range(len(rows))]
        plain = sum(len(self.encoded[row.prompt]) + len(one.token_ids) for row, one in zip(rows, answers, strict=True))
        routes = [one.route for one in answers]
        n_incomplete = sum(not one.complete for one in answers)
        counts = (routes.count("drafted"), routes.count("continued"), routes.count("plain"), n_incomplete)
        return answers, Economy(len(rows), *counts, tokens, plain)

    def _is_close(self, margin: float) -> bool:
        """Whether plain arithmetic might choose otherwise; among logits that are not finite (NaN) it might."""
        return not margin >= self.tolerance

    def _begun(self, row: _Row) -> tuple[int, ...]:
        """The answer up to and with the first difference."""
        same = self.vanilla[row.prompt].token_ids[: row.compared.n_same]
        return same if row.compared.other is None else (*same, row.compared.other)

    def _told(self, row: _Row) -> DraftedAnswer | None:
        """The answer, where the comparison alone tells it."""
        vanilla, begun = self.vanilla[row.prompt], self._begun(row)
        if self._is_close(row.compared.margin):
            return None
        if row.compared.other is None:
            return DraftedAnswer(vanilla.token_ids, vanilla.finished, vanilla.complete, "drafted", changed=False)
        if row.compared.other in self.drafted.ends:
            return DraftedAnswer(begun[:-1], True, True, "continued", changed=True)
        if len(begun) >= vanilla.limit:
            return DraftedAnswer(begun, False, True, "continued", changed=True)
        if self.stop is not None and self.stop(begun):
            return DraftedAnswer(begun, False, False, "continued", changed=True)
        return None

    def _decoded(self, rows: Sequence[_Row], goes_on: bool) -> tuple[Answer, ...]:
        """Rows decoded from their first difference on, or from the start."""
        requests = [
            Request(self.encoded[row.prompt], row.group, self._begun(row) if goes_on else (), self.stop) for row in rows
        ]
        with warnings.catch_warnings():
            # The unablated answers have said it, with the numbers of the whole set.
            warnings.simplefilter("ignore", ShortContextWarning)
            return answer(self.engine, requests, self.ablation, self.decoding.max_new_tokens, self.decoding.sampling)

    @property
    def unablated(self) -> Economy:
        """What the unablated answers cost.

        Decoding them, and three packed runs: captured, and two rows to measure near-ties on.
        """
        decoded = sum(len(ids) + len(one.token_ids) for ids, one in zip(self.encoded, self.vanilla, strict=True))
        return Economy(tokens_computed=decoded + 3 * _length(self.drafted))

    def _tokens_compared(self, drafted: DraftPass, groups: Sequence[Group]) -> float:
        """Tokens that comparing the groups runs through the whole model."""
        n_layers = self.engine.n_layers
        runs = (
            len(batch.indices) * (n_layers - batch.start) / n_layers
            for batch in self.engine.batches(groups, drafted.layout)
        )
        return _length(drafted) * sum(runs)


def _tell(on_rows: Callable[[int], None] | None, count: int) -> None:
    if on_rows is not None and count:
        on_rows(count)


def _length(drafted: DraftPass) -> int:
    """Tokens of the packed rows."""
    return sum(row.n_tokens for row in row_sizes([one.sequence for one in drafted.drafts], drafted.layout))


def unablated_answers(
    engine: Engine, encoded: Sequence[tuple[int, ...]], decoding: Decoding, stop: Stop | None
) -> tuple[Answer, ...]:
    """The drafts: the unablated model's answers, each until ``stop`` has enough of it."""
    requests = [Request(tuple(token_ids), stop=stop) for token_ids in encoded]
    return answer(engine, requests, max_new_tokens=decoding.max_new_tokens, sampling=decoding.sampling)
