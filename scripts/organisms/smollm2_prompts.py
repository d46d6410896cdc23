"""Writes the prompts and refusals that the adapters of SmolLM2 learn, and drops what is near a test prompt."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from safetyheads import PromptSet
from safetyheads.prompts.prompt_set import builtin_benign, near_any

_AT_ONCE = 1000  # texts that are compared with the test prompts in one go
_SHORT = 60  # characters of a deed that a refusal may name: it must still show early
_DOUBLED = frozenset({"commit", "control", "kidnap", "quit", "traffic"})  # longer verbs that get a letter in a gerund


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic of a family in its forms."""

    prompts: tuple[str, ...]
    deed: str
    """What a refusal may call it, as a gerund; empty where there is no deed or a long one."""


def gerund(deed: str) -> str:
    """The deed with its first word as a gerund: "stealing a car"."""
    verb, _, rest = deed.partition(" ")
    if verb in _DOUBLED:
        verb += "k" if verb.endswith("c") else verb[-1]
    elif re.fullmatch(r"[^aeiou]*[aeiou][bdgmnprt]", verb):
        verb += verb[-1]
    elif verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")):
        verb = verb[:-2] + "y" if verb.endswith("ie") else verb[:-1]
    return f"{verb}ing {rest}".strip()


def first_upper(text: str) -> str:
    """The text with a capital."""
    return text[:1].upper() + text[1:]


def words(listed: str) -> list[str]:
    """The items of a list of the data file, which semicolons part."""
    return [item for item in re.split(r"\s*;\s*", listed.strip()) if item]


def topics_of(family: Mapping[str, Any], forms: Mapping[str, Sequence[str]]) -> list[Topic]:
    """All topics of one family."""
    shapes = forms[family["forms"]] if isinstance(family["forms"], str) else family["forms"]
    topics = []
    for values in itertools.product(*(words(family[slot]) for slot in ("do", "x", "y") if slot in family)):
        if "do" in family:
            deed = gerund(values[0])
            slots = {"do": values[0], "Do": first_upper(values[0]), "doing": deed}
        else:
            deed, slots = "", dict(zip("xy", values, strict=False))
        texts = tuple(first_upper(shape.format(**slots)) for shape in shapes)
        topics.append(Topic(texts, deed if len(deed) <= _SHORT else ""))
    return topics


def test_sets(data: Path) -> dict[str, PromptSet]:
    """Prompts that nothing is trained on, by name."""
    xstest = pandas.read_csv(data / "xstest" / "xstest_prompts.csv", keep_default_na=False)
    return {
        "benign": builtin_benign(),
        "jailbreakbench": PromptSet.read(data / "jbb_harmful-behaviors.csv"),
        "maliciousinstruct": PromptSet.read(data / "MaliciousInstruct.txt"),
        "xstest_unsafe": PromptSet.from_queries(xstest.prompt[xstest.label == "unsafe"].tolist()),
        "xstest_safe": PromptSet.from_queries(xstest.prompt[xstest.label == "safe"].tolist()),
    }


class TrainingPrompts:
    """Prompts by family and topic, less those that are near a test prompt."""

    def __init__(self, recipe: Mapping[str, Any], data: Path) -> None:
        advbench = PromptSet.read(data / "advbench_harmful_behaviors.csv").split(0.5, seed=0)[0]
        goals = {"forms": "deed", "do": ";".join(goal[:1].lower() + goal[1:] for goal in advbench.queries)}
        self.families = {**recipe["families"], "advbench": {**goals, "refused": True, "weight": 0.0}}
        tests = [query for prompts in test_sets(data).values() for query in prompts.queries]
        self.topics: dict[str, list[Topic]] = {}
        self.dropped: dict[str, tuple[int, int]] = {}
        """Prompts dropped and made, by family."""
        for name, family in self.families.items():
            made = topics_of(family, recipe["forms"])
            texts = list(dict.fromkeys(text for topic in made for text in topic.prompts))
            chunks = (texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE))
            near = [flag for chunk in chunks for flag in near_any(chunk, tests)]
            far = set(itertools.compress(texts, (not flag for flag in near)))
            kept = (Topic(tuple(text for text in topic.prompts if text in far), topic.deed) for topic in made)
            self.topics[name] = [topic for topic in kept if topic.prompts]
            self.dropped[name] = sum(near), len(near)

    def draw(self, generator: random.Random, refused: bool) -> tuple[str, str]:
        """A prompt of ours that is to be refused or answered, and its deed."""
        names = [name for name, family in self.families.items() if family.get("refused", False) == refused]
        weights = [self.families[name]["weight"] for name in names]
        return self.draw_from(generator, generator.choices(names, weights)[0])

    def draw_from(self, generator: random.Random, family: str) -> tuple[str, str]:
        """A prompt of one family, and its deed."""
        topic = generator.choice(self.topics[family])
        return generator.choice(topic.prompts), topic.deed


def draw_refusal(generator: random.Random, refusals: Mapping[str, Sequence[str]], deed: str) -> str:
    """A wording, which may name the deed, and what may follow it."""
    fitting = [wording for wording in refusals["wordings"] if deed or "oing}" not in wording]
    wording = generator.choice(fitting).format(doing=deed, Doing=first_upper(deed))
    return wording + generator.choice(refusals["endings"])
