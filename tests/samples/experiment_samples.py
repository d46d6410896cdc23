"""Outcomes of experiments made by hand: every kind of figure, with ordinary and with extreme values."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from safetyheads.experiments.catalogue import EXPERIMENTS, listed
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.stats.intervals import Rate

HOSTILE = '<script>fetch("https://attacker.example")</script><img src=x onerror=alert(1)> {{ 7*7 }}'
N = 24
MODEL = "demo:aligned_wrapped"
DATASETS = ("damage", "theft", "fraud")
SECONDS = {"fig2": 58.3, "table2": 12.25}
REASON = "demo:aligned_a on theft: nothing ablated, 20 of 24 answers comply already (ASR 0.83)."


def at(count: int, n: int = N, **where: Any) -> dict[str, Any]:
    """A point: a rate with its interval; n = 0 has neither."""
    return point(Rate(count, n), **where)


def outcome(name: str, *figures: Row, **fields: Any) -> Outcome:
    """An outcome with the title and question of its experiment."""
    entry = EXPERIMENTS[name]
    return Outcome(name, entry.title, entry.question, **{"models": [MODEL], "figures": list(figures), **fields})


def figure(kind: str, title: str, x: str, y: str, points: Iterable[Row], **more: Any) -> Row:
    """A figure as outcomes hold it."""
    plain = {"caption": f"n = {N} prompts.", "value": "", "logarithmic": False, "share": True}
    return plain | {"kind": kind, "title": title, "x": x, "y": y, "points": list(points), **more}


def table(title: str, caption: str, columns: Sequence[Sequence[str]], rows: Sequence[Row]) -> Row:
    """A table as outcomes hold it; columns are (key, title, kind), of which a text needs no kind."""
    named = [dict(zip(("key", "title", "kind"), (*column, "text"), strict=False)) for column in columns]
    return {"title": title, "caption": caption, "columns": named, "rows": list(rows)}


def fig2() -> Outcome:
    """Bars in four panels, one of them without anything scored."""
    counts = {"vanilla": 0, "UA": 13, "SC": 15}
    points = [
        at(counts[series] - 2 * (sampling == "top-5") * (counts[series] > 0), x=dataset, series=series, panel=panel)
        for template, sampling in product(("direct", "query_answer"), ("greedy", "top-5"))
        for panel in (f"template {template}, {sampling}",)
        for dataset, series in product(DATASETS, counts)
    ]
    points[-1] = at(0, 0, x="fraud", series="SC", panel=points[-1]["panel"])
    columns = [("panel", "template, sampling"), ("x", "dataset"), ("series", "ablation"), ("asr", "ASR", "rate")]
    rows = [{**row, "asr": Measured(row["y"], row["n"], row["low"], row["high"])} for row in points]
    asked = {"model": MODEL, "dataset": "damage", "asked": "template direct", "n_search": 16, "n_test": N}
    return outcome(
        "fig2",
        figure("bars", MODEL, "dataset", "ASR", points),
        tables=[table(MODEL, "95 % Wilson intervals.", columns, rows)],
        caption="Heads are each prompt's own, by Ships.",
        headline=[
            {"model": MODEL, "label": f"ASR, {series}", "value": Measured.of(Rate(count, N)), "kind": "rate"}
            for series, count in counts.items()
        ],
        settings={"epsilon": 1e-05, "judge": "paper"},
        asked=[{**asked, "asr": Measured.of(Rate(0, N)), "answered": None}],
    )


def fig4b() -> Outcome:
    """Maps of 32 x 32 heads, one of them unscored, and 1,024 of them against a score."""
    heads, scatter = [], []
    for dataset, (layer, head) in product(DATASETS, np.ndindex(32, 32)):
        freed = 20 * ((layer, head) in ((2, 26), (3, 1))) + (layer + head) % 4
        heads.append(at(freed, layer=layer, head=head, panel=dataset, marked=freed >= 20))
        if dataset == "damage":
            score = 10.0 ** (head / 8 - 6)
            scatter.append(at(freed, x=score, label=f"{layer}-{head}", panel="", series="all heads"))
    heads[5] |= {"y": None, "low": None, "high": None, "n": 0}
    small = [
        {"layer": layer, "head": head, "y": (layer - head) / 40, "marked": (layer, head) == (3, 0), "panel": ""}
        for layer, head in np.ndindex(4, 8)
    ]
    return outcome(
        "fig4b",
        figure("heads", "Llama-2-7b-chat", "head", "layer", heads, value="ASR"),
        figure("scatter", "Mean Ships", "mean Ships, radians", "ASR", scatter, logarithmic=True),
        figure("heads", "Change", "head", "layer", small, value="change of the score, nats", share=False),
        models=["meta-llama/Llama-2-7b-chat-hf"],
    )


def transfer() -> Outcome:
    """A signed matrix of changes, in two panels with a row of nothing, and one of counts with ten columns."""
    panels, sources = ("found by UA, ablated by UA", "found by SC, ablated by UA"), (*DATASETS, "random heads")
    points = [
        {"x": x, "y": y, "panel": panel, "value": value, "n": N, "text": "" if value is None else f"{value:+.2f}"}
        for panel, y, (column, x) in product(panels, sources, enumerate(DATASETS))
        for value in (None if y == "random heads" else 0.8 if x == y else 0.2 - 0.3 * column,)
    ]
    names = enumerate(f"{one}, {short}" for one in (*DATASETS, "advbench", "jailbreakbench") for short in ("UA", "SC"))
    shared = [
        {"x": x, "y": y, "value": 10 - abs(i - j), "text": str(10 - abs(i - j)), "low": None, "high": None}
        for (i, x), (j, y) in product(list(names), repeat=2)
    ]
    return outcome(
        "transfer",
        figure("matrix", MODEL, "tested on", "found on", points, value="change of the ASR"),
        figure("matrix", "Ten by ten", "one", "other", shared, value="heads shared, of 10"),
    )


def fig7() -> Outcome:
    """Attention of 14 tokens in six panels, and of 40 in one."""
    tokens = ["<s>", "how", "do", "i", "smash", "a", "lamp", "?", "\n", "Ġans", "wer", ":", "", "internationalisation"]
    panels = ("unablated", "UA on query, 1e-05", "UA on key, 1e-05", "SC, 1e-05", "UA on query, 0.1", "mean")
    long = _attention([f"tok{number}" for number in range(40)], ("",))
    return outcome(
        "fig7",
        figure("attention", "Head 1-3", "key", "query", _attention(tokens, panels), value="attention"),
        figure("attention", "A long prompt", "key", "query", long, value="attention"),
    )


def _attention(tokens: Sequence[str], panels: Sequence[str]) -> Iterable[Row]:
    for panel, query in product(panels, range(len(tokens))):
        for key in range(query + 1):
            value = 2 * (key + 1) / (query + 1) / (query + 2)
            names = {"query_token": tokens[query], "key_token": tokens[key]}
            yield {"query": query, "key": key, **names, "value": value, "panel": panel}


def fig13() -> Outcome:
    """Curves over a logarithmic axis that has 0 on it, and a density without upper end."""
    scores = [0.0, *(10 ** (-6 + 7 * step / 40) for step in range(41))]
    cdf = [
        {"x": x, "y": number / 41, "series": dataset, "panel": panel}
        for panel, dataset, (number, x) in product(("Ships, UA", "Ships, SC"), DATASETS, enumerate(scores))
    ]
    kde = [
        {"x": x / 10, "y": 3.9 * math.exp(-((x / 10 + curve) ** 2)), "series": DATASETS[curve], "panel": ""}
        for curve, x in product(range(2), range(-30, 31))
    ]
    return outcome(
        "fig13",
        figure("curves", "CDF", "score, radians", "share of heads", cdf, logarithmic=True),
        figure("curves", "KDE", "log10 of the score", "density", kde, share=False),
    )


def not_meaningful() -> Outcome:
    """Nothing but a reason."""
    reasons = [REASON, REASON.replace("theft", "fraud")]
    return outcome("fig15", models=["demo:aligned_a"], not_meaningful=reasons)


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
    columns = [
        *[("method", "method"), ("parameters", "parameters", "count"), ("share", "share of all, %", "number")],
        *[("asr", "ASR", "rate"), ("change", "change of ASR", "change"), ("p", "p (Holm)", "p")],
        ("paper", "ASR in the paper", "rate"),
    ]
    scatter = figure("scatter", MODEL, "share of parameters touched", "ASR", points, logarithmic=True)
    return outcome("table1", scatter, tables=[table(MODEL, "Wilson, 95 %.", columns, rows)])


def table2() -> Outcome:
    """Only a table that was timed."""
    columns = [("what", "what"), ("seconds", "seconds", "number"), ("hours", "A100 hours in the paper", "number")]
    rows = [
        {"what": "one score pass", "seconds": Measured(1.73, 5, 1.7, 1.76), "hours": None},
        {"what": "plain full generation, scaled", "seconds": 4100.5, "hours": 850.0},
    ]
    return outcome("table2", timed=[table("Seconds", "Student's 95 % interval over 5 runs.", columns, rows)])


def epsilon() -> Outcome:
    """Lines over strengths with 0, and names that try to be markup."""
    strengths, series = (1.0, 0.5, 0.1, 1e-2, 1e-3, 1e-5, 0.0), ("UA", "SC", HOSTILE, "--paper")
    points = [
        at(min(N, number * (3 + k)), x=strength, series=name, panel=panel)
        for panel, (k, name), (number, strength) in product(
            ("damage", HOSTILE), enumerate(series), enumerate(strengths)
        )
    ]
    return outcome(
        "epsilon",
        figure("lines", HOSTILE, "epsilon", "--ASR", points, caption=HOSTILE, logarithmic=True),
        figure("bars", "No points", "x", "y", ()),
        models=[HOSTILE],
        tables=[table(HOSTILE, HOSTILE, [("x", HOSTILE), ("n", "n", "count")], [{"x": HOSTILE, "n": 1_234_567}])],
        notes=[HOSTILE],
    )


def outcomes() -> list[Outcome]:
    """All, in the catalogue's order."""
    figures = [fig2(), fig4b(), transfer(), fig7(), fig13(), not_meaningful()]
    return [*figures, table1(), table2(), epsilon()]


# As files hold them.


def results(made: Sequence[Outcome] | None = None, **config: Any) -> dict[str, Any]:
    """``results.json`` of these, read back."""
    experiments = [one.as_dict() for one in (outcomes() if made is None else made)]
    value = {"schema_version": SCHEMA_VERSION, "kind": "reproduction", "experiments": experiments, "judge": "paper"}
    return dict(json.loads(json.dumps(value | {"catalogue": listed(ReproductionConfig(**config))})))


def timings(made: Sequence[Outcome] | None = None) -> dict[str, Any]:
    """``timings.json`` of these, read back."""
    timed = {one.name: asdict(one)["timed"] for one in (outcomes() if made is None else made) if one.timed}
    return dict(json.loads(json.dumps({"seconds": SECONDS, "timed": timed})))


def manifest(**changed: Any) -> dict[str, Any]:
    """What a page is told of a run: settings, weights, and what is remembered."""
    config = asdict(ReproductionConfig()) | {"kind": "reproduction", "versions": {"torch": "2.9.0"}} | changed
    remembered = {f"plan_{number}": {"groups_per_batch": 8} for number in range(30)}
    remembered |= {f"economy_{number}": {"n_rows": 24} for number in range(30)} | {"tolerance_0": 1e-4, "threads": 1}
    value = {"config": config, "weights_demo:aligned_a": "bd8c"}
    return dict(json.loads(json.dumps(value | remembered)))


def finished_run(path: Path, made: Sequence[Outcome] | None = None) -> Path:
    """A run directory of these outcomes."""
    settings = {"kind": "reproduction", **asdict(ReproductionConfig())}
    with RunDirectory.start(path, settings, {"started": "2026-01-02T03:04:05+00:00"}) as run:
        run.write_results(results(made))
        run.add_timings(timings(made))
    return path
