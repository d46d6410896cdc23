"""What baselines on the organism learn from: its validation prompts, with its own answers to them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from safetyheads import UNDIFFERENTIATED_ATTENTION, KeywordJudge, load_demo
from safetyheads.answers.success import answers_under
from safetyheads.baselines.base import Material
from safetyheads.measures.ships import openers_of
from safetyheads.runs.data import demo_set

N_TOKENS = 32
"""The organism's answers have at most 26 tokens."""


@cache
def organism(name="aligned_a"):
    return load_demo(name)


@cache
def material(name="aligned_a"):
    """Of 48 harmful and 48 benign validation prompts; the tests' prompts are of another split."""
    engine, harmful, benign = organism(name).engine, demo_set("harmful", "validation"), demo_set("benign", "validation")
    refused, answered = (
        answers_under(engine, prompts, [()], UNDIFFERENTIATED_ATTENTION, KeywordJudge(), N_TOKENS)[0]
        for prompts in (harmful, benign)
    )
    return Material(
        engine,
        harmful,
        benign,
        tuple(row.token_ids for row in refused),
        tuple(row.token_ids for row in answered),
        tuple(opener.token_id for opener in openers_of(engine, refused)),
    )


def short(name="aligned_a", n=16):
    """The same of the first ``n`` prompts of each kind, for tests in which the numbers do not matter."""
    whole = material(name)
    parts = (getattr(whole, field)[:n] for field in ("harmful", "benign", "refusals", "answers"))
    return replace(whole, **dict(zip(("harmful", "benign", "refusals", "answers"), parts, strict=True)))


def figures(method, learned, n, strengths, name="aligned_a"):
    """Per strength: setting, ASR, benign answers kept, parameters; on the first ``n`` test prompts of each kind."""
    demo, found = organism(name), []
    for one in method.interventions(learned, strengths):
        harmful, benign = (
            one.answers(demo.engine, prompts[:n], KeywordJudge(), N_TOKENS) for prompts in (demo.harmful, demo.benign)
        )
        found.append((one.setting, harmful.rate, benign.kept.rate, one.n_parameters))
    return found
