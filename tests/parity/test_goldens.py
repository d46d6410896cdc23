"""Against what the paper's own code computes on a small random Llama (../shared/goldens)."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from safetyheads import Ablation, Engine, PromptSet, generalized_ships, parse_heads, sahara, ships
from safetyheads.answers.decoding import generate
from safetyheads.heads import Head

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens" / "llama_mha"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="../shared/goldens is not there")

KINDS = {
    "undifferentiated_attention": "undifferentiated_attention",
    "undifferentiated_attention_k": "undifferentiated_attention_key",
    "scaling_contribution": "scaling_contribution",
    "mean_query": "mean_query",
    "mean_key": "mean_key",
    "mean_head_output": "mean_head_output",
}
SEARCHED = ("undifferentiated_attention", "undifferentiated_attention_k", "scaling_contribution")
"""The mean kinds have goldens for Ships under the template only."""
TEMPLATES = {"direct": "direct", "template": "query_answer"}


@cache
def official():
    return json.loads((GOLDENS / "official.json").read_text())


@cache
def engine():
    return Engine.load(str(GOLDENS / "Llama"))


def prompts(template, limit=None):
    # The first ones, as the goldens have them; a limit of the reader draws.
    return PromptSet.read(GOLDENS / "prompts.csv", TEMPLATES[template], column="input")[:limit]


@pytest.mark.parametrize(
    ("kind", "template"),
    [(kind, template) for kind in KINDS for template in TEMPLATES if template == "template" or kind in SEARCHED],
)
def test_ships_agree_with_the_published_code(kind, template):
    key = f"{kind}/{template}"
    expected = torch.tensor(official()["ships"][key], dtype=torch.float64)
    ours = ships(engine(), prompts(template, len(expected)), Ablation(KINDS[kind])).values
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) < 1e-5  # the published code adds 1e-12 and sums in float32


@pytest.mark.parametrize("kind", SEARCHED)
def test_sahara_and_generalized_ships_agree_with_the_published_code(kind):
    expected = official()["sahara"][kind]
    scorer = generalized_ships(engine(), prompts("template"), Ablation(KINDS[kind]))
    trace = sahara(scorer, engine().heads, steps=len(expected["group"]))
    assert [str(head) for head in trace.group] == expected["group"]
    for step, golden in zip(trace.steps, expected["steps"], strict=True):
        for name, degrees in golden["degrees_float64"].items():
            head = Head.parse(name)
            assert float(step.values[head.layer, head.index]) == pytest.approx(degrees, abs=1e-3), name


@pytest.mark.parametrize("kind", [None, *SEARCHED])
def test_greedy_continuations_are_the_same_ids(kind):
    key = kind or "vanilla"
    expected = official()["greedy"][key]
    asked = prompts("template", len(expected))
    if kind is None:
        made = generate(engine(), asked, max_new_tokens=24)
    else:
        group = parse_heads(official()["sahara"][kind]["group"][0])
        made = generate(engine(), asked, 24, [group] * len(asked), Ablation(KINDS[kind]))
    end = engine().tokenizer.eos_token_id
    for answer, ids in zip(made, expected, strict=True):
        assert list(answer.token_ids) == [token for token in ids if token != end][: len(answer.token_ids)]
        assert len(answer.token_ids) >= len([token for token in ids if token != end])
