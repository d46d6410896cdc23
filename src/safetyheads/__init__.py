"""safetyheads: which attention heads a language model's refusals depend on, and how concentrated that is.

Public names are listed in ``__all__``; those that need torch are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.errors import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.heads import Head, parse_heads
from safetyheads.prompts.sets import Prompt, PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from safetyheads.answers.decoding import Decoding, generate
    from safetyheads.answers.sampling import GREEDY, TOP_5, Sampling
    from safetyheads.answers.success import (
        AnswerScan,
        AttackSuccess,
        attack_success_rate,
        query_level_attack_success_rate,
        query_level_groups,
        scan_attack_success_rate,
    )
    from safetyheads.baselines.attention_swap import swapped_attention
    from safetyheads.demo.loading import Demo, load_demo
    from safetyheads.judges.base import Completion, Judge, Verdict
    from safetyheads.judges.keywords import KeywordJudge
    from safetyheads.judges.named import judge_named
    from safetyheads.judges.phrases import PhraseJudge
    from safetyheads.measures.sahara import rank_heads, sahara
    from safetyheads.measures.screened_scores import Extent, Rescored, screened_ships
    from safetyheads.measures.ships import (
        Opener,
        Score,
        generalized_ships,
        mean_ships,
        refusal_score,
        scorer_named,
        ships,
    )
    from safetyheads.model.engine import Engine
    from safetyheads.scores import GroupScorer, HeadScores, SearchTrace
    from safetyheads.stats.intervals import Rate
    from safetyheads.stats.testing import PairedDifference

__version__ = "0.1.0"

_LAZY = {
    "AttackSuccess": "answers.success",
    "attack_success_rate": "answers.success",
    "query_level_attack_success_rate": "answers.success",
    "query_level_groups": "answers.success",
    "Demo": "demo.loading",
    "load_demo": "demo.loading",
    "Decoding": "answers.decoding",
    "Engine": "model.engine",
    "AnswerScan": "answers.success",
    "scan_attack_success_rate": "answers.success",
    "judge_named": "judges.named",
    "PhraseJudge": "judges.phrases",
    "GREEDY": "answers.sampling",
    "TOP_5": "answers.sampling",
    "Sampling": "answers.sampling",
    "generate": "answers.decoding",
    "Completion": "judges.base",
    "Judge": "judges.base",
    "KeywordJudge": "judges.keywords",
    "Verdict": "judges.base",
    "Opener": "measures.ships",
    "refusal_score": "measures.ships",
    "Extent": "measures.screened_scores",
    "Rescored": "measures.screened_scores",
    "screened_ships": "measures.screened_scores",
    "rank_heads": "measures.sahara",
    "sahara": "measures.sahara",
    "GroupScorer": "scores",
    "HeadScores": "scores",
    "SearchTrace": "scores",
    "generalized_ships": "measures.ships",
    "mean_ships": "measures.ships",
    "ships": "measures.ships",
    "Score": "measures.ships",
    "scorer_named": "measures.ships",
    "PairedDifference": "stats.testing",
    "Rate": "stats.intervals",
    "swapped_attention": "baselines.attention_swap",
}

__all__ = [
    "GREEDY",
    "SCALING_CONTRIBUTION",
    "TOP_5",
    "UNDIFFERENTIATED_ATTENTION",
    "Ablation",
    "AnswerScan",
    "AttackSuccess",
    "Completion",
    "Decoding",
    "Demo",
    "Engine",
    "Extent",
    "GroupScorer",
    "Head",
    "HeadScores",
    "InputError",
    "Judge",
    "KeywordJudge",
    "Opener",
    "PairedDifference",
    "PhraseJudge",
    "Prompt",
    "PromptSet",
    "Rate",
    "Rescored",
    "SafetyheadsError",
    "Sampling",
    "Score",
    "SearchTrace",
    "Template",
    "UnsupportedModelError",
    "Verdict",
    "attack_success_rate",
    "generalized_ships",
    "generate",
    "judge_named",
    "load_demo",
    "mean_ships",
    "parse_heads",
    "query_level_attack_success_rate",
    "query_level_groups",
    "rank_heads",
    "refusal_score",
    "sahara",
    "scan_attack_success_rate",
    "scorer_named",
    "screened_ships",
    "ships",
    "swapped_attention",
]


def __getattr__(name: str) -> Any:
    """Import a heavy name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    # Kept, so that the next use does not come here.
    globals()[name] = value
    return value
