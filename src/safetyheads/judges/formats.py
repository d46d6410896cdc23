"""Lists what each ready judge model is asked, and parses what it answers.

The judges were trained on their input texts, so ``data/judges`` has these to the letter, blanks at line ends included.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from safetyheads.files import read_toml

Harm = Literal["harmful", "controversial", "safe"]
"""What a judge may say of an answer's harm; ``controversial`` only where it has such a grade."""


Reading: TypeAlias = tuple[bool | None, Harm | None, str]
"""Whether the answer refuses, whether it does harm (None where the judge says nothing), and the judge's own words for
it, such as a category of harm; never a passage of the answer."""


class JudgeFormat(NamedTuple):
    """One ready judge: what it is asked, and how its answer is read."""

    name: str
    checkpoint: str
    """Hub id of the default model."""
    parse: Callable[[str], Reading | None] | None = None
    """Reads what the judge writes, refusal and harm; gives None where that is no verdict."""
    max_new_tokens: int = 0
    values: tuple[tuple[str, float], ...] = ()
    """Where nothing is written: each possible next token with its worth, from 0 (harmless) to 1. The score is their
    expectation; it tells harm alone."""
    any_case: bool = False
    """Whether upper and lower case and a leading blank of these tokens count alike. If not, only the exact token
    counts, and a wrong input shows by a low mass."""
    template: str | None = None
    """Its input with ``{query}`` and ``{answer}``; None asks through the checkpoint's own chat template."""
    adds_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens; not where the template spells them out."""
    begins: str = ""
    """What the judge always writes before its verdict; put into the input, so that the verdict comes next."""
    answer_tokens: int = 2048
    """An answer is cut to this many of the judge's tokens; query and instructions never are."""
    verified: bool = False
    """Whether the wording was compared with a text of the judge's publishers."""


def fill(template: str, query: str, answer: str) -> str:
    """The template with both texts in their places, in one pass: braces inside a text are text."""
    texts = {"query": query, "answer": answer}
    return re.sub(r"\{(query|answer)\}", lambda found: texts[found[1]], template)


_HARMS: dict[str, Harm] = {
    **dict.fromkeys(("unsafe", "yes"), "harmful"),
    **dict.fromkeys(("safe", "no"), "safe"),
    "controversial": "controversial",
}


def _read(text: str, refusal: str, harm: str, category: str = "", needs_both: bool = False) -> Reading | None:
    """What a judge wrote, by regular expressions; None where it is no verdict."""
    refuses, harms = (re.search(pattern, text) for pattern in (refusal, harm))
    if not (all if needs_both else any)((refuses, harms)):
        return None
    named = re.search(category, text) if category else None
    words = "" if named is None or named[1].strip() == "None" else named[1].strip()
    return refuses and refuses[1].lower() == "yes", harms and _HARMS[harms[1].lower()], words


def _ready_judges() -> dict[str, JudgeFormat]:
    folder, ready = Path(__file__).parents[1] / "data/judges", {}
    for name, settings in read_toml(folder / "judges.toml").items():
        values = tuple((token, worth) for token, worth in settings.pop("values", ()))
        parse = partial(_read, **reads) if (reads := settings.pop("reads", None)) else None
        # Bytes: not one character of an input text may change.
        text = folder / f"{name}.txt"
        template = text.read_bytes().decode() if text.is_file() else None
        ready[name] = JudgeFormat(name, parse=parse, values=values, template=template, **settings)
    return ready


MODEL_JUDGES = _ready_judges()
"""The ready judges by name; a new judge model is one entry of ``data/judges/judges.toml``."""
