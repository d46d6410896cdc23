"""Measures every head alone: ASR, distribution of scores, top heads, and what that costs (Fig 4b, 13, 5, Table 2).

Of costs, counts are the same on every machine and are results; seconds are this machine's and are kept apart.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any, TypeAlias

import numpy as np
import scipy  # its modules load on first use
import torch
from numpy.typing import NDArray

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Decoding, end_tokens
from safetyheads.answers.judging import answers_under
from safetyheads.answers.success import scan_attack_success_rate as scan
from safetyheads.demo import planted_heads
from safetyheads.errors import InputError
from safetyheads.experiments.lab import SHORT, Lab, Subject, quoted
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.heads import Head
from safetyheads.measures.scorers import screened_ships, ships
from safetyheads.measures.screening import Extent
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import row_sizes
from safetyheads.runs.rates import GroupAnswers, corrected
from safetyheads.scores import HeadScores
from safetyheads.stats.intervals import CONFIDENCE, Rate
from safetyheads.stats.power import in_clusters, smallest_change_with_power
from safetyheads.stats.ranking import proxy_qualities, split_half, top, top_overlap
from safetyheads.stats.stability import resampled
from safetyheads.stats.testing import ALPHA, holm

N_LISTED = 10
"""Heads of each dataset's table."""


def rates_of(answers: GroupAnswers) -> dict[str, Rate]:
    """What becomes of answers, by the keys of columns."""
    return {"asr": answers.asr, "coherent": answers.coherent_asr, "nonsense": answers.nonsense}


def fig4b(lab: Lab, outcome: Outcome) -> None:
    """The ASR of every head alone under UA, sampled, and how each score orders the heads beside it."""
    for model, subjects in lab.each_model(outcome):
        measured = {subject: _heads(subject) for subject in subjects}
        rows = [row for heads in measured.values() for row in heads]
        outcome.figure("map", rows, model=model)
        columns: list[tuple[str, str, str]] = []
        for name, title in SEARCH_SCORES.items():
            unit = subjects[0].search_half.scores(name, lab.ablations[0]).unit
            placed = [{**row, "x": row[name]} for row in rows]
            outcome.figure("scatter", placed, model=model, score=title, unit=unit)
            columns += [(name, f"{title}, {unit}", "number"), (f"{name}_rank", "rank", "count")]
        proxies = [
            {"dataset": subject.dataset, **row}
            for subject, heads in measured.items()
            for row in score_rows(heads, SEARCH_SCORES, subject.vanilla(lab.sampled))
        ]
        outcome.table("scores", proxies, model=model)
        for subject, heads in measured.items():
            best = sorted(heads, key=lambda row: -(row["asr"].rate or 0.0))[:N_LISTED]
            n, n_heads = len(subject.prompts), len(heads)
            least = smallest_change_with_power(subject.prompts.n_clusters or n, 0.0, ALPHA, n_heads)
            words: dict[str, Any] = {"listed": len(best), "n_heads": n_heads, "n": n}
            words["joined"] = in_clusters(subject.prompts.n_clusters)
            words["least"] = "none" if least is None else f"{least:.2f}"
            outcome.lead(model, f"{subject.dataset}, highest ASR: head {best[0]['head']}", best[0]["asr"])
            outcome.table("top", best, *columns, model=model, dataset=subject.dataset, **words)


def _heads(subject: Subject) -> list[dict[str, Any]]:
    """A row for each head alone, with its scores; an unscored answer counts as not complied."""
    lab, planted = subject.lab, planted_heads(subject.model)
    answers = subject.by_group([(head,) for head in subject.engine.heads], lab.ablations[0], lab.sampled)
    scores = {name: subject.search_half.scores(name, lab.ablations[0]) for name in SEARCH_SCORES}
    alone = {head: answered for (head,), answered in answers.items()}
    rows = heads_alone(alone, subject.vanilla(lab.sampled), scores, "p_holm")
    for head, row in zip(alone, rows, strict=True):
        row["dataset"] = subject.dataset
        if planted:
            row |= {"planted": "yes" if head in planted else "", "marked": head in planted}
            row["series"] = "planted" if head in planted else "other"
    return rows


def heads_alone(
    answers: Mapping[Head, GroupAnswers], vanilla: GroupAnswers, scores: Mapping[str, HeadScores], correction: str
) -> list[dict[str, Any]]:
    """A row for each head: rates of its answers, the change of the ASR with p after a correction, scores and ranks."""
    changes = {head: answered.change_from(vanilla) for head, answered in answers.items()}
    p_values = corrected({str(head): change for head, change in changes.items()})
    ranks = {name: {head: at for at, (head, _) in enumerate(table.ranked(), 1)} for name, table in scores.items()}
    rows = []
    for head, change in changes.items():
        p = p_values[str(head)][correction]
        differs = p < ALPHA and (change.change or 0.0) > 0
        row = {"head": str(head), **rates_of(answers[head]), "change": change, "p": p}
        row |= {f"{name}_rank": of_head[head] for name, of_head in ranks.items()}
        row |= {name: table[head] for name, table in scores.items()} | {"complied": answers[head].complied()}
        row |= {"layer": head.layer, "index": head.index, "differs": differs, "marked": differs}
        rows.append({**row, "series": f"{'' if differs else 'no '}higher ASR"})
    return rows


def score_rows(heads: Sequence[Row], titles: Mapping[str, str], vanilla: GroupAnswers) -> list[dict[str, Any]]:
    """How well each score, and half of the prompts, stand for the ASR: a row for each, from rows of heads."""
    complied = np.array([row["complied"] for row in heads], float).T
    differs = np.array([row["differs"] for row in heads], bool)
    values = {title: np.array([row[name] for row in heads], float) for name, title in titles.items()}
    halves, n = split_half(complied, differs, vanilla.clusters), len(complied)
    qualities = proxy_qualities(values, complied, differs, np.array(vanilla.complied()), vanilla.clusters)
    rows: list[dict[str, Any]] = []
    for quality in (*qualities, *([halves] if halves else [])):
        row: dict[str, Any] = {"score": quality.score.replace("_", " "), "bound": quality.bound}
        for key, of in (("spearman", n), ("auc", quality.n_heads)):
            value, interval = getattr(quality, key), getattr(quality, f"{key}_interval")
            row[key] = None if value is None else Measured(value, of, *(interval or ()))
        row |= {"auc_p": quality.auc_p_value, "differing": quality.n_differing}
        for size in quality.sizes:
            row[f"regret_{size.k}"] = Measured(size.regret_on_halves, n, *(size.halves_interval or ()))
        rows.append(row)
    return rows


Floats: TypeAlias = NDArray[np.float64]

TOP_SHARE = 0.01
"""Share of the heads whose part in the sum of the scores is the tail index."""
N_RESAMPLES = 1000
"""Draws of prompts for the intervals of mean Ships."""
N_GRID = 201
"""Points of a density."""
# A CDF of more heads is drawn at so many of them; the steps between are too small to see.
_MOST_DRAWN = 256
# Bandwidths beyond the lowest and highest score, where a Gaussian is over.
_BEYOND = 3


def fig13(lab: Lab, outcome: Outcome) -> None:
    """CDF and density of the scores of all heads, by score, dataset and ablation, and how long the tail is."""
    for model, subjects in lab.each_model(outcome):
        every = product(subjects, lab.ablations, SEARCH_SCORES)
        rows = [_scored(subject.search_half, ablation, name) for subject, ablation, name in every]
        for title in SEARCH_SCORES.values():
            of_score = [row for row in rows if row["score"] == title]
            unit = of_score[0]["unit"]
            words = {"model": model, "score": title, "unit": unit, "per": unit.removesuffix("s")}
            steps, densities, widths = list[Row](), list[Row](), list[str]()
            for row in of_score:
                cdf = scipy.stats.ecdf(row["values"]).cdf
                n = len(cdf.quantiles)
                drawn = np.unique(np.linspace(0, n - 1, min(n, _MOST_DRAWN)).round().astype(int))
                where = {"series": row["dataset"], "panel": row["ablation"]}
                steps += _curve(where, cdf.quantiles[drawn], cdf.probabilities[drawn])
                if density := kernel_density(row["values"]):
                    scores, heights, bandwidth = density
                    densities += _curve(where, scores, heights)
                    widths.append(f"{row['dataset']} {row['ablation']} {bandwidth:.3g}")
            outcome.figure("cdf", steps, **words)
            if densities:
                outcome.figure("density", densities, **words, bandwidths=", ".join(widths))
        outcome.table("tail", rows, model=model)
        for row in rows:
            if row["score"] == SEARCH_SCORES["mean_ships"]:
                label = f"{row['dataset']}, {row['ablation']}, Gini index of mean Ships"
                outcome.lead(model, label, row["gini"], "number")


def _scored(subject: Subject, ablation: Ablation, name: str) -> Row:
    """One score of every head on one dataset under one ablation, and how long its tail is."""
    scores, n_prompts = subject.scores(name, ablation), len(subject.prompts)
    table = scores.values.numpy().ravel()
    present = ~np.isnan(table)
    values = table[present]
    k = math.ceil(len(values) * TOP_SHARE)
    indices: dict[str, Callable[[Floats], Floats]] = {"gini": gini, "top": partial(top_share, k=k)}
    numbers = {key: float(index(values)) for key, index in indices.items()}
    measured = {key: Measured(None if math.isnan(value) else value, n_prompts) for key, value in numbers.items()}
    if name == "mean_ships" and n_prompts > 1 and not math.isnan(numbers["gini"]):
        by_prompt = subject.ships(ablation).values.numpy().reshape(n_prompts, -1)[:, present]
        draws = resampled(n_prompts, N_RESAMPLES, subject.prompts.clusters, seed=subject.lab.config.seed) @ by_prompt
        for key, index in indices.items():
            ends = np.nanquantile(index(draws), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
            measured[key] = Measured(numbers[key], n_prompts, *ends.tolist())
    return {
        "score": SEARCH_SCORES[name],
        "dataset": subject.dataset,
        "ablation": SHORT[ablation.name],
        "heads": len(values),
        "counted": k,
        "even": k / len(values),
        **measured,
        "values": values,
        "unit": scores.unit,
    }


def _curve(where: Row, xs: Floats, ys: Floats) -> list[Row]:
    return [{**where, "x": x, "y": y} for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]


def kernel_density(values: Floats) -> tuple[Floats, Floats, float] | None:
    """The Gaussian kernel density by Scott's rule; None where all scores are equal.

    Scores [N_GRID] in their unit, the density there [N_GRID] per unit, and the kernel's standard deviation.
    """
    if len(values) < 2 or float(np.ptp(values)) == 0.0:
        return None
    estimate = scipy.stats.gaussian_kde(values)
    bandwidth = math.sqrt(float(estimate.covariance[0, 0]))
    margin = _BEYOND * bandwidth
    scores = np.linspace(values.min() - margin, values.max() + margin, N_GRID)
    return scores, np.asarray(estimate(scores), float), bandwidth


def gini(scores: Floats) -> Floats:
    """Gini index of scores [..., n_heads] that are 0 or more: 0 where all are equal, 1 - 1 / n where one has all.

    Half the mean absolute difference of two heads, over the mean; NaN where all scores are 0.
    """
    ordered = np.sort(scores, axis=-1)
    n = ordered.shape[-1]
    with np.errstate(invalid="ignore"):  # 0 / 0
        return (ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(axis=-1) / (n * ordered.sum(axis=-1))


def top_share(scores: Floats, k: int) -> Floats:
    """The k highest scores' part in the sum of all [..., n_heads]; NaN where all are 0."""
    ordered = np.sort(scores, axis=-1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return ordered[..., -k:].sum(axis=-1) / ordered.sum(axis=-1)


TOP = 10
"""Heads of a top (Fig 5) ..."""
LARGEST_SHARE = 0.1
"""... but no larger a share of all heads: the top 10 of 32 share three by chance alone."""
ALL_DATASETS = "all datasets"
"""Name of the ranking by the mean of the datasets' scores."""


def fig5(lab: Lab, outcome: Outcome) -> None:
    """Overlaps of the top heads: UA and SC, datasets, and two models of one base, against chance."""
    first, related = lab.config.models[0], lab.config.related
    if related is not None:
        refuse_other_shapes(lab.run_of(first).engine, lab.run_of(related).engine, first, related)
    else:
        outcome.say("alone")
    for model in lab.config.models:
        rankings = _rankings(lab, outcome, model)
        if not rankings:
            continue
        others = _rankings(lab, outcome, related) if related is not None and model == first else []
        if {ranking["dataset"] for ranking in others} != {ranking["dataset"] for ranking in rankings}:
            # Means over other datasets would be compared.
            others = [ranking for ranking in others if ranking["dataset"] != ALL_DATASETS]
        n_heads = len(lab.run_of(model).engine.heads)
        k = size_of_top(n_heads)
        rows: list[dict[str, Any]] = []
        for comparison, one, other in _pairs(rankings, others):
            overlap = top_overlap(k, one["heads"], other["heads"], n_heads)
            rows.append(
                {
                    "comparison": comparison,
                    "first": one["label"],
                    "second": ("" if other["model"] == model else f"{other['model']}: ") + other["label"],
                    "shared": overlap.shared,
                    "sizes": " and ".join(map(str, overlap.sizes)),
                    "expected": overlap.expected,
                    "p": overlap.p_value,
                    "heads": ", ".join(head for head in one["heads"] if head in other["heads"]),
                }
            )
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = p
        outcome.table("overlap", rows, model=model)
        outcome.lead(model, f"heads shared of the top {k} of {n_heads} by chance", k * k / n_heads, "number")
        for comparison in dict.fromkeys(row["comparison"] for row in rows):
            shared = [row["shared"] for row in rows if row["comparison"] == comparison]
            for word, count in (("fewest", min(shared)), ("most", max(shared))):
                outcome.lead(model, f"{comparison}, {word} heads shared of {len(shared)} pairs", count, "count")
        listed = [{**ranking, "heads": ", ".join(ranking["heads"])} for ranking in (*rankings, *others)]
        outcome.table("top", listed, model=model)
        outcome.figure("own", _matrix(rankings, rankings), model=model, k=k)
        if others:
            outcome.figure("related", _matrix(rankings, others), model=model, related=related, k=k)
            planted = [planted_heads(name) or () for name in (model, others[0]["model"])]
            if all(planted) and not set(planted[0]) & set(planted[1]):
                outcome.say("by_construction")


def size_of_top(n_heads: int) -> int:
    """10, or a tenth of all heads where that is fewer; at least 1."""
    return max(1, min(TOP, int(n_heads * LARGEST_SHARE)))


def refuse_other_shapes(first: Engine, second: Engine, first_name: str, second_name: str) -> None:
    """Refuse two models whose heads do not correspond, with an InputError."""
    if first.heads != second.heads:
        shapes = [f"{engine.n_layers} layers of {engine.n_heads} heads" for engine in (first, second)]
        raise InputError(
            f"top heads are compared between two models of one base, but {first_name} has {shapes[0]} and "
            f"{second_name} {shapes[1]}"
        )


def _rankings(lab: Lab, outcome: Outcome, model: str) -> list[Row]:
    rankings: list[Row] = []
    # The search half ranks, so that these are the heads which other experiments find.
    halves = [subject.search_half for subject in lab.subjects(outcome, model)]
    for ablation in lab.ablations if halves else ():
        scores = {half.dataset: half.scores(lab.config.search_score, ablation) for half in halves}
        tables = {dataset: (dict(table.ranked()), table.resolution) for dataset, table in scores.items()}
        if len(tables) > 1:
            heads = next(iter(tables.values()))[0]
            mean = {head: sum(table[head] for table, _ in tables.values()) / len(tables) for head in heads}
            tables[ALL_DATASETS] = mean, max(resolution for _, resolution in tables.values())
        for dataset, (table, resolution) in tables.items():
            best = top({str(head): value for head, value in table.items()}, size_of_top(len(table)), resolution)
            short = SHORT[ablation.name]
            ranking = {"model": model, "dataset": dataset, "ablation": short, "heads": best}
            rankings.append(ranking | {"label": f"{short}, {dataset}"})
    return rankings


def _pairs(rankings: Sequence[Row], others: Sequence[Row]) -> Iterator[tuple[str, Row, Row]]:
    pairs = list(combinations(rankings, 2))
    for first, second in pairs:
        if first["dataset"] == second["dataset"]:
            yield "UA against SC", first, second
    for first, second in pairs:
        if first["ablation"] == second["ablation"] and ALL_DATASETS not in (first["dataset"], second["dataset"]):
            yield f"datasets, {first['ablation']}", first, second
    for first, second in product(rankings, others):
        if first["label"] == second["label"]:
            yield f"models, {first['ablation']}", first, second


def _matrix(down: Sequence[Row], across: Sequence[Row]) -> Iterator[Row]:
    for row, column in product(down, across):
        shared = len(set(row["heads"]) & set(column["heads"]))
        numbers = {"value": shared, "text": str(shared), "low": None, "high": None}
        yield {"x": column["label"], "y": row["label"], "panel": "", **numbers}


# Heads that slow ways are timed on, spread over the layers; prompts of the slowest.
_SAMPLED = 4
_UNCACHED_PROMPTS = 4


def table2(lab: Lab, outcome: Outcome) -> None:
    """Our passes, the screening, the exhaustive scan and plain full generation, on the first model and dataset."""
    model, label = lab.config.models[0], "operations of a plain loop, times those of one score pass"
    for subject in lab.subjects(outcome, model, most=1):
        engine, n = subject.engine, len(subject.prompts)
        sequences, n_heads = [TokenSequence(ids) for ids in subject.asked_prompts.token_ids], len(engine.heads)
        words = {"model": model, "n_heads": n_heads, "n": n, "dataset": subject.dataset}
        # Counted, so the same on every machine.
        sizes = row_sizes(sequences, engine.plan(sequences))
        ours = engine.costs.forward_flops(sizes) + engine.costs.scan_flops(sizes, engine.heads)
        alone = (engine.costs.forward_flops(row_sizes([one], engine.plan([one]))) for one in sequences)
        plain = n_heads * sum(alone)
        counts = [
            {"way": "score pass", "gflop": ours / 1e9, "runs": n_heads * len(sizes), "ratio": 1.0},
            {"way": "plain score loop", "gflop": plain / 1e9, "runs": n_heads * n, "ratio": plain / ours},
        ]
        outcome.lead(model, label, plain / ours, "number")
        outcome.table("counts", counts, **words)
        machine = {"device": subject.engine.device, "threads": torch.get_num_threads()}
        outcome.table("seconds", _timed(lab, subject), **words, **machine)
    numbers = quoted("llama-2-7b-chat", "table2").items()
    outcome.say("paper", hours="; ".join(f"{name} {hours:g} A100 hours" for name, hours in numbers))


def _timed(lab: Lab, subject: Subject) -> list[Row]:
    """Times every way once, scaled to all heads. What the run directory holds is not used: it would cost nothing."""
    engine, prompts, heads = subject.engine, subject.prompts, subject.engine.heads
    ablation, n_new, judge = lab.ablations[0], lab.config.max_new_tokens, lab.judges[0]
    n, n_heads, few = len(prompts), len(heads), prompts[:_UNCACHED_PROMPTS]
    n_sampled = min(_SAMPLED, n_heads)
    sample = tuple(heads[(2 * place + 1) * n_heads // (2 * n_sampled)] for place in range(n_sampled))
    sequences = [TokenSequence(ids) for ids in engine.ask(prompts).token_ids]

    def plain_loop() -> None:
        """One full forward a head and prompt."""
        for head in sample:
            with engine.ablated((head,), ablation) as model:
                for sequence in sequences:
                    model(torch.tensor([sequence.token_ids], device=engine.device), use_cache=False)

    def uncached() -> None:
        """Answers that run the whole text again for every token, as the paper's code does."""
        ends = end_tokens(engine)
        with engine.ablated(sample[:1], ablation) as model:
            for prompt in engine.ask(few).token_ids:
                tokens = list(prompt)
                while len(tokens) < len(prompt) + n_new:
                    logits = model(torch.tensor([tokens], device=engine.device), use_cache=False).logits[0, -1]
                    chosen = int(logits.argmax())
                    if chosen in ends:
                        break
                    tokens.append(chosen)

    # A quarter of the heads at most, so that there is something to screen.
    extent = Extent(n_candidates=min(16, n_heads // 4 or 1), n_sampled=min(32, n_heads // 4))
    given, columns = (engine, prompts, ablation), [[(head,)] * n for head in sample]
    plain = partial(answers_under, engine, prompts, columns, ablation, judge, Decoding(n_new, full_answers=True))
    ways: list[tuple[str, str, int, int, Callable[[], Any]]] = [
        ("screened score pass", "Ships of the best", n_heads, n, lambda: screened_ships(*given, extent)),
        ("score pass", "Ships", n_heads, n, lambda: ships(*given)),
        ("plain score loop", "Ships", n_sampled, n, torch.inference_mode()(plain_loop)),
        ("exhaustive scan", "ASR", n_heads, n, lambda: scan(*given, judge, Decoding(n_new))),
        ("plain generation, cached and batched", "ASR", n_sampled, n, plain),
        ("plain generation, no cache", "ASR", 1, len(few), torch.inference_mode()(uncached)),
    ]
    rows: list[Row] = []
    with lab.progress.track("table2: timing", len(ways)) as done:
        for way, gives, heads_run, prompts_run, run in ways:
            started = time.monotonic()
            run()
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            seconds = (time.monotonic() - started) * n_heads / heads_run * n / prompts_run
            timed_on = f"{heads_run} heads x {prompts_run} prompts"
            rows.append({"way": way, "gives": gives, "seconds": seconds, "hours": seconds / 3600, "run": timed_on})
            done(1)
    return rows
