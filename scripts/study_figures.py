"""Writes docs/study/: a small JSON file and three pictures for each run of ``safetyheads reproduce study``.

    python scripts/study_figures.py runs/study-refusing_a ...
    python scripts/study_figures.py --audits runs/refusing_a-ua runs/refusing_b-ua ...

It prints the run's tables for docs/study.md. Of audits it writes the verdicts and the top heads into audits.json.
Nothing that it writes holds an answer.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt

from safetyheads.reports.reproduction import table_shown
from safetyheads.runs.directory import RunDirectory

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "study"
COLOURS = {"ASR": "#4c78a8", "coherent ASR": "#2a7f62", "nonsense": "#b8860b"}
COLOURS |= {"benign answers lost": "#b22222"}


def rounded(value: Any) -> Any:
    """The same with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def markdown(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def head_map(points: list[dict[str, Any]]) -> alt.Chart:
    """What becomes of the answers without each head."""
    return (
        alt.Chart(alt.Data(values=points))
        .mark_rect()
        .encode(
            x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("layer:O", title="layer", sort="descending"),
            color=alt.Color("y:Q", title="share of answers", scale=alt.Scale(scheme="viridis", domain=[0, 1])),
            column=alt.Column("panel:N", title=None, sort=None),
        )
        .properties(width=200, height=480)
    )


def scores(figures: list[dict[str, Any]]) -> alt.Chart:
    """Each score of every head against its ASR."""
    charts = []
    for figure in figures:
        points = [
            {**point, "name": point["label"] if point["series"].startswith("higher") else ""}
            for point in figure["points"]
        ]
        base = alt.Chart(alt.Data(values=points)).encode(
            x=alt.X("x:Q", title=figure["x"]), y=alt.Y("y:Q", title="ASR", scale=alt.Scale(domain=[0, 1]))
        )
        scale = alt.Scale(range=["#b22222", "#9aa5b1"], domain=["higher ASR", "no higher ASR"])
        colour = alt.Color("series:N", title=None, scale=scale)
        dots = base.mark_circle(size=36, opacity=0.8).encode(color=colour)
        names = base.mark_text(align="left", dx=6).encode(text="name:N")
        charts.append((dots + names).properties(width=260, height=200))
    return alt.concat(*charts, columns=3)


def groups(points: list[dict[str, Any]]) -> alt.Chart:
    """What becomes of the answers as heads are added."""
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("x:O", title="ablated heads, in Sahara's order by mean Ships", axis=alt.Axis(labelAngle=0)),
        color=alt.Color("series:N", title=None, scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))),
    )
    lines = base.mark_line(point=True).encode(y=alt.Y("y:Q", title="share of prompts", scale=alt.Scale(domain=[0, 1])))
    return (base.mark_rule(opacity=0.5).encode(y="low:Q", y2="high:Q") + lines).properties(width=420, height=280)


def audit(run: Path) -> dict[str, Any]:
    """What an audit found: its verdict, what the unablated model does, and the heads of the highest mean Ships.

    Of a run of ``ships``, these heads alone.
    """
    results = RunDirectory.open(run).read_results()
    named = {"model": results["model"]["name"], "ablation": results["ablation"]["label"]}
    if results["kind"] == "ships":
        return named | {"heads": [{"head": of["head"], "mean_ships": of} for of in results["heads"][:10]]}
    behaviour, verdict = results["behaviour"], results["verdict"]
    found = {key: verdict[key] for key in ("label", "sentence", "heads", "numbers")}
    alone = [
        {key: head[key] for key in ("head", "mean_ships", "benign_ships", "coherent_asr")}
        for head in behaviour["heads"]
    ]
    unablated = {key: behaviour["vanilla"][key] for key in ("asr", "coherent_asr", "refused", "benign_answered")}
    return named | {"unablated": unablated, "verdict": found, "heads": alone}


def main() -> None:
    """Write the files, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--audits", action="store_true", help="the runs are audits")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if options.audits:
        lines = [json.dumps(rounded(audit(run)), separators=(",", ":")) for run in options.runs]
        (FOLDER / "audits.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        return
    for run in options.runs:
        (outcome,) = [item for item in RunDirectory.open(run).read_results()["experiments"] if item["name"] == "study"]
        (model,) = outcome["models"]
        name, figures = model.rsplit(":", 1)[-1], outcome["figures"]
        scatters = [figure for figure in figures if figure["kind"] == "scatter"]
        heads: dict[str, dict[str, Any]] = {}
        for point in figures[0]["points"]:
            head = heads.setdefault(f"{point['layer']}-{point['head']}", {"differs": point["marked"]})
            head[point["panel"]] = point["y"]
        for figure in scatters:
            for point in figure["points"]:
                heads[point["label"]][point["panel"]] = point["x"]
        kept = {key: outcome[key] for key in ("models", "settings", "asked", "headline", "tables")}
        text = json.dumps(rounded(kept | {"heads": heads}), indent=None, separators=(",", ":"))
        text = re.sub(r'=[^"]*/', "=", text)  # a file's name says enough
        (FOLDER / f"{name}.json").write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")
        drawn = {"heads": head_map(figures[0]["points"]), "scores": scores(scatters)}
        drawn["groups"] = groups(figures[-1]["points"])
        for kind, chart in drawn.items():
            chart.configure(font="sans-serif").save(FOLDER / f"{name}-{kind}.png", scale_factor=1.5)
        for table in map(table_shown, outcome["tables"]):
            lines = [f"\n### {table.title}\n", markdown(column.title for column in table.columns)]
            lines.append("|" + "---|" * len(table.columns))
            for row in table.rows:
                lines.append(markdown(" ".join(filter(None, (cell.text, cell.interval, cell.n))) for cell in row))
            sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
