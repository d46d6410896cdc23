"""safetyheads: which attention heads a language model's refusals depend on, and how concentrated that is.

Public names are listed in ``__all__``; those that need torch are imported when they are first used.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.errors import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.heads import Head, parse_heads
from safetyheads.prompts.prompt_set import Prompt, PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    # Each name again as itself, which tells type checkers that it is public. All are imported when they are first used.
    from safetyheads.answers.decoding import (
        GREEDY as GREEDY,
        TOP_5 as TOP_5,
        Decoding as Decoding,
        Sampling as Sampling,
        generate as generate,
    )
    from safetyheads.answers.success import (
        AnswerScan as AnswerScan,
        AttackSuccess as AttackSuccess,
        attack_success_rate as attack_success_rate,
        query_level_attack_success_rate as query_level_attack_success_rate,
        query_level_groups as query_level_groups,
        scan_attack_success_rate as scan_attack_success_rate,
    )
    from safetyheads.model.attention_swap import swapped_attention as swapped_attention
    from safetyheads.cli.functions import audit as audit, compare as compare, read_run as read_run, scan as scan
    from safetyheads.demo import Demo as Demo, load_demo as load_demo
    from safetyheads.integrations.hooks import (
        HookCheck as HookCheck,
        head_columns as head_columns,
        hooks_for as hooks_for,
        transformer_lens_hooks as transformer_lens_hooks,
        verify_hook as verify_hook,
    )
    from safetyheads.judges.base import Completion as Completion, Judge as Judge, Verdict as Verdict
    from safetyheads.judges.keywords import KeywordJudge as KeywordJudge
    from safetyheads.judges.named import judge_named as judge_named
    from safetyheads.judges.phrase_judge import PhraseJudge as PhraseJudge
    from safetyheads.measures.head_pass import Score as Score
    from safetyheads.measures.sahara import rank_heads as rank_heads, sahara as sahara
    from safetyheads.measures.screening import Extent as Extent
    from safetyheads.measures.scorers import (
        Opener as Opener,
        Rescored as Rescored,
        generalized_ships as generalized_ships,
        mean_ships as mean_ships,
        refusal_score as refusal_score,
        scorer_named as scorer_named,
        screened_ships as screened_ships,
        ships as ships,
    )
    from safetyheads.model.engine import Engine as Engine
    from safetyheads.scores import GroupScorer as GroupScorer, HeadScores as HeadScores, SearchTrace as SearchTrace
    from safetyheads.stats.intervals import Rate as Rate
    from safetyheads.stats.testing import PairedDifference as PairedDifference

__version__ = "0.1.0"


def _lazy_names() -> dict[str, str]:
    """Name -> its module, of all that is imported above for type checkers alone."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = (node for node in checked.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_LAZY = _lazy_names()

__all__ = [
    "Ablation",
    "Head",
    "InputError",
    "Prompt",
    "PromptSet",
    "SCALING_CONTRIBUTION",
    "SafetyheadsError",
    "Template",
    "UNDIFFERENTIATED_ATTENTION",
    "UnsupportedModelError",
    "parse_heads",
    *_LAZY,
]


def __dir__() -> list[str]:
    """The public names, those too that are not imported yet."""
    return ["__version__", *__all__]


def __getattr__(name: str) -> Any:
    """Import a heavy name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    # Kept, so that the next use does not come here.
    globals()[name] = value
    return value
