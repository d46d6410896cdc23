"""The experiments of the paper, by name. A new one needs an entry here and a module with a function of its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias

from safetyheads.errors import InputError
from safetyheads.experiments.outcome import Outcome

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab

Need: TypeAlias = Literal["base", "related", "base_models", "learn_harmful", "lm-eval"]
ALL = "all"
"""Every experiment, one after the other."""

_RATES = "95 % intervals over the prompts: Wilson's for rates, Newcombe's for paired changes; p: exact McNemar test."
_FOUND = (
    "Sahara finds the heads on the search half of a dataset, by the score in the settings; answers are to the test "
    "half. "
)
_OWN = (
    "Each prompt goes without its own top heads by its own Ships, so groups differ from prompt to prompt. Vanilla and "
    "0 heads: the unablated model. "
)


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment of the paper."""

    name: str
    """Name on the command line, and of the function ``name(lab, outcome)`` that runs it."""
    paper: str
    """Place in the paper; empty for an experiment of our own."""
    title: str
    question: str
    """Question that the experiment asks."""
    module: str
    """Module of its function, in this folder."""
    costs: str
    """Cost in words, with H for heads, D for datasets of n prompts, T for templates."""
    caption: str
    """What holds for all of its tables and figures."""
    needs: tuple[Need, ...] = ()
    """Settings or extras without which it cannot be run."""

    def run(self, lab: Lab) -> Outcome:
        """Run it; what the run directory holds is not measured again."""
        function: Callable[[Lab, Outcome], None] = getattr(
            import_module(f"safetyheads.experiments.{self.module}"), self.name
        )
        outcome = Outcome(self.name, self.title, self.question, caption=self.caption, settings=lab.settings)
        function(lab, outcome)
        return outcome


_ALL = (
    Experiment(
        "fig2",
        "Fig 2",
        "Query-level ASR, each prompt without its own top head",
        "How many harmful prompts does the model answer once each goes without the top head by its own Ships?",
        "query_level",
        "2 score passes over H heads and 6 answers a prompt, for each of D datasets and T templates",
        _OWN + _RATES,
    ),
    Experiment(
        "fig11",
        "Fig 11",
        "Query-level ASR by number of heads, undifferentiated attention",
        "How does the ASR grow as each prompt goes without its own 1 to 10 top heads?",
        "query_level",
        "1 score pass over H heads and 22 answers a prompt, for each of D datasets and T templates",
        _OWN + _RATES,
    ),
    Experiment(
        "fig12",
        "Fig 12",
        "Query-level ASR by number of heads, scaling contribution",
        "The same under the other ablation (the caption of Fig 12 names the first one).",
        "query_level",
        "1 score pass over H heads and 22 answers a prompt, for each of D datasets and T templates",
        _OWN + _RATES,
    ),
    Experiment(
        "fig4a",
        "Fig 4a",
        "ASR by group size",
        "How does the ASR grow with the size of the group that Sahara finds on a dataset?",
        "fig4a",
        "5 score passes over H heads, 11 answers a prompt, up to 100 random ones and 6 benign ones, for each of D "
        "datasets and 2 ablations",
        _FOUND + "Answers are sampled. Own heads: each prompt goes without its own top heads by its own Ships. Random "
        "groups have as many heads in each layer as Sahara's group; their number is their n, and their interval is the "
        "lowest and the highest ASR. Other intervals: Wilson's, 95 %.",
    ),
    Experiment(
        "table3",
        "Table 3",
        "Change of ASR by number of heads",
        "How far does the ASR rise with 1 to 5 heads, found on the dataset or for each prompt (Tables 3 and 5)?",
        "fig4a",
        "6 score passes over H heads and 11 answers a prompt, for each of D datasets and 2 ablations",
        _FOUND
        + "At query level each prompt goes without its own top heads by its own Ships. Greedy answers. "
        + _RATES,
    ),
    Experiment(
        "table5",
        "Table 5",
        "Change of ASR by number of heads, further models",
        "The same for every model but the first (the paper's Table 5 is Vicuna's).",
        "fig4a",
        "as table3, for each further model",
        _FOUND
        + "At query level each prompt goes without its own top heads by its own Ships. Greedy answers. "
        + _RATES,
    ),
    Experiment(
        "fig4b",
        "Fig 4b",
        "ASR of every head alone",
        "How many of all heads matter, and does a score know which?",
        "fig4b",
        "H + 1 answers a prompt, drafts shared, and 2 score passes over H heads, for each of D datasets",
        "Test prompts, answered with one head ablated by UA; answers are sampled. Scores are of the search half and "
        "see no answer. A head has a higher ASR if the change is above 0 after Holm's correction over all heads; on an "
        "embedded model the marked heads are the planted ones. " + _RATES,
    ),
    Experiment(
        "transfer",
        "",
        "Search set x test set",
        "Do heads that were found on one dataset, or under one ablation, serve another?",
        "transfer",
        "3 score passes over H heads and 2 D + 2 answers a prompt, for each of D datasets and 2 ablations",
        _FOUND + "Changes are from the unablated model over the same prompts; greedy answers. " + _RATES,
    ),
    Experiment(
        "fig5",
        "Fig 5",
        "Overlap of the top 10 heads",
        "Do ablations, datasets or models of one base rank the same heads first, beyond chance?",
        "fig5",
        "2 score passes over H heads, for each of D datasets, and 1 for the related model",
        "Each head is ablated alone and scored on the search half; all datasets: by the mean of the datasets' scores. "
        "Tops have 10 heads, but no more than a tenth of all; heads that tie across the cut are in none. By chance: "
        "the mean of the hypergeometric distribution. A ranking of all heads has no sampling interval.",
    ),
    Experiment(
        "fig6a",
        "Fig 6a",
        "Attention of the base in the aligned model, and the reverse",
        "Does safety live in the attention weights?",
        "fig6a",
        "4 answers a prompt, for each of D datasets and the benign prompts",
        "Aligned: the first model; base: the checkpoint before alignment. Attention is W_q, W_k, W_v and W_o of every "
        "layer, with all that belongs to them. Greedy answers, no head ablated. " + _RATES,
        needs=("base",),
    ),
    Experiment(
        "fig6b",
        "Fig 6b",
        "Utility after ablation",
        "What do zero-shot tasks lose as 1 to n heads are ablated, beside pruning?",
        "fig6b",
        "every task of lm-eval once a group, ablation and pruned model",
        "Heads are the first of those that Sahara finds on the learning prompts under UA; pruners are calibrated on "
        "the learning prompts and their answers. 0 heads and sparsity 0: the unablated model. Zero-shot unless the "
        "task has examples of its own. Changes are paired by sample; 95 % intervals.",
        needs=("lm-eval", "learn_harmful"),
    ),
    Experiment(
        "fig7",
        "Fig 7",
        "Attention maps of an ablated head",
        "What do undifferentiated attention (on query or key) and scaling contribution make of a head's attention?",
        "attention_maps",
        "one forward pass of one prompt for each epsilon and ablation",
        "The first head that Sahara finds under UA on the search half, on the first test prompt. UA scales the head's "
        "query, or its key (where heads share keys, by way of the query, which gives the same scores); SC scales what "
        "the head passes on, so its map stays.",
    ),
    Experiment(
        "fig8",
        "Fig 8",
        "Attention maps under mean ablation",
        "What does the mean over the layer's heads make of a head's attention?",
        "attention_maps",
        "one forward pass of one prompt for each mean ablation",
        "The first head that Sahara finds under UA on the search half, on the first test prompt. Its query, key or "
        "output is replaced by the mean over the heads of its layer (Sec 5.3); the last one leaves its map.",
    ),
    Experiment(
        "fig13",
        "Fig 13",
        "Distribution of the scores",
        "How long is the tail: how much of all influence do the first heads have?",
        "fig13",
        "2 score passes over H heads, for each of D datasets and 2 ablations",
        "Every head is ablated alone and scored on the search half. All heads are there, so the curves have no "
        "sampling interval over heads.",
    ),
    Experiment(
        "fig15",
        "Fig 15",
        "URIAL on base models",
        "How safe does in-context alignment alone make a base model?",
        "prompt_templates",
        "1 answer a prompt with and without URIAL, for each base model and dataset",
        "A base model, no head ablated: the queries alone under query_answer, and with URIAL's system paragraph and "
        "shots, whose texts are ours. Greedy answers. " + _RATES,
        needs=("base_models",),
    ),
    Experiment(
        "fig17",
        "Fig 17",
        "Official chat template with a system prompt",
        "Does the ablation work under the template that the model was aligned with?",
        "prompt_templates",
        "10 score passes over H heads and 18 answers a prompt, for each of D datasets",
        "Own top head: each prompt, harmful or benign, goes without the head that its own Ships ranks first. Group: at "
        "most 3 heads that Sahara finds on the search half under this template without system prompt, as in the paper, "
        "and under the same ablation. Greedy answers. " + _RATES,
    ),
    Experiment(
        "fig18",
        "Fig 18",
        "A detailed system prompt",
        "Does the ablated model answer, or does it echo a long system prompt?",
        "prompt_templates",
        "2 score passes over H heads and 6 answers a prompt, for each of D datasets",
        "Own top head: each prompt, harmful or benign, goes without the head that its own Ships ranks first. Echo: "
        "answers that only give the query or the system prompt back. The paper's system prompt is not given, so this "
        "one is ours. Greedy answers. " + _RATES,
    ),
    Experiment(
        "table1",
        "Table 1",
        "Parameters touched against ASR",
        "What does each method touch, what does it gain, and what does it break?",
        "table1",
        "a sweep of strengths for each of 11 methods, and 2 answers a learning prompt and strength",
        "The strength of a method is the one of highest ASR on its learning prompts among those that keep all but 10% "
        "of the benign answers there; where none does, the one that keeps most. No method learned from the test "
        "prompts. Ranked by ASR among methods within that damage on the test prompts, the others below. Parameters are "
        "counted on this model. " + _RATES,
        needs=("learn_harmful",),
    ),
    Experiment(
        "table2",
        "Table 2",
        "Cost of finding heads",
        "What do our passes, the screening, the exhaustive scan and plain full generation cost here?",
        "table2",
        "timed: one score pass, one screening, one scan, and plain answers for a few heads",
        "The first model and dataset. Counts are the same on every machine. Seconds are of this machine, once; where "
        "fewer heads or prompts were run, they are scaled. A busy machine gives other seconds.",
    ),
    Experiment(
        "table7",
        "Table 7",
        'Course correction after "Sure, here is"',
        "Does the model turn back once its answer is begun for it, and do the heads carry that too?",
        "table7",
        "6 score passes over H heads and 12 answers a prompt, for each of D datasets",
        'Sure: the answer is begun as "Sure, here is", and only what follows is judged. UA, SC: without at most 3 '
        "heads that Sahara finds under that ablation on the search half, without a begun answer; the paper does not "
        "say which heads it takes. Changes are from unablated answers begun alike. Greedy answers. " + _RATES,
    ),
    Experiment(
        "epsilon",
        "",
        "ASR and scores against epsilon",
        "When is attention uniform enough, from no ablation to the exact limit?",
        "epsilons",
        "3 score passes over H heads and 2 answers a prompt and epsilon, for each of D datasets and 2 ablations",
        _FOUND + "Epsilon 1 is no ablation; 0, at the left end of a figure, is the exact limit. Greedy answers. 95 % "
        "intervals over the prompts: Wilson's for rates, Newcombe's for paired changes, Student's for Ships.",
    ),
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
"""Every experiment by its name, in the paper's order."""


def chosen(name: str) -> tuple[Experiment, ...]:
    """The experiment of that name, or all of them.

    Raises:
        InputError: there is none.
    """
    if name == ALL:
        return tuple(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)} and {ALL}")
    return (EXPERIMENTS[name],)
