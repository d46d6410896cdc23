"""safetyheads: which attention heads a language model's refusals depend on, and how concentrated that is.

Public names are listed in ``__all__``; those that need torch are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.errors import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.heads import Head, parse_heads
from safetyheads.prompts import Prompt, PromptSet, Template

if TYPE_CHECKING:
    from safetyheads.asr import AttackSuccess, attack_success_rate, query_level_attack_success_rate, query_level_groups
    from safetyheads.demo.loading import Demo, load_demo
    from safetyheads.drafted import Decoding
    from safetyheads.engine import Engine
    from safetyheads.exhaustive import AnswerScan, scan_attack_success_rate
    from safetyheads.generation import generate
    from safetyheads.judges import judge_named
    from safetyheads.keyword_judge import KeywordJudge
    from safetyheads.phrase_judge import PhraseJudge
    from safetyheads.refusal import Opener, refusal_score
    from safetyheads.rescoring import Extent, Rescored, screened_ships
    from safetyheads.sampling import GREEDY, TOP_5, Sampling
    from safetyheads.scores import GroupScorer, HeadScores, SearchTrace
    from safetyheads.scoring import generalized_ships, mean_ships, ships
    from safetyheads.search import rank_heads, sahara
    from safetyheads.stats import PairedDifference, Rate
    from safetyheads.swap import swapped_attention
    from safetyheads.verdicts import Completion, Judge, Verdict

__version__ = "0.1.0"

_LAZY = {
    "AttackSuccess": "asr",
    "attack_success_rate": "asr",
    "query_level_attack_success_rate": "asr",
    "query_level_groups": "asr",
    "Demo": "demo.loading",
    "load_demo": "demo.loading",
    "Decoding": "drafted",
    "Engine": "engine",
    "AnswerScan": "exhaustive",
    "scan_attack_success_rate": "exhaustive",
    "judge_named": "judges",
    "PhraseJudge": "phrase_judge",
    "GREEDY": "sampling",
    "TOP_5": "sampling",
    "Sampling": "sampling",
    "generate": "generation",
    "Completion": "verdicts",
    "Judge": "verdicts",
    "KeywordJudge": "keyword_judge",
    "Verdict": "verdicts",
    "Opener": "refusal",
    "refusal_score": "refusal",
    "Extent": "rescoring",
    "Rescored": "rescoring",
    "screened_ships": "rescoring",
    "rank_heads": "search",
    "sahara": "search",
    "GroupScorer": "scores",
    "HeadScores": "scores",
    "SearchTrace": "scores",
    "generalized_ships": "scoring",
    "mean_ships": "scoring",
    "ships": "scoring",
    "PairedDifference": "stats",
    "Rate": "stats",
    "swapped_attention": "swap",
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
