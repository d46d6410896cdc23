"""Judges answers: every judge gives each distinct answer one verdict, and tells where an answer may end early."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from safetyheads.ablation import Ablation, AnyAblation
from safetyheads.answers.decoding import Answer, Decoding, Request, Route, Stop, answer
from safetyheads.answers.surprise import Surprises, answer_key
from safetyheads.display import Shown
from safetyheads.errors import InputError
from safetyheads.heads import AnyHeads, Group, format_heads, parse_groups
from safetyheads.judges.base import Completion, Judge, Label, Verdict, is_final, verdicts_of
from safetyheads.judges.named import default_judge_name, judge_named
from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.model.engine import Engine, ask
from safetyheads.prompts.asked import AnyPrompts, ReadAnswer
from safetyheads.prompts.prompt_set import Prompt

AnyJudge: TypeAlias = Judge | str
"""A judge, or its name."""
Key: TypeAlias = tuple[int, bytes, bool]
"""What a verdict depends on: number of the prompt, hash of the answer's tokens, and whether the model ended it."""


@dataclass(frozen=True, slots=True, repr=False)
class JudgedAnswer(Shown):
    """One prompt's answer under one group, with the verdict of every judge."""

    prompt: Prompt
    group: Group
    """Heads that were ablated."""
    token_ids: tuple[int, ...]
    """New tokens; only the first of them if the answer is not complete."""
    text: str
    """The answer as judged: without think block and stop text."""
    finished: bool
    """Whether the model ended it, or a stop text of the template did."""
    complete: bool
    """Whether it is the whole answer; if not, it was cut where every judge was final."""
    route: Route
    """Which decoding path produced it."""
    changed: bool | None
    """Whether it differs from the unablated answer; None where that was not compared."""
    verdicts: Mapping[str, Verdict]
    """By name of the judge; the first one leads."""
    behaviour: Label
    """What the rules of words say of it, whatever judges lead: complied, refused, incoherent or echoed."""
    answered: bool
    """Whether that is complied, and the answer begins with the prompt's reference if the user named one."""
    surprise: float | None = None
    """Mean of -log p of its tokens after the first under the unablated model, in nats; None where it is cut, refuses or
    has one token, and where that was not measured."""
    thinks: bool = False
    """Whether it begins with a think block, so that its first token does not open the answer."""
    thought: str = ""
    """Text of the think block; judges do not get it."""
    unclosed: bool = False
    """Whether the think block never closed, so that there is no answer."""

    def _facts(self) -> dict[str, object]:
        return {"group": format_heads(self.group), "label": self.verdict.label, "finished": self.finished}

    def to_row(self) -> dict[str, Any]:
        """What a table shows of the answer: all but its text."""
        labels = {name: verdict.label for name, verdict in self.verdicts.items()}
        place = {"query": self.prompt.query, "category": self.prompt.category, "group": format_heads(self.group)}
        flags = {name: getattr(self, name) for name in ("behaviour", "answered", "finished", "complete", "changed")}
        return {**place, **labels, "reason": self.verdict.reason, **flags, "n_tokens": len(self.token_ids)}

    @property
    def verdict(self) -> Verdict:
        """The leading judge's."""
        return next(iter(self.verdicts.values()))


class Judging:
    """Judges at work on one set of prompts."""

    def __init__(
        self,
        engine: Engine,
        prompts: AnyPrompts,
        judges: AnyJudge | Sequence[AnyJudge] | None,
        max_new_tokens: int,
        full_answers: bool = False,
    ) -> None:
        """Prepare to judge; the first judge leads, and ``full_answers`` go on to their end after every judge is final.

        Without judges, ``phrases`` judges a model that has a chat template, else ``paper``. ``max_new_tokens`` is the
        number requested, not what the context leaves: so all answers of a run are judged by one rule, and none counts
        as an attack because its prompt was long.
        """
        if judges is None:
            judges = default_judge_name(bool(engine.tokenizer.chat_template))
        given = tuple(judges) if isinstance(judges, Sequence) and not isinstance(judges, str) else (judges,)
        self.judges = tuple(judge_named(judge) if isinstance(judge, str) else judge for judge in given)
        if wrong := [type(judge).__name__ for judge in self.judges if not isinstance(judge, Judge)]:
            raise InputError(
                f"a judge is a name such as phrases, or an object with the members of Judge; got a {wrong[0]}"
            )
        names = [judge.name for judge in self.judges]
        if not names or len(set(names)) < len(names):
            raise InputError(f"judges need names of their own; got {', '.join(names) or 'none'}")
        self.engine, self.asked = engine, engine.ask(prompts)
        self.prompts = tuple(self.asked)
        self.max_new_tokens = max_new_tokens
        self.rules: Judge = PhraseJudge()
        """Finds refusals, empty and looping answers, and echoes; where it is a judge too, it is asked once."""
        self._everybody = self.judges if self.rules in self.judges else (*self.judges, self.rules)
        self.decides_early = not full_answers and all(judge.decides_early for judge in self.judges)
        self.seconds = dict.fromkeys(names, 0.0)
        """Time that each judge took."""
        self._verdicts: dict[Key, dict[str, Verdict]] = {}
        self._behaviour: dict[Key, Label] = {}

    @property
    def stop(self) -> Stop | None:
        """Whether an answer with these first tokens has ended, or every judge is final about it.

        None if neither can happen before the answer's own end. The rules of words count as a judge. No judge is final
        before a think block closes, nor about text that may yet turn out to be the mark of one.
        """
        if not self.decides_early:
            return self.asked.reader.ends

        def stop(token_ids: Sequence[int]) -> bool:
            read = self.asked.reader.read(token_ids)
            certain = read.certain
            return read.stopped or (certain is not None and all(is_final(judge, certain) for judge in self._everybody))

        return stop

    def judged(
        self,
        answers: Sequence[tuple[int, Group, Answer]],
        surprises: Surprises | None = None,
        known: Mapping[Key, Mapping[str, Verdict]] | None = None,
    ) -> list[JudgedAnswer]:
        """Answers (number of the prompt, group, answer) with their verdicts, in the same order.

        ``known`` verdicts are not asked for.

        ``surprises`` measures how surprising whole answers are that are no refusals; without it, none is measured.
        """
        keys: list[Key] = [(*answer_key(number, answer.token_ids), answer.finished) for number, _, answer in answers]
        pairs = list(zip(keys, answers, strict=True))
        read = {key: self.asked.reader.read(answer.token_ids) for key, (_, _, answer) in pairs}
        self._judge({key: answer for key, answer in read.items() if key not in self._verdicts}, known or {})
        judged = [self._judged(key, group, answer, read[key]) for key, (_, group, answer) in pairs]
        if surprises is not None:
            whole = [at for at, row in enumerate(judged) if row.complete and row.behaviour != "refused"]
            surprises.measure([(keys[at][0], judged[at].token_ids, read[keys[at]].n_thought) for at in whole])
            for at in whole:
                judged[at] = replace(judged[at], surprise=surprises.known.get(keys[at][:2]))
        return judged

    def _judge(self, answers: Mapping[Key, ReadAnswer], known: Mapping[Key, Mapping[str, Verdict]]) -> None:
        """Ask about answers that are new every judge whose verdict is not known."""
        system, length = self.asked.system, self.max_new_tokens
        completions = {}
        for key, read in answers.items():
            query, ended = self.prompts[key[0]].query, key[2] or read.stopped
            completions[key] = Completion(query, read.text, read.token_ids, ended, length, system, read.unclosed)
        verdicts: dict[Key, dict[str, Verdict]] = {key: {} for key in answers}
        for judge in self.judges:
            started = time.monotonic()
            asked = [key for key in answers if judge.name not in known.get(key, {})]
            answered = verdicts_of(judge, [completions[key] for key in asked]) if asked else ()
            given = dict(zip(asked, answered, strict=True))
            for key, by_judge in verdicts.items():
                by_judge[judge.name] = given[key] if key in given else known[key][judge.name]
            self.seconds[judge.name] += time.monotonic() - started
        if self.rules in self.judges:
            by_rules = tuple(by_judge[self.rules.name] for by_judge in verdicts.values())
        else:
            by_rules = verdicts_of(self.rules, list(completions.values()))
        # Only after all judges have answered: else an error of one would leave answers without its verdict.
        self._verdicts.update(verdicts)
        self._behaviour.update({key: verdict.label for key, verdict in zip(answers, by_rules, strict=True)})

    def _judged(self, key: Key, group: Group, answer: Answer, read: ReadAnswer) -> JudgedAnswer:
        prompt, behaviour = self.prompts[key[0]], self._behaviour[key]
        finished, complete = answer.finished or read.stopped, answer.complete or read.stopped
        # Of a cut answer only the certain part: another judge may be asked later whether it is final about that.
        text = read.text if complete or read.certain is None else read.certain
        begins = prompt.reference is None or text.lstrip().startswith(prompt.reference)
        return JudgedAnswer(
            prompt,
            group,
            answer.token_ids,
            text,
            finished,
            complete,
            answer.route,
            answer.changed,
            self._verdicts[key],
            behaviour,
            answered=behaviour == "complied" and begins,
            thinks=read.thinks,
            thought=read.thought,
            unclosed=read.unclosed,
        )


def answers_under(
    engine: Engine,
    prompts: AnyPrompts,
    columns: Sequence[Sequence[AnyHeads]],
    ablation: AnyAblation,
    judge: AnyJudge | Sequence[AnyJudge] | None,
    decoding: Decoding,
    on_rows: Callable[[int], None] | None = None,
) -> list[list[JudgedAnswer]]:
    """Judged answers, decoded plainly and in shared batches.

    ``columns`` [n_columns][n_prompts] holds a group for each prompt; the answers [n_columns][n_prompts] are in the same
    order.
    """
    prompts = ask(engine, prompts)
    n = len(prompts)
    parsed = [parse_groups(groups) for groups in columns]
    for groups in parsed:
        if len(groups) != n:
            raise InputError(f"{len(groups)} groups for {n} prompts; each prompt needs its own")
    judging = Judging(engine, prompts, judge, decoding.max_new_tokens, decoding.full_answers)
    encoded, stop = judging.asked.token_ids, judging.stop
    asked = [(number, group) for groups in parsed for number, group in enumerate(groups)]
    requests = [Request(encoded[number], group, stop=stop) for number, group in asked]
    answers = answer(engine, requests, decoding, Ablation.parse(ablation), on_rows)
    rows = judging.judged([(*place, decoded) for place, decoded in zip(asked, answers, strict=True)])
    return [rows[at * n : (at + 1) * n] for at in range(len(parsed))]
