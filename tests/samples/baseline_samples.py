"""What tests of baselines learn from: the organism's validation prompts with its own answers, or made-up ones."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from functools import cache

import torch
from families import built
from tiny_models import prompts_of, tokenizer

from safetyheads import SCALING_CONTRIBUTION, Engine, KeywordJudge, demo, load_demo
from safetyheads.answers.success import answers_under
from safetyheads.baselines.base import Material
from safetyheads.demo.loading import demo_prompts
from safetyheads.measures.ships import openers_of
from safetyheads.model.loading import use_our_attention

NEW_TOKENS = 32
"""The organism's longest answer has 26."""

MADE_UP = ((5, 9, 12, 40, 41, 8, 3, 22, 17), (7, 30, 2, 11), (19, 44, 50, 3, 3, 21))
ANSWERS = ((14, 15, 16), (20, 21, 22, 23), (6,))


@cache
def organism_material(n=12):
    """From validation prompts; tests ask the test split."""
    organism, base = load_demo("aligned_a"), load_demo("base").engine
    harmful = demo_prompts("harmful", "validation", demo.harmful_prompts("validation", n), with_reference=False)
    benign = demo_prompts("benign", "validation", demo.benign_prompts("validation", n))
    refused, answered = (
        answers_under(organism.engine, prompts, [()], SCALING_CONTRIBUTION, KeywordJudge(), NEW_TOKENS)[0]
        for prompts in (harmful, benign)
    )
    openers = tuple(opener.token_id for opener in openers_of(organism.engine, refused))
    said = [tuple(row.token_ids for row in rows) for rows in (refused, answered)]
    return Material(organism.engine, harmful, benign, *said, openers, base)


@cache
def held_out(n=8):
    """Harmful and benign test prompts of the organism."""
    organism = load_demo("aligned_a")
    return tuple(replace(prompts, prompts=prompts.prompts[:n]) for prompts in (organism.harmful, organism.benign))


def engine_on(family, changed=0.0):
    """A family's random model, unproved; the same with all weights moved is another checkpoint of it."""
    model = copy.deepcopy(built(family))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * changed)
    use_our_attention(model)
    return Engine(model, tokenizer(), name=family)


def made_up_material(engine, unaligned=None):
    """Tokens that mean nothing, for a random model."""
    harmful, benign = prompts_of(*MADE_UP), prompts_of(*(prompt[::-1] for prompt in MADE_UP))
    return Material(engine, harmful, benign, ANSWERS, ANSWERS[::-1], openers=(14, 20), unaligned=unaligned)


def weights_hash(model):
    """Of every byte of the model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
