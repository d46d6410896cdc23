"""How far an audit would find the same on other prompts: its ranking, its group, and the group's figures.

All from stored scores and answers of the search half, but for a few passes over heads where resamples part early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safetyheads.heads import Group
from safetyheads.measures.head_pass import HeadPass
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.runs.rates import GroupAnswers
from safetyheads.scores import HeadScores, SearchTrace
from safetyheads.stats.intervals import FloatArray, Rate, newcombe_interval
from safetyheads.stats.stability import Columns, Repeated, prompts_needed, rank_stability, repeated_search, resampled

N_LISTED = 10
"""Best heads whose ranks are told, beside those of the group."""
FIGURES = {"asr": ("harmful", "coherent_asr"), "benign_answered": ("benign", "answered_rate")}
"""Figure that stands side by side for both halves -> its prompts, and its rate in :class:`GroupAnswers`."""


def stability_as_json(
    measuring: HeadPass,
    alone: HeadScores,
    traces: Sequence[SearchTrace],
    answers: Sequence[Mapping[str, GroupAnswers]],
    size: int,
    prompts: Sequence[PromptSet],
    tolerance: float,
) -> dict[str, Any]:
    """How stable an audit's group and ranking are, as JSON.

    Args:
        measuring: the pass over the harmful search prompts that the searches used.
        alone: mean Ships of every head alone, prompt by prompt.
        traces: the search that the group is from, and others of the same pass, whose steps cost nothing here.
        answers: by prompt set: of the unablated model, then under that search's group of each size.
        size: heads in the group.
        prompts: harmful and benign search prompts.
        tolerance: the smallest size within it of the best gain is chosen.
    """
    heads = measuring.engine.heads
    harmful, benign = (_weights(prompt_set, seed) for seed, prompt_set in enumerate(prompts))
    search = _searched_again(measuring, traces, size, harmful, alone.resolution)
    chosen = chosen_sizes(answers, tolerance, harmful, benign)
    values = alone.values[:, [head.layer for head in heads], [head.index for head in heads]].numpy()
    best = np.argsort(-values.mean(axis=0), kind="stable")[:N_LISTED].tolist()
    listed = list(dict.fromkeys([*best, *map(heads.index, traces[0].group[:size])]))
    same_size, n_draws = chosen == size, len(chosen)
    return {
        "n": len(values),
        "n_draws": n_draws,
        "group": {
            "heads": [str(head) for head in traces[0].group[:size]],
            "repeatability": asdict(Rate(int((search.repeats & same_size).sum()), n_draws)),
            "same_heads": asdict(search.same),
            "same_size": asdict(Rate(int(same_size.sum()), n_draws)),
            "sizes": {str(number): float((chosen == number).mean()) for number in range(1, len(answers))},
            "jaccard": search.jaccard,
            "frequencies": {str(heads[at]): share for at, share in search.frequencies.items()},
            "not_followed": search.not_followed,
            "further_passes": search.further,
            "tied": search.tied,
        },
        "heads": [
            {
                "head": str(heads[rank.column]),
                "rank": rank.rank,
                "interval": list(rank.interval),
                "frequency": rank.frequency,
                "in_group": search.frequencies.get(rank.column, 0.0),
            }
            for rank in rank_stability(values, listed, harmful, alone.resolution)
        ],
        "tops": [asdict(needs) for needs in prompts_needed(values, resolution=alone.resolution)],
        "halves": {name: _halves(answers[0], answers[size], *figure) for name, figure in FIGURES.items()},
    }


def _weights(prompts: PromptSet, seed: int) -> FloatArray:
    """Weights of the prompts in each resample: clusters whole, within categories where every prompt has one."""
    clusters = [getattr(prompt, "cluster", None) for prompt in prompts.prompts]
    categories = [prompt.category for prompt in prompts.prompts]
    names = [("alone", at) if cluster is None else cluster for at, cluster in enumerate(clusters)]
    return resampled(len(names), clusters=names, strata=None if None in categories else categories, seed=seed)


def _searched_again(
    measuring: HeadPass, traces: Sequence[SearchTrace], size: int, weights: FloatArray, resolution: float
) -> Repeated:
    heads = measuring.engine.heads
    column = {head: at for at, head in enumerate(heads)}
    in_order: dict[frozenset[int], Group] = {}
    for trace in traces:
        for step in range(size):
            in_order.setdefault(frozenset(column[head] for head in trace.group[:step]), trace.group[:step])

    def scores(prefix: Columns) -> FloatArray:
        # In the order of the search, so that its own steps are read from the store.
        group = in_order.get(prefix, tuple(heads[at] for at in sorted(prefix)))
        candidates = [head for head in heads if head not in group]
        ships = measuring.measure([(*group, head) for head in candidates])["ships"].numpy()
        values = np.full((ships.shape[1], len(heads)), np.nan)
        values[:, [column[head] for head in candidates]] = ships.T
        return values

    own = [column[head] for head in traces[0].group[:size]]
    return repeated_search(own, scores, weights, resolution, tuple(in_order))


def chosen_sizes(
    answers: Sequence[Mapping[str, GroupAnswers]],
    tolerance: float,
    harmful: FloatArray | None = None,
    benign: FloatArray | None = None,
) -> NDArray[np.int64]:
    """The size of group that does best on the search half, on each resample [n_draws].

    A size's gain is its share of harmful prompts coherently complied with, unscored ones counting as not, less the
    share of benign answers that it loses. The smallest size within the tolerance of the best gain is taken, so that a
    group holds no head that adds next to nothing. Benign prompts of the search half choose nothing else.

    Args:
        answers: by prompt set: of the unablated model, then under the group of each size from 1 on.
        tolerance: what a smaller size may gain less.
        harmful: weight of each prompt in each resample [n_draws, n_prompts]; by default all alike, once.
        benign: likewise.
    """
    complied = np.array([np.nan_to_num(under["harmful_search"].coherent()).mean(axis=1) for under in answers[1:]])
    answered = np.array([under["benign_search"].answered().mean(axis=1) for under in answers])
    harmful, benign = (
        np.full((1, values.shape[1]), 1 / values.shape[1]) if weights is None else weights
        for values, weights in ((complied, harmful), (answered, benign))
    )
    shares = benign @ answered.T
    gains = harmful @ complied.T - np.maximum(0.0, shares[:, :1] - shares[:, 1:])
    # Rates are fractions, and some that are exactly the tolerance apart differ from it in the last bit.
    sizes: NDArray[np.int64] = 1 + (gains >= gains.max(axis=1, keepdims=True) - tolerance - 1e-9).argmax(axis=1)
    return sizes


def _halves(
    unablated: Mapping[str, GroupAnswers], under: Mapping[str, GroupAnswers], kind: str, rate: str
) -> dict[str, Any]:
    """A rate on the search half, which chose the group, beside the test half, which did not.

    The difference, search less test, is of independent prompts; its interval is Newcombe's.
    """
    search, test = (asdict(getattr(under[f"{kind}_{half}"], rate)) for half in ("search", "test"))
    before = {half: asdict(getattr(unablated[f"{kind}_{half}"], rate)) for half in ("search", "test")}
    difference = interval = None
    if search["interval"] and test["interval"]:
        difference = search["rate"] - test["rate"]
        interval = list(newcombe_interval(test["rate"], test["interval"], search["rate"], search["interval"]))
    return {"search": search, "test": test, "unablated": before, "difference": difference, "interval": interval}
