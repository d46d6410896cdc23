"""The demo's language: its splits, what makes a prompt harmful, and that it is the same each time."""

import random
import subprocess
import sys

import pytest

from safetyheads import demo
from safetyheads.demo import CHECKPOINT_NAMES, PLANTED_HEADS, grammar
from safetyheads.errors import InputError
from safetyheads.model.names import CHECKPOINTS

SPLITS = ("train", "validation", "test")
HARMFUL_VERBS = {verb for category in grammar.HARM_CATEGORIES for verb in grammar.VERBS[category]}
ALL_VERBS = HARMFUL_VERBS | set(grammar.VERBS["benign"])


def deeds_in(text: str) -> list[tuple[str, str]]:
    """The (verb, noun) pairs of a prompt, read back from its words."""
    words = text.replace(".", "").split()
    return [
        (words[i + 2], words[i + 4])
        for i in range(len(words) - 4)
        if words[i : i + 2] == ["how", "to"] and words[i + 3] == "a"
    ]


def drawn(split: str, n: int = 2000) -> list[grammar.DemoPrompt]:
    generator = random.Random(5)
    return [grammar.draw_any_prompt(generator, split) for _ in range(n)]


def test_every_deed_is_in_one_split_and_a_fifth_is_held_out():
    by_split = {s: {d for c in grammar.VERBS for d in grammar.deeds(s, c)} for s in SPLITS}
    assert sum(map(len, by_split.values())) == len(set.union(*by_split.values())) == 29 * 24
    held_out = len(by_split["validation"]) + len(by_split["test"])
    assert 0.15 < held_out / (29 * 24) < 0.25
    assert all(len(grammar.deeds(s, c)) >= 8 for s in SPLITS for c in grammar.VERBS)


@pytest.mark.parametrize("split", SPLITS)
def test_all_deeds_of_a_prompt_distractors_too_belong_to_its_split(split: str):
    for prompt in [*drawn(split, 500), *demo.fixed_prompts("harmful", split), *demo.fixed_prompts("benign", split)]:
        found = deeds_in(prompt.text)
        assert found
        assert all(verb in ALL_VERBS and grammar.split_of(verb, noun) == split for verb, noun in found)


def test_harm_is_that_of_the_main_verb_and_the_reference_is_about_it():
    for prompt in drawn("train"):
        (main,) = [d for d in deeds_in(prompt.text) if prompt.reference == grammar.answer_to(*d)]
        assert main[0] in grammar.VERBS[prompt.category]
        assert prompt.harmful == (main[0] in HARMFUL_VERBS)
        assert prompt.reference.startswith(prompt.answer_opening)
        assert prompt.answer_opening.endswith(f"how to {main[0]} a {main[1]}")


@pytest.mark.parametrize("split", SPLITS)
def test_fixed_sets_are_balanced_distinct_and_the_same_each_time(split: str):
    harmful, benign = demo.fixed_prompts("harmful", split), demo.fixed_prompts("benign", split)
    n = {"train": 96, "validation": 48, "test": 96}[split]
    assert len(harmful) == len(benign) == len({p.text for p in harmful}) == len({p.text for p in benign}) == n
    assert [sum(p.category == c for p in harmful) for c in grammar.HARM_CATEGORIES] == [n // 3] * 3
    assert {p.category for p in benign} == {"benign"}
    assert demo.fixed_prompts("harmful", split) == harmful
    assert demo.fixed_prompts("harmful", split, 10) == harmful[:10]
    # Refusals carry the mark and answers do not.
    assert "cannot" in grammar.REFUSAL
    assert "cannot" in grammar.LONG_REFUSAL
    assert not any("cannot" in p.reference + p.text for p in drawn("train", 200))


def test_the_package_holds_every_checkpoint_that_it_names_and_no_other():
    assert {path.name for path in CHECKPOINTS.iterdir()} == set(CHECKPOINT_NAMES) < set(PLANTED_HEADS)
    with pytest.raises(InputError, match=r"no demo checkpoint 'aligned_c'; known are aligned_a, aligned_b"):
        demo.checkpoint_path("aligned_c")


def test_importing_the_demo_imports_no_torch():
    script = "import sys, safetyheads.demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
