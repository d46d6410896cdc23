"""Ablations: names, equations, bounds of epsilon."""

import math

import pytest

from safetyheads.ablation import ABLATION_KINDS, SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.errors import InputError


@pytest.mark.parametrize("name", ABLATION_KINDS)
def test_a_kind_reads_back_from_its_name_with_dashes_and_capitals(name):
    assert Ablation.parse(f" {name.replace('_', '-').upper()} ", 0.5) == Ablation(name).at(0.5)


def test_short_forms_mean_the_papers_ablations():
    assert Ablation.parse("ua") == UNDIFFERENTIATED_ATTENTION
    assert Ablation.parse("SC") == SCALING_CONTRIBUTION
    assert Ablation.parse("ua-key").kind.tensor == "key"
    assert UNDIFFERENTIATED_ATTENTION.epsilon == SCALING_CONTRIBUTION.epsilon == Ablation.parse("ua").epsilon == 1e-5


def test_each_ablation_changes_the_tensor_that_its_equation_says():
    acts = {name: (kind.tensor, kind.operation) for name, kind in ABLATION_KINDS.items()}
    assert acts == {
        "undifferentiated_attention": ("query", "scale"),
        "undifferentiated_attention_key": ("key", "scale"),
        "scaling_contribution": ("head_output", "scale"),
        "mean_query": ("query", "mean"),
        "mean_key": ("key", "mean"),
        "mean_head_output": ("head_output", "mean"),
    }


@pytest.mark.parametrize("epsilon", [-1e-9, math.nan, math.inf, "half"])
def test_epsilon_is_finite_and_not_negative(epsilon):
    with pytest.raises(InputError, match="epsilon must be a finite number"):
        UNDIFFERENTIATED_ATTENTION.at(epsilon)
