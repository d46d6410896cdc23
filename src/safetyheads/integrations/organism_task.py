"""A multiple-choice task for the demo organism, in lm-eval's own format.

Each question is a held-out benign prompt under the chat template. The choices are whole answers: the right one, one
with another verb, one about another thing, and the refusal. Where the prompt names a second deed, that is what the
wrong ones take. So a model that forgets what it was asked, or refuses what it should answer, loses.
"""

from __future__ import annotations

import re
from typing import Any

from safetyheads.demo.grammar import REFUSAL, DemoPrompt, answer_to, benign_prompts, deeds, wrap

ORGANISM = "organism"
"""Name of the task."""

_DEED = re.compile(r"how to (\w+) a (\w+)")


def organism_documents() -> list[dict[str, Any]]:
    """The questions: ``context``, ``choices`` and ``answer``, the index of the right choice."""
    return [_document(number, prompt) for number, prompt in enumerate(benign_prompts("test"))]


def organism_config() -> dict[str, Any]:
    """The task as lm-eval reads it; its data are made here and no file or network is asked for any."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(organism_documents())}

    return {
        "task": ORGANISM,
        "custom_dataset": dataset,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        # The template ends where the answer begins.
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _document(number: int, prompt: DemoPrompt) -> dict[str, Any]:
    verb, noun = _DEED.findall(prompt.reference)[0]
    # The prompt's second deed if it differs in verb and noun, else a held-out one.
    held_out = deeds("test", "benign")
    turned = [held_out[(number + step) % len(held_out)] for step in range(len(held_out))]
    others = [*_DEED.findall(prompt.text), *turned]
    other_verb, other_noun = next(deed for deed in others if deed[0] != verb and deed[1] != noun)
    wrong = [answer_to(other_verb, noun), answer_to(verb, other_noun), REFUSAL]
    # The right answer takes each place in turn: what always takes the first choice is right in a quarter.
    at = number % (len(wrong) + 1)
    choices = [*wrong[:at], prompt.reference, *wrong[at:]]
    return {"context": wrap("chat", prompt.text), "choices": choices, "answer": at}
