"""Answers by verified drafts: finds how far each unablated answer is also the ablated one, and decodes only the rest.

1. The unablated answers are drafts; each is cut where all judges are final.
2. One packed pass a batch of groups gives the ablated model's choice at every position of every draft.
3. Rows that differ are decoded from the first difference on, in batches with a KV cache.
4. Rows with a near-tie, where packed and plain arithmetic might choose differently, are decoded plainly.
"""

import hashlib
import warnings
from collections.abc import Callable, MutableSet, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import (
    Answer,
    Decoding,
    Request,
    Route,
    Sampling,
    ShortContextWarning,
    Stop,
    answer,
    choose,
    end_tokens,
    noise_key,
)
from safetyheads.errors import InputError
from safetyheads.heads import Group, common_heads
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan, allowed_memory, halving, row_sizes
from safetyheads.model.replay import Capture

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
OnRows: TypeAlias = Callable[[int], None] | None
"""Called with the number of answers just finished."""

# Smaller margins, in logits, are near-ties in every model; by bytes of the model's numbers.
_LEAST_TOLERANCE = {8: 1e-8, 4: 1e-4, 2: 1e-2}
# The ablated runs have many times the positions on which the tolerance was measured.
_SAFETY = 4.0
# Of the free memory.
_MEMORY_SHARE = 0.8


class Draft(NamedTuple):
    """A prompt with its unablated answer."""

    prompt: tuple[int, ...]
    """The prompt under its template."""
    choices: tuple[int, ...]
    """Tokens that the model chose, an end token included; at least one."""

    @property
    def sequence(self) -> TokenSequence:
        """Tokens to run; the wanted states are those that choose."""
        return TokenSequence(self.prompt + self.choices[:-1], len(self.choices))


class Compared(NamedTuple):
    """One group's choices along one draft."""

    n_same: int
    """First choices of the draft that the ablated model makes too."""
    other: int | None
    """Its choice after them; None if it makes all choices of the draft."""
    margin: float
    """The smallest margin of its choices so far, in logits."""


_NO_ROOM = Compared(0, None, float("inf"))
"""Of a prompt that leaves no room for an answer: the empty unablated answer is the ablated one."""
_Row: TypeAlias = tuple[int, Group, Compared]
"""A prompt (its number) under a group, compared."""


class DraftPass:
    """Compares drafts under one ablation with the choices of any head groups."""

    def __init__(
        self,
        engine: Engine,
        drafts: Sequence[Draft],
        ablation: Ablation,
        sampling: Sampling,
        plan: Plan | None = None,
        halved: MutableSet[str] | None = None,
    ) -> None:
        """Plan the pass; nothing is run yet. ``halved`` is as for :func:`.model.planning.halving`."""
        self.halved = halved
        self.engine, self.drafts, self.ablation, self.sampling = engine, tuple(drafts), ablation, sampling
        self.ends = end_tokens(engine)
        self.sequences = [draft.sequence for draft in drafts]
        engine.prove_up_to(max(len(sequence.token_ids) for sequence in self.sequences))
        self.plan = plan or engine.plan(self.sequences)
        self.n_tokens = sum(row.n_tokens for row in row_sizes(self.sequences, self.plan))
        """Tokens of the packed rows."""
        # Of the unablated run, from the layer that was needed last.
        self._captures: list[Capture] = []

    def compare(
        self, groups: Sequence[Group], on_compared: Callable[[Sequence[Compared]], None]
    ) -> tuple[list[list[Compared]], float]:
        """Each group's choices along each draft [n_groups][n_drafts]; ``on_compared`` is called with each group's.

        Also the number of tokens that this runs through the whole model.
        """
        compared: list[list[Compared]] = [[] for _ in groups]
        shares, n_layers, common = [0.0], self.engine.n_layers, common_heads(groups)
        captures: list[Capture] = [] if common else self._captures
        for batch, first in self.engine.batches(groups, self.plan):
            shares.append(len(batch) * (n_layers - first) / n_layers)
            if not captures or first not in captures[0].inputs:
                captures[:] = self.engine.captured(self.sequences, common, self.ablation, self.plan, first)
            for capture in captures:
                capture.drop_before(first)

            def run(indices: Sequence[int], start: int = first) -> tuple[Integers, Floats]:
                chosen = [groups[index] for index in indices]
                return self.choices(self.engine.replayed(captures, chosen, self.ablation, start))

            for indices, (tokens, margins) in halving(batch, run, self.halved, partial(self._key, groups)):
                for row, index in enumerate(indices):
                    compared[index] = self.along(tokens[row], margins[row])
                    on_compared(compared[index])
        return compared, self.n_tokens * sum(shares)

    def _key(self, groups: Sequence[Group], indices: Sequence[int]) -> str:
        plan = asdict(self.plan) | {"rows": [*map(list, self.plan.rows)]}  # as stored names were made of it
        compared = self.drafts, self.ablation, self.sampling, plan, [groups[index] for index in indices]
        return hashlib.sha256(repr(compared).encode()).hexdigest()

    @torch.inference_mode()
    def choices(self, hidden: Tensor) -> tuple[Integers, Floats]:
        """Tokens and margins [n_groups, n_wanted] of states [n_groups, n_wanted, d_model], in chunks of logits."""
        places = [
            (noise_key(draft.prompt), position) for draft in self.drafts for position in range(len(draft.choices))
        ]
        # Choice by choice, not group by group: so one draw of noise serves the whole batch.
        n_groups, n_wanted = hidden.shape[:2]
        states = hidden.transpose(0, 1).flatten(0, 1)  # [n_wanted * n_groups, d_model]
        of_rows, parts = iter([place for place in places for _ in range(n_groups)]), []
        for logits in self.engine.logit_chunks(states):
            parts.append(choose(logits, list(islice(of_rows, len(logits))), self.sampling))
        tokens, margins = (
            torch.cat(side).view(n_wanted, n_groups).T.cpu().numpy() for side in zip(*parts, strict=True)
        )
        return tokens, margins

    def along(self, tokens: Integers, margins: Floats) -> list[Compared]:
        """Split one group's choices [n_wanted] by draft, and compare each part."""
        compared, start = [], 0
        for draft in self.drafts:
            n = len(draft.choices)
            chosen = tokens[start : start + n].tolist()
            differing = (
                at
                for at, (ours, theirs) in enumerate(zip(chosen, draft.choices, strict=True))
                # All end tokens mean the same.
                if ours != theirs and not (ours in self.ends and theirs in self.ends)
            )
            n_same = next(differing, n)
            # The margin among logits that are not finite is NaN, and numpy's min keeps it.
            narrowest = float(margins[start : start + min(n_same + 1, n)].min())
            compared.append(Compared(n_same, None if n_same == n else chosen[n_same], narrowest))
            start += n
        return compared

    def near_tie_tolerance(self, plain_margins: Sequence[float]) -> float:
        """The margin below which packed and plain arithmetic may choose different tokens, in logits.

        It is measured on the unablated answers, run in all layers and as a batch: the largest difference between packed
        and ``plain_margins``, choice by choice, times a safety factor. It is infinite if the two choose different
        tokens by a wider margin than that: then no comparison can be trusted, and every row is decoded plainly.
        """
        # Kept: the first comparison starts from them.
        self._captures[:] = self.engine.captured(self.sequences, (), self.ablation, self.plan, 0)

        def run(groups: Sequence[Group]) -> tuple[Integers, Floats]:
            return self.choices(self.engine.replayed(self._captures, groups, self.ablation, 0))

        # Rows of tokens and of margins, [n_choices of all drafts] each.
        parts = halving([(), ()], run, self.halved, lambda groups: self._key(groups, range(len(groups))))
        rows = [row for _, choices in parts for row in zip(*choices, strict=True)]
        difference = np.abs(np.array([margins for _, margins in rows]) - np.asarray(plain_margins, dtype=np.float64))
        largest = float(difference[np.isfinite(difference)].max(initial=0.0))
        tolerance = max(_LEAST_TOLERANCE[self.engine.dtype.itemsize], _SAFETY * largest)
        compared = (part for row in rows for part in self.along(*row))
        broken = any(part.other is not None and part.margin >= tolerance for part in compared)
        return float("inf") if broken else tolerance


@dataclass(frozen=True, slots=True)
class Economy:
    """What answers cost, and what plain decoding would have cost."""

    n_rows: int = 0
    """Answers."""
    n_drafted: int = 0
    """Answers equal to the unablated one."""
    n_continued: int = 0
    """Answers decoded from the first difference on."""
    n_near_ties: int = 0
    """Answers decoded plainly, because a choice was too close."""
    n_incomplete: int = 0
    """Answers cut where every judge was final, or at a stop text of the template."""
    tokens_computed: float = 0.0
    """Tokens run through the whole model; one that runs through half of the layers counts half."""
    tokens_plain: int = 0
    """Tokens that plain decoding with a cache runs for the same answers."""

    def __add__(self, other: Self) -> "Economy":
        return Economy(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class VerifiedDrafts:
    """Answers some prompts under one ablation of any head groups, by verified drafts."""

    def __init__(
        self,
        engine: Engine,
        encoded: Sequence[tuple[int, ...]],
        ablation: Ablation,
        decoding: Decoding,
        stop: Stop | None,
        unablated: Sequence[Answer] | None = None,
        plan: Plan | None = None,
        tolerance: float | None = None,
        n_rows: int | None = None,
        halved: MutableSet[str] | None = None,
    ) -> None:
        """Answer the prompts unablated, and measure which margins are near-ties; unless these are given.

        ``plan`` is the packed pass's, ``n_rows`` the rows a batch where answers are decoded. Margins below
        ``tolerance``, in logits, are near-ties. ``halved`` has the batches that did not fit the memory.
        """
        self.engine, self.encoded, self.ablation = engine, tuple(encoded), ablation
        self.decoding, self.stop, self.n_rows, self.halved = decoding, stop, n_rows, halved
        if unablated is None:
            unablated = unablated_answers(engine, encoded, decoding, stop, n_rows, halved)
        self.unablated = tuple(unablated)
        if stop is None and not all(decoded.complete for decoded in self.unablated):
            raise InputError("whole answers are wanted, and some of the unablated ones are cut")
        drafts = drafts_of(engine, encoded, self.unablated)
        if not drafts:
            raise InputError("the prompts leave no room for an answer in the model's context")
        # Index of a prompt -> of its draft.
        self.draft_of = {prompt: at for at, prompt in enumerate(drafts)}
        margins = [margin for prompt in drafts for margin in self.unablated[prompt].margins]
        self.drafts = DraftPass(engine, list(drafts.values()), ablation, decoding.sampling, plan, halved)
        self.tolerance = self.drafts.near_tie_tolerance(margins) if tolerance is None else tolerance

    def answers(
        self, places: Sequence[tuple[int, Group]], on_rows: OnRows = None, apart: bool = False
    ) -> tuple[list[Answer], Economy]:
        """Answers to prompts (by number) under groups, in the order given, and what they cost.

        Every prompt has the same groups, and one pass compares all; ``apart``, each has a pass for groups of its own.
        """
        on_rows, groups = on_rows or (lambda _: None), dict[int, list[Group]]()
        for prompt, group in places:
            groups.setdefault(prompt, []).append(group)
        drafted = [prompt for prompt in groups if prompt in self.draft_of]
        compared, tokens = dict[tuple[int, Group], Compared](), 0.0
        for prompts in [[prompt] for prompt in drafted] if apart else [drafted] * bool(drafted):
            drafts = self.drafts
            if apart:
                own = [drafts.drafts[self.draft_of[prompt]] for prompt in prompts]
                drafts = DraftPass(self.engine, own, self.ablation, self.decoding.sampling, halved=self.halved)
            found, cost = self._compared(drafts, prompts, groups[prompts[0]], on_rows)
            compared, tokens = compared | found, tokens + cost
        on_rows(sum(prompt not in self.draft_of for prompt, _ in places))
        rows = [(prompt, group, compared.get((prompt, group), _NO_ROOM)) for prompt, group in places]
        answers, economy = self._finished(rows, on_rows)
        return answers, economy + Economy(tokens_computed=tokens)

    def _compared(
        self, drafts: DraftPass, prompts: Sequence[int], groups: Sequence[Group], on_rows: Callable[[int], None]
    ) -> tuple[dict[tuple[int, Group], Compared], float]:
        def report(choices: Sequence[Compared]) -> None:
            settled = (self._settled(*row) for row in zip(prompts, choices, strict=True))
            on_rows(sum(decoded is not None for decoded in settled))

        compared, tokens = drafts.compare(groups, report)
        rows = ((group, dict(zip(prompts, row, strict=True))) for group, row in zip(groups, compared, strict=True))
        return {(prompt, group): choice for group, row in rows for prompt, choice in row.items()}, tokens

    def _finished(self, rows: Sequence[_Row], on_rows: Callable[[int], None]) -> tuple[list[Answer], Economy]:
        settled = {
            at: decoded
            for at, (prompt, _, compared) in enumerate(rows)
            if (decoded := self._settled(prompt, compared)) is not None
        }
        undecided = [at for at in range(len(rows)) if at not in settled]
        near_ties = [at for at in undecided if self._is_close(rows[at][2].margin)]
        differing = [at for at in undecided if not self._is_close(rows[at][2].margin)]

        def cost(at: int, decoded: Answer) -> int:
            return len(self.encoded[rows[at][0]]) + len(decoded.token_ids)

        by_route: dict[Route, list[int]] = {"continued": differing, "plain": near_ties}
        tokens = 0.0
        for route, waiting in by_route.items():
            for at, decoded in zip(waiting, self._decoded([rows[at] for at in waiting], route), strict=True):
                tokens += cost(at, decoded)
                if route == "continued" and any(map(self._is_close, decoded.margins)):
                    near_ties.append(at)
                else:
                    changed = decoded.differs_from(self.unablated[rows[at][0]])
                    settled[at] = replace(decoded, route=route, changed=changed)
                    on_rows(1)
        answers = [settled[at] for at in range(len(rows))]
        plain = sum(cost(at, decoded) for at, decoded in enumerate(answers) if rows[at][2] is not _NO_ROOM)
        routes = [decoded.route for decoded in answers]
        n_incomplete = sum(not decoded.complete for decoded in answers)
        counts = (routes.count("drafted"), routes.count("continued"), routes.count("plain"), n_incomplete)
        return answers, Economy(len(rows), *counts, tokens, plain)

    def _is_close(self, margin: float) -> bool:
        """Whether plain arithmetic might choose differently; so it might where the margin is NaN."""
        return not margin >= self.tolerance

    def _begun(self, prompt: int, compared: Compared) -> tuple[int, ...]:
        """The answer up to and including the first difference."""
        same = self.unablated[prompt].token_ids[: compared.n_same]
        return same if compared.other is None else (*same, compared.other)

    def _settled(self, prompt: int, compared: Compared) -> Answer | None:
        """The answer, if the comparison alone determines it."""
        unablated, begun = self.unablated[prompt], self._begun(prompt, compared)
        if self._is_close(compared.margin):
            return None
        if compared.other is None:
            return replace(unablated, route="drafted", changed=False)
        if compared.other in self.drafts.ends:
            return Answer(begun[:-1], True, unablated.limit, route="continued", changed=True)
        if len(begun) >= unablated.limit or (self.stop is not None and self.stop(begun)):
            return Answer(begun, False, unablated.limit, route="continued", changed=True)
        return None

    def _decoded(self, rows: Sequence[_Row], route: Route) -> tuple[Answer, ...]:
        begun = self._begun if route == "continued" else lambda *_: ()
        requests = [
            Request(self.encoded[prompt], group, begun(prompt, compared), self.stop) for prompt, group, compared in rows
        ]
        with warnings.catch_warnings():
            # The unablated answers have warned already, with the numbers of the whole set.
            warnings.simplefilter("ignore", ShortContextWarning)
            return answer(self.engine, requests, self.decoding, self.ablation, n_rows=self.n_rows, halved=self.halved)

    @property
    def cost_of_drafts(self) -> Economy:
        """Cost of the unablated answers: decoding, and three packed runs (captured, and two rows for near-ties)."""
        pairs = zip(self.encoded, self.unablated, strict=True)
        n_decoded = sum(len(token_ids) + len(decoded.token_ids) for token_ids, decoded in pairs)
        return Economy(tokens_computed=n_decoded + 3 * self.drafts.n_tokens)


def drafts_of(engine: Engine, encoded: Sequence[tuple[int, ...]], unablated: Sequence[Answer]) -> dict[int, Draft]:
    """Drafts by index of the prompt; prompts that leave no room for an answer have none."""
    end = (min(end_tokens(engine), default=0),)  # read only where an answer has one
    choices = [answer.token_ids + (end if answer.finished else ()) for answer in unablated]
    pairs = zip(encoded, choices, strict=True)
    return {at: Draft(tuple(prompt), chosen) for at, (prompt, chosen) in enumerate(pairs) if chosen}


def drafts_fit(engine: Engine, encoded: Sequence[tuple[int, ...]], unablated: Sequence[Answer]) -> bool:
    """Whether there are drafts, and the states of all of them fit the memory."""
    sequences = [draft.sequence for draft in drafts_of(engine, encoded, unablated).values()]
    try:
        plan = engine.plan(sequences) if sequences else None
    except InputError:  # not even one head fits
        return False
    allowed = allowed_memory(engine.device, engine.memory_budget, _MEMORY_SHARE)
    return plan is not None and engine.memory_estimate(sequences, plan) <= allowed


def unablated_answers(
    engine: Engine,
    encoded: Sequence[tuple[int, ...]],
    decoding: Decoding,
    stop: Stop | None,
    n_rows: int | None = None,
    halved: MutableSet[str] | None = None,
) -> tuple[Answer, ...]:
    """The drafts: the unablated model's answers, each cut where ``stop`` says so."""
    requests = [Request(tuple(token_ids), stop=stop) for token_ids in encoded]
    answers = answer(engine, requests, decoding, n_rows=n_rows, halved=halved)
    return tuple(replace(decoded, changed=False) for decoded in answers)
