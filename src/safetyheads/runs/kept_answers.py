"""Answers one set of prompts under any groups of heads, judges the answers, and keeps them in the run directory.

A record is one answer with the verdicts of all judges. Groups are answered in chunks; a stored chunk is not computed
again.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import chain
from math import ceil
from operator import itemgetter
from typing import Any, Self, TypeAlias

import numpy as np

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Answer, Decoding, Request, answer, rows_that_fit
from safetyheads.answers.drafts import Economy, OnRows, VerifiedDrafts, drafts_fit, drafts_of, unablated_answers
from safetyheads.answers.judging import JudgedAnswer, Judging
from safetyheads.answers.surprise import AnswerKey, Surprises, answer_key
from safetyheads.heads import Group, format_heads, parse_heads
from safetyheads.judges.base import Judge, Label, Verdict
from safetyheads.model.planning import Plan
from safetyheads.prompts.prompt_set import Prompt
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import RunDirectory, records_place
from safetyheads.runs.rates import GroupAnswers, without_texts
from safetyheads.runs.shards import Units
from safetyheads.runs.stored_files import Record, content_key, converted

Placed: TypeAlias = tuple[int, Group, Answer]
"""An answer with the number of its prompt and what was ablated."""
_Chunk: TypeAlias = tuple[range, Any, list[tuple[int, Group]]]
"""A block of prompts, what a key says of the groups, and prompts (by number) of the block with groups."""

# Answers that are stored together: the most that a kill costs.
_RECORDS_TOGETHER = 2048
# Prompts whose drafts are in memory together: the states of all layers, and those that choose under a batch of groups.
_PROMPTS_TOGETHER = 512
# Of more files than these few the last ones hold fewer answers, so that workers end at about the same time: each holds
# a share of the groups that are left, as if so many workers took one at once, and an eighth of those above at least.
_FEW_FILES, _WORKERS, _PARTS = 4, 64, 8
# Unablated answers are decoded and stored in at most so many parts, of about so many prompts at least, for workers to
# share.
_MOST_PARTS, _LEAST_PROMPTS = 16, 16
# Drafts pay from about so many groups on: preparing them costs as much as decoding two or three groups plainly, and of
# groups that change few answers they save half (bench/LOG.md, 2026-11-29).
_LEAST_DRAFTED = 8


# What is remembered of drafts, as results tell it.
_OF_DRAFTS = (("plan_drafts", Plan), ("tolerance", float), ("economy", Economy))
# What answers and records have alike; and what a record has only where it is told.
_AS_IT_IS = ("finished", "complete", "route", "changed", "behaviour", "answered")
_WHERE_TOLD = ("surprise", "thinks", "thought", "unclosed")
_OF_VERDICT = tuple(Verdict.__dataclass_fields__)


def has_failed(record: Record) -> bool:
    """Whether a judge failed on the answer for a passing reason, such as an endpoint that was down."""
    return any(verdict.get("passing") for verdict in record.get("verdicts", {}).values())


def failed_judges(records: Iterable[Record]) -> dict[str, Any]:
    """Judges that failed for passing reasons, and those that gave no verdict at all, as results hold it."""
    # Answers by judge, the reason why it gave no verdict (empty where it gave one), and whether that reason passes.
    failures: Counter[tuple[str, str, bool]] = Counter()
    for record in records:
        for name, verdict in record.get("verdicts", {}).items():
            reason = (verdict["reason"] or "no reason") if verdict["label"] == "unscored" else ""
            failures[name, reason, bool(verdict.get("passing"))] += 1
    failed: dict[str, Any] = {}
    for name in sorted({name for name, _, _ in failures}):
        counts = {key[1:]: count for key, count in sorted(failures.items()) if key[0] == name}
        gave_some, of = any(not reason for reason, _ in counts), sum(counts.values())
        reasons = {reason: n for (reason, passes), n in counts.items() if reason and (passes or not gave_some)}
        if reasons:
            passing = any(passes for _, passes in counts)
            failed[name] = {"n": sum(reasons.values()), "of": of, "reasons": reasons, "passing": passing}
    return {"failed_judges": failed} if failed else {}


class Halved(set[str]):
    """Batches that did not fit the memory, by name; remembered, so that a resumed run halves them again."""

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__(name.removeprefix("halved_") for name in directory.remembered("halved_"))
        self.directory = directory

    def add(self, name: str) -> None:
        """Remember a batch at once: a kill may come next."""
        super().add(name)
        self.directory.remember(f"halved_{name}", True)


def record_of(judged: JudgedAnswer, place: Mapping[str, Any], stores_completions: bool) -> dict[str, Any]:
    """An answer as the run directory holds it.

    Its ``place`` has ``id`` (number of the prompt), ``set`` (of prompts), ``part`` (``vanilla``, ``heads``, ``groups``
    ...), ``epsilon`` (None where nothing is ablated) and ``seed`` (of the sampling).
    """
    verdicts = {}
    for name, verdict in judged.verdicts.items():
        # Not asdict, which copies what it finds: there are some ten thousand verdicts in a run.
        given = {field: value for field in _OF_VERDICT if (value := getattr(verdict, field)) not in (None, "")}
        if not verdict.passing:
            del given["passing"]
        # A judge's own words may repeat the answer, so they are stored only with it.
        if not stores_completions:
            given.pop("raw", None)
        # A reason may be empty, and belongs to every verdict.
        verdicts[name] = {"reason": "", **given}
    # Of the prompt too: rates are made of records alone.
    told = {"surprise": judged.surprise, "cluster": judged.prompt.cluster, "category": judged.prompt.category}
    told |= {"thinks": judged.thinks or None, "unclosed": judged.unclosed or None}
    record: dict[str, Any] = {
        **place,
        "group": format_heads(judged.group),
        "first_token": list(judged.token_ids[:1]),
        "n_tokens": len(judged.token_ids),
        **{name: getattr(judged, name) for name in _AS_IT_IS},
        "verdicts": verdicts,
        **{name: value for name, value in told.items() if value is not None},
    }
    if stores_completions:
        record |= {"query": judged.prompt.query, "text": judged.text, "token_ids": list(judged.token_ids)}
        record |= {"thought": judged.thought} if judged.thought else {}
    return record


def judged_answer(record: Record, lead: str, prompt: Prompt | None = None) -> JudgedAnswer:
    """The answer of a record; without text, and with its first token alone, where completions are not stored.

    ``lead`` names the leading judge: a record holds verdicts in the order of names. By default the prompt is the
    record's query.
    """
    names = sorted(record["verdicts"], key=lambda name: name != lead)
    return JudgedAnswer(
        prompt=Prompt(record["query"]) if prompt is None else prompt,
        group=parse_heads(record["group"]),
        token_ids=tuple(record["token_ids"] if "token_ids" in record else record["first_token"]),
        text=record.get("text", ""),
        verdicts={name: Verdict(**record["verdicts"][name]) for name in names},
        **{name: record[name] for name in (*_AS_IT_IS, *_WHERE_TOLD) if name in record},
    )


def groups_together(groups: Sequence[Group], n_prompts: int) -> list[Sequence[Group]]:
    """Groups in the chunks that are answered and stored together."""
    most, chunks, at = max(1, _RECORDS_TOGETHER // n_prompts), [], 0
    least = max(1, most // _PARTS) if len(groups) > _FEW_FILES * most else most
    while at < len(groups):
        size = min(most, max(least, ceil((len(groups) - at) / _WORKERS)))
        chunks.append(groups[at : at + size])
        at += size
    return chunks


def prompts_together(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts, by number, in the parts whose unablated answers are decoded and stored together: of similar length."""
    n_parts = min(_MOST_PARTS, ceil(len(lengths) / _LEAST_PROMPTS))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [sorted(part.tolist()) for part in np.array_split(order, n_parts)]


def blocks_of(n_prompts: int) -> list[range]:
    """Prompts, by number, in the blocks that are answered apart: of one at a time drafts are in memory."""
    n_blocks = ceil(n_prompts / _PROMPTS_TOGETHER)
    return [range(n_prompts * at // n_blocks, n_prompts * (at + 1) // n_blocks) for at in range(n_blocks)]


class KeptAnswers:
    """One set of prompts under one decoding: unablated answers, and answers under any groups of any ablation.

    Many groups are answered by verified drafts, if these fit the memory. Few are decoded plainly, unless drafts are
    prepared. Tokens and records are the same, but for ``route``.
    """

    def __init__(
        self,
        name: str,
        judging: Judging,
        decoding: Decoding,
        directory: RunDirectory,
        progress: Progress,
        stores_completions: bool = True,
        about: Mapping[str, Any] | None = None,
        measures_surprise: bool = False,
    ) -> None:
        """Prepare; nothing is computed yet.

        File names begin with the set's ``name``. ``about`` is what records depend on besides, such as the weights in a
        run of several models. ``measures_surprise`` needs a model whose weights and attention nobody changes.
        """
        self.holds_texts = True
        """Whether records of ablated answers have texts in memory, which those of a large scan would fill."""
        self._shared: dict[tuple[Any, ...], Any] = {}
        self.name, self.judging, self.decoding = name, judging, decoding
        self.directory, self.progress, self.stores_completions = directory, progress, stores_completions
        self.about = about or {}
        self.engine, self.asked = judging.engine, judging.asked
        self.lead, self._halved = judging.judges[0].name, Halved(directory)
        self.measures_surprise = measures_surprise
        self.words: Sequence[Judge] = ()
        """Judges of words that label the whole unablated answers too."""
        self.limit: float | None = None
        """Surprise above which an answer is not coherent; the run sets it once it knows the unablated answers."""
        self.costs: dict[str, Economy] = {}
        """What each chunk of answers cost, in this process or an earlier one; a chunk's file begins with it."""
        self._parts = prompts_together([*map(len, self.asked.token_ids)])
        self._decoded: dict[int, Answer] = {}
        self._blocks = blocks_of(len(self.asked))
        self.held: dict[tuple[str, Decoding, Ablation, range], VerifiedDrafts] = {}
        """The drafts used last, which hold states of all layers: a run's sets share this, for the plan counts one."""

    def vanilla(self) -> GroupAnswers:
        """The unablated answers."""
        return GroupAnswers.of("", self._unablated_records, self.lead, self.limit)

    @property
    def unablated_units(self) -> Units:
        """The files that one shard makes of each part of the unablated answers, and the tokens that they cost."""
        units = dict[tuple[str, ...], float]()
        for part in self._parts:
            places = [records_place(f"drafts-{self.name}", self._fields(None, part))] * self.stores_completions
            places.append(records_place(f"vanilla-{self.name}", self._judged_fields(None, part)))
            places += [records_place(f"words-{self.name}", self._words_fields(part))] * bool(self.words)
            units[tuple(places)] = self._n_tokens(part)
        return units

    def _n_tokens(self, numbers: Iterable[int]) -> float:
        """Tokens of the prompts of these numbers, and of answers of full length."""
        return float(sum(len(self.asked.token_ids[number]) + self.decoding.max_new_tokens for number in numbers))

    @cached_property
    def _unablated_records(self) -> list[Record]:
        self.directory.divide(f"vanilla-{self.name}", self.unablated_units)
        with self.progress.track(f"{self.name}: unablated answers", len(self._parts)) as done:

            def records_of(part: Sequence[int]) -> list[Record]:
                def compute() -> list[dict[str, Any]]:
                    placed = [(number, (), decoded) for number, decoded in self._drafts_of(part).items()]
                    return self._judged("vanilla", None, placed, self._surprises)

                if self.stores_completions:
                    _ = self._drafts_of(part), self._n_rows  # where they were lost they are made again
                places = [(number, "", "vanilla") for number in part]
                records = self._kept(f"vanilla-{self.name}", self._judged_fields(None, part), compute, places)
                done(1)
                return records

            parts = self.directory.together(*(partial(records_of, part) for part in self._parts))
        return [record for records in parts for record in records]

    @cached_property
    def _surprises(self) -> Surprises | None:
        """Measures how surprising answers are; None where that is not wanted."""
        if not self.measures_surprise:
            return None
        n_tokens = self.directory.remember(f"row_tokens_{self.name}", self.engine.tokens_that_fit(), lambda n: n > 0)
        return Surprises(self.engine, self.asked.token_ids, n_tokens)

    def under(self, part: str, groups: Sequence[Group], ablation: Ablation) -> list[GroupAnswers]:
        """Every prompt's answers under each group; one key holds one chunk of groups, on one block of prompts."""
        chunks = [
            (block, [format_heads(group) for group in chunk], [(number, group) for group in chunk for number in block])
            for block in self._blocks
            for chunk in groups_together(groups, len(block))
        ]
        by_group = defaultdict[str, list[Record]](list)
        for record in self._records(part, ablation, chunks, len(groups)):
            by_group[record["group"]].append(record)
        return [GroupAnswers.of(text, by_group[text], self.lead, self.limit) for text in map(format_heads, groups)]

    def shorter(self, n_tokens: int) -> Self:
        """The same answers to the same prompts, of at most so many tokens; unablated ones are not answered again."""
        self._unablated_surprises()  # both know what was measured, and only this one stores it
        short = copy(self)
        short.decoding = replace(self.decoding, max_new_tokens=n_tokens)
        short.unablated = tuple(decoded.cut(n_tokens) for decoded in self.unablated)
        return short

    def of_each(self, part: str, own_groups: Sequence[Group], ablation: Ablation) -> list[GroupAnswers]:
        """Each prompt's answers under the first 1, 2 ... heads of a group of its own: ``top 1``, ``top 2`` and so on.

        One key holds one chunk of prompts.
        """
        sizes, chunks = range(1, len(own_groups[0]) + 1), list[_Chunk]()
        together = max(1, _RECORDS_TOGETHER // max(1, len(sizes)))
        for block in self._blocks:
            for chunk in (block[at : at + together] for at in range(0, len(block), together)):
                # Every prompt keeps its place; those of other chunks have no groups.
                own = [[group[:size] for size in sizes if at in chunk] for at, group in enumerate(own_groups)]
                texts = [[format_heads(group) for group in groups] for groups in own]
                places = [(number, group) for number, groups in enumerate(own) for group in groups]
                chunks.append((block, texts, places))
        records = self._records(part, ablation, chunks, len(sizes), apart=True)
        columns = {f"top {size}": records[size - 1 :: len(sizes)] for size in sizes}
        return [GroupAnswers.of(label, of, self.lead, self.limit) for label, of in columns.items()]

    def by_words(self) -> dict[str, list[Verdict]]:
        """Labels of the judges of words for the whole unablated answers, by judge.

        An answer that was cut where the run's judges were final, and these are not, is decoded to its end: the answers
        on which judges of words differ are among these.
        """
        if not self.words:
            return {}
        judging = Judging(self.engine, self.asked.prompts, self.words, self.decoding.max_new_tokens)
        settles = judging.stop or (lambda _: False)

        def compute(part: Sequence[int]) -> list[dict[str, Any]]:
            answers = self._drafts_of(part)
            cut = [at for at, decoded in answers.items() if not (decoded.complete or settles(decoded.token_ids))]
            requests = [Request(self.asked.token_ids[number], stop=self.asked.reader.ends) for number in cut]
            decoding = replace(self.decoding, full_answers=True)
            again = answer(self.engine, requests, decoding, n_rows=self._n_rows, halved=self._halved)
            answers |= zip(cut, again, strict=True)
            judged = judging.judged([(number, (), decoded) for number, decoded in answers.items()])
            return [
                {"id": number, "by_words": {name: verdict.label for name, verdict in row.verdicts.items()}}
                for number, row in zip(answers, judged, strict=True)
            ]

        names = [judge.name for judge in self.words]

        def fits(part: Sequence[int], records: Sequence[Record]) -> bool:
            by_words = [converted(record["by_words"], dict[str, Label]) for record in records]
            return [record["id"] for record in records] == [*part] and all({*of} == {*names} for of in by_words)

        def records_of(part: Sequence[int]) -> list[Record]:
            given = f"words-{self.name}", self._words_fields(part), partial(compute, part)
            return self.directory.records(*given, fits=partial(fits, part))

        parts = self.directory.together(*(partial(records_of, part) for part in self._parts))
        records = sorted(chain(*parts), key=itemgetter("id"))
        return {judge.name: [Verdict(record["by_words"][judge.name], "") for record in records] for judge in self.words}

    def judged(self, records: Iterable[Record]) -> list[JudgedAnswer]:
        """The answers of records of this set."""
        prompts = list(self.asked)
        return [judged_answer(record, self.lead, prompts[record["id"]]) for record in records]

    @cached_property
    def unablated(self) -> tuple[Answer, ...]:
        """The unablated answers as tokens, with their margins: the drafts."""
        parts = self.directory.together(*(partial(self._drafts_of, part) for part in self._parts))
        return tuple(decoded for _, decoded in sorted(chain(*(part.items() for part in parts)), key=itemgetter(0)))

    def _drafts_of(self, part: Sequence[int]) -> dict[int, Answer]:
        """The unablated answers to some prompts by number, which are decoded, read, or known."""

        def compute() -> list[dict[str, Any]]:
            token_ids, stop = [self.asked.token_ids[number] for number in part], self.judging.stop
            answers = unablated_answers(self.engine, token_ids, self.decoding, stop, self._n_rows, self._halved)
            return [asdict(decoded) for decoded in answers]

        def fits(records: Sequence[Record]) -> bool:
            answers, n_tokens = converted(records, list[Answer]), self.engine.architecture.vocabulary_size
            return len(answers) == len(part) and all(
                0 <= token < n_tokens for decoded in answers for token in decoded.token_ids
            )

        if self._decoded.keys().isdisjoint(part):
            name, fields = f"drafts-{self.name}", self._fields(None, part)
            keep = partial(self.directory.records, name, fields, compute, fits=fits)
            records = keep() if self.stores_completions else compute()
            self._decoded |= zip(part, (converted(record, Answer) for record in records), strict=True)
        return {number: self._decoded[number] for number in part}

    @cached_property
    def _n_rows(self) -> int:
        """Rows a batch where answers are decoded; as when the run began, since batches move the last bits."""
        longest = self.asked.longest + self.decoding.max_new_tokens
        return self.directory.remember(f"rows_{self.name}", rows_that_fit(self.engine, longest), lambda n: n > 0)

    def _plain(
        self, places: Sequence[tuple[int, Group]], ablation: Ablation, on_rows: OnRows
    ) -> tuple[list[Answer], Economy]:
        """Answers decoded from their first token, each until it is settled."""
        stop, token_ids = self.judging.stop, self.asked.token_ids
        requests = [Request(token_ids[number], group, stop=stop) for number, group in places]
        plain = answer(self.engine, requests, self.decoding, ablation, on_rows, self._n_rows, self._halved)
        answers = [
            replace(decoded, changed=decoded.differs_from(self.unablated[number]))
            for (number, _), decoded in zip(places, plain, strict=True)
        ]
        n_tokens = sum(len(token_ids[number]) for number, _ in places)
        n_tokens += sum(len(decoded.token_ids) for decoded in answers)
        n_incomplete = sum(not decoded.complete for decoded in answers)
        return answers, Economy(len(answers), 0, 0, 0, n_incomplete, n_tokens, n_tokens)

    def _key(self, ablation: Ablation | None = None, block: range | None = None) -> str:
        """Ends the names of what is remembered of the drafts, under an ablation or at all."""
        sampling = self.decoding.sampling
        ablated = "" if ablation is None else f"_{ablation.key}"
        sampled = "" if sampling.top_k == 1 else f"_{sampling.name}"
        n_tokens = self.decoding.max_new_tokens
        short = "" if n_tokens == self.judging.max_new_tokens else f"_{n_tokens}"
        part = "" if block is None or len(self._blocks) == 1 else f"_from_{block.start}_to_{block.stop}"
        return f"{self.name}{ablated}_{sampling.seed}{sampled}{short}{part}"

    def _drafts_pay(self, n_groups: int, ablation: Ablation) -> bool:
        """Whether groups are answered by drafts; a resumed run decides as the first start did."""
        plan = f"plan_drafts_{self._key(ablation, self._blocks[0])}"
        if n_groups < _LEAST_DRAFTED and self.directory.recalled(plan, Plan) is None:
            return False
        fit = self.directory.recalled(f"drafts_fit_{self._key()}", bool)
        if fit is None:
            fits = (drafts_fit(self.engine, *self._with_answers(block)) for block in self._blocks)
            fit = self.directory.remember(f"drafts_fit_{self._key()}", all(fits))
        return fit

    def _with_answers(self, block: range) -> tuple[Sequence[tuple[int, ...]], Sequence[Answer]]:
        """A block's prompts as tokens, and their unablated answers."""
        return self.asked.token_ids[block.start : block.stop], self.unablated[block.start : block.stop]

    def _drafts_under(self, ablation: Ablation, block: range) -> VerifiedDrafts:
        """The drafts of a block of prompts under an ablation."""
        place = self.name, self.decoding, ablation, block
        if place not in self.held:
            self.held.clear()
            # Another plan would move margins in their last bits, and so perhaps the number of near-ties.
            key, (token_ids, unablated) = self._key(ablation, block), self._with_answers(block)
            drafts, plan = drafts_of(self.engine, token_ids, unablated), None
            if drafts:
                layout = self.engine.plan([draft.sequence for draft in drafts.values()])
                plan = self.directory.remember(f"plan_drafts_{key}", layout, lambda stored: stored.is_of(len(drafts)))
            asked = self.engine, token_ids, ablation, self.decoding, self.judging.stop
            measured = self.directory.recalled(f"tolerance_{key}", float, lambda stored: stored >= 0)
            verified = VerifiedDrafts(*asked, unablated, plan, measured, self._n_rows, self._halved)
            # Infinite where logits are not finite; JSON cannot write that.
            tolerance = min(verified.tolerance, sys.float_info.max)
            verified.tolerance = self.directory.remember(f"tolerance_{key}", tolerance, lambda stored: stored >= 0)
            self.directory.remember(f"economy_{key}", verified.cost_of_drafts)
            self.held[place] = verified
        return self.held[place]

    def _records(
        self, part: str, ablation: Ablation, chunks: Sequence[_Chunk], n_groups: int, apart: bool = False
    ) -> list[Record]:
        """Records, chunk by chunk; one that is not stored yet is decoded, by drafts where these pay, and judged."""
        stage, drafted = f"{part.replace('_', '-')}-{self.name}", self._drafts_pay(n_groups, ablation)
        unablated = self._unablated_surprises()

        def chunk_of(block: range, places: Sequence[tuple[int, Group]], fields: Mapping[str, Any]) -> list[Record]:
            def compute() -> list[dict[str, Any]]:
                if drafted:
                    in_block = [(number - block.start, group) for number, group in places]
                    answers, economy = self._drafts_under(ablation, block).answers(in_block, done, apart)
                else:
                    answers, economy = self._plain(places, ablation, done)
                placed = [(*place, decoded) for place, decoded in zip(places, answers, strict=True)]
                if self._surprises is not None:
                    # Which answers other chunks had is known to the process that made them alone.
                    self._surprises.known = dict(unablated)
                return [asdict(economy), *self._judged(part, ablation.epsilon, placed, self._surprises)]

            named = [(number, format_heads(group), part) for number, group in places]
            cost, *chunk = self._kept(stage, fields, compute, named, n_before=1)
            self.costs[content_key(fields)] = Economy(**cost)
            key = self._key(ablation, block)
            if drafted and None in (self.directory.recalled(f"{name}_{key}", kind) for name, kind in _OF_DRAFTS):
                self._drafts_under(ablation, block)
            return chunk if self.holds_texts else [without_texts(record, self._shared) for record in chunk]

        tasks, units = list[Callable[[], list[Record]]](), dict[tuple[str, ...], float]()
        for block, texts, places in chunks:
            numbers = None if len(self._blocks) == 1 else list(block)
            fields = self._judged_fields(ablation, numbers) | {"groups": texts}
            units[(records_place(stage, fields),)] = self._n_tokens(number for number, _ in places)
            tasks.append(partial(chunk_of, block, places, fields))
        self.directory.divide(stage, units)
        label, total = f"{self.name}: {part}".replace("_", " "), sum(len(places) for *_, places in chunks)
        with self.progress.track(label, total) as done:
            parts = self.directory.together(*tasks)
        return [record for chunk in parts for record in chunk]

    def _kept(
        self,
        stage: str,
        fields: Mapping[str, Any],
        compute: Callable[[], list[dict[str, Any]]],
        places: Sequence[tuple[int, str, str]],
        n_before: int = 0,
    ) -> list[Record]:
        """Stored or computed records; of stored ones, what a judge failed on for a passing reason is judged again.

        They are answers to the prompts of these numbers, each with its group and part, after ``n_before`` records of
        another kind.
        """
        needed = {*_AS_IT_IS, "n_tokens", *(("query", "text", "token_ids") if self.stores_completions else ())}
        names = {judge.name for judge in self.judging.judges}

        def fits(records: Sequence[Record]) -> bool:
            converted(records[:n_before], list[Economy])
            answers = records[n_before:]
            whole = all(record.keys() >= needed and record["verdicts"].keys() == names for record in answers)
            return whole and [(record["id"], record["group"], record["part"]) for record in answers] == [*places]

        def mend(records: list[Record]) -> Sequence[Record]:
            if not self.stores_completions:
                return compute()
            placed, known = [], {}
            for record in filter(has_failed, records):
                number, token_ids, finished = record["id"], tuple(record["token_ids"]), record["finished"]
                limit = len(token_ids) + (not record["complete"])
                decoded = Answer(token_ids, finished, limit, (), record["route"], record["changed"])
                placed.append((number, parse_heads(record["group"]), decoded))
                sound = {name: given for name, given in record["verdicts"].items() if not given.get("passing")}
                known[*answer_key(number, token_ids), finished] = {name: Verdict(**sound[name]) for name in sound}
            judged = iter(self.judging.judged(placed, known=known))
            return [
                {**record, "verdicts": record_of(next(judged), {}, True)["verdicts"]} if has_failed(record) else record
                for record in records
            ]

        return self.directory.records(stage, fields, compute, mend, has_failed, fits)

    def _unablated_surprises(self) -> dict[AnswerKey, float]:
        """How surprising the unablated answers are; they are known from here on."""
        if self._surprises is None:
            return {}
        known = {
            answer_key(record["id"], self.unablated[record["id"]].token_ids): record["surprise"]
            for record in self._unablated_records
            if "surprise" in record
        }
        self._surprises.known |= known
        return known

    def _judged(
        self, part: str, epsilon: float | None, placed: Sequence[Placed], surprises: Surprises | None
    ) -> list[dict[str, Any]]:
        place = {"set": self.name, "part": part, "epsilon": epsilon, "seed": self.decoding.sampling.seed}
        return [
            record_of(judged, {"id": number, **place}, self.stores_completions)
            for (number, _, _), judged in zip(placed, self.judging.judged(placed, surprises), strict=True)
        ]

    @cached_property
    def _described(self) -> list[dict[str, Any]]:
        """The judges and, last, the rules of words: hundreds of phrases, and every file's key has them."""
        return [judge.describe() for judge in (*self.judging.judges, self.judging.rules)]

    def _fields(self, ablation: Ablation | None, part: Sequence[int] | None = None) -> dict[str, Any]:
        """All that the answers depend on, groups and judges aside; of unablated ones, the prompts of their part."""
        # Judges matter only if they decide where an answer may end.
        early = self.judging.decides_early
        return {
            **self.about,
            "prompts": part,
            "tokens": self.asked.sha256,
            "ablation": None if ablation is None else asdict(ablation),
            "decoding": asdict(self.decoding),
            "stops": self._described if early else [],
        }

    def _words_fields(self, part: Sequence[int]) -> dict[str, Any]:
        return self._fields(None, part) | {"by_words": [judge.describe() for judge in self.words]}

    def _judged_fields(self, ablation: Ablation | None, part: Sequence[int] | None = None) -> dict[str, Any]:
        """All that judged answers depend on, groups aside."""
        return self._fields(ablation, part) | {
            "judges": self._described[:-1],
            "rules": self._described[-1],
            "surprise": self.measures_surprise,
        }
