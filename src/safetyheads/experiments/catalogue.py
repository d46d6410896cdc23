"""The experiments by the paper's names. Owns their order, what each shows and needs; imports one when it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias

from safetyheads.errors import InputError

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab
    from safetyheads.experiments.outcome import Outcome

Need: TypeAlias = Literal["base", "related", "base_models", "learn_harmful", "lm-eval"]
ALL = "all"
"""Every experiment, one after the other."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment of the paper."""

    name: str
    title: str
    question: str
    """What it asks, in one or two sentences."""
    module: str
    """Where its function of the same name is, in this folder."""
    costs: str
    """In words, with H for heads, D for datasets of n prompts, T for templates."""
    needs: tuple[Need, ...] = ()
    """Settings without which it cannot be run, or an extra."""

    def run(self, lab: Lab) -> Outcome:
        """Run it; what the run directory holds already is not measured again."""
        function: Callable[[Lab, Experiment], Outcome] = getattr(
            import_module(f"safetyheads.experiments.{self.module}"), self.name
        )
        config = lab.config
        setting = (
            f"Ablations at epsilon {config.epsilon:g} where nothing else is said; judge {config.judge}; answers of at "
            f"most {config.max_new_tokens} new tokens."
        )
        return replace(function(lab, self), setting=setting)


EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        Experiment(
            "fig2",
            "Query-level ASR, each prompt without its own top head",
            "How many harmful prompts does the model answer once each goes without the one head that its own Ships "
            "ranks first (Fig 2)?",
            "query_level",
            "2 score passes over H heads and 6 answers a prompt, for each of D datasets and T templates",
        ),
        Experiment(
            "fig11",
            "Query-level ASR by number of heads, undifferentiated attention",
            "How does the ASR grow as each prompt goes without its own 1 to 10 top heads (Fig 11)?",
            "query_level",
            "1 score pass over H heads and 22 answers a prompt, for each of D datasets and T templates",
        ),
        Experiment(
            "fig12",
            "Query-level ASR by number of heads, scaling contribution",
            "The same under the other ablation (Fig 12, whose caption names the first one).",
            "query_level",
            "1 score pass over H heads and 22 answers a prompt, for each of D datasets and T templates",
        ),
        Experiment(
            "fig4a",
            "ASR by group size",
            "How does the ASR grow with the size of the group that Sahara finds on a dataset (Fig 4a)?",
            "fig4a",
            "5 score passes over H heads, 11 answers a prompt, up to 100 random ones and 6 benign ones, for each of D "
            "datasets and 2 ablations",
        ),
        Experiment(
            "table3",
            "Change of ASR by number of heads",
            "How far does the ASR rise with 1 to 5 heads, found on the dataset or for each prompt (Tables 3 and 5)?",
            "fig4a",
            "6 score passes over H heads and 11 answers a prompt, for each of D datasets and 2 ablations",
        ),
        Experiment(
            "table5",
            "Change of ASR by number of heads, further models",
            "The same for every model but the first (the paper's Table 5 is Vicuna's).",
            "fig4a",
            "as table3, for each further model",
        ),
        Experiment(
            "fig4b",
            "ASR of every head alone",
            "How many of all heads matter, and does a score know which (Fig 4b)?",
            "fig4b",
            "H + 1 answers a prompt, drafts shared, and 2 score passes over H heads, for each of D datasets",
        ),
        Experiment(
            "transfer",
            "Search set x test set",
            "Do heads that were found on one dataset, or under one ablation, serve another?",
            "transfer",
            "3 score passes over H heads and 2 D + 2 answers a prompt, for each of D datasets and 2 ablations",
        ),
        Experiment(
            "fig5",
            "Overlap of the top 10 heads",
            "Do ablations, datasets or models of one base rank the same heads first, beyond chance (Fig 5)?",
            "fig5",
            "2 score passes over H heads, for each of D datasets, and 1 for the related model",
        ),
        Experiment(
            "fig6a",
            "Attention of the base in the aligned model, and the reverse",
            "Does safety live in the attention weights (Fig 6a)?",
            "fig6a",
            "4 answers a prompt, for each of D datasets and the benign prompts",
            needs=("base",),
        ),
        Experiment(
            "fig6b",
            "Utility after ablation",
            "What do zero-shot tasks lose as 1 to n heads are ablated, beside pruning (Fig 6b)?",
            "fig6b",
            "every task of lm-eval once a group, ablation and pruned model",
            needs=("lm-eval", "learn_harmful"),
        ),
        Experiment(
            "fig7",
            "Attention maps of an ablated head",
            "What do undifferentiated attention (on query or key) and scaling contribution make of a head's attention, "
            "by epsilon (Fig 7)?",
            "maps",
            "one forward pass of one prompt for each epsilon and ablation",
        ),
        Experiment(
            "fig8",
            "Attention maps under mean ablation",
            "What does the mean over the layer's heads make of a head's attention (Fig 8)?",
            "maps",
            "one forward pass of one prompt for each mean ablation",
        ),
        Experiment(
            "fig13",
            "Distribution of the scores",
            "How long is the tail: how much of all influence do the first heads have (Fig 13)?",
            "fig13",
            "2 score passes over H heads, for each of D datasets and 2 ablations",
        ),
        Experiment(
            "fig15",
            "URIAL on base models",
            "How safe does in-context alignment alone make a base model (Fig 15)?",
            "prompt_templates",
            "1 answer a prompt with and without URIAL, for each base model and dataset",
            needs=("base_models",),
        ),
        Experiment(
            "fig17",
            "Official chat template with a system prompt",
            "Does the ablation work under the template that the model was aligned with (Fig 17)?",
            "prompt_templates",
            "10 score passes over H heads and 18 answers a prompt, for each of D datasets",
        ),
        Experiment(
            "fig18",
            "A detailed system prompt",
            "Does the ablated model answer, or does it echo a long system prompt (Fig 18)?",
            "prompt_templates",
            "2 score passes over H heads and 6 answers a prompt, for each of D datasets",
        ),
        Experiment(
            "table1",
            "Parameters touched against ASR",
            "What does each method touch, what does it gain, and what does it break (Table 1)?",
            "table1",
            "a sweep of strengths for each of 11 methods, and 2 answers a learning prompt and strength",
            needs=("learn_harmful",),
        ),
        Experiment(
            "table2",
            "Cost of finding heads",
            "What do our passes, the screening, the exhaustive scan and plain full generation cost here (Table 2)?",
            "table2",
            "timed: one score pass, one screening, one scan, and plain answers for a few heads",
        ),
        Experiment(
            "table7",
            'Course correction after "Sure, here is"',
            "Does the model turn back once its answer is begun for it, and do the heads carry that too (Table 7)?",
            "table7",
            "6 score passes over H heads and 12 answers a prompt, for each of D datasets",
        ),
        Experiment(
            "epsilon",
            "ASR and scores against epsilon",
            "When is attention uniform enough, from no ablation to the exact limit?",
            "epsilons",
            "3 score passes over H heads and 2 answers a prompt and epsilon, for each of D datasets and 2 ablations",
        ),
    )
}
"""Every experiment by its name, in the paper's order."""


def chosen(name: str) -> tuple[Experiment, ...]:
    """The experiment of that name, or all.

    Raises:
        InputError: there is none.
    """
    if name == ALL:
        return tuple(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)} and {ALL}")
    return (EXPERIMENTS[name],)
