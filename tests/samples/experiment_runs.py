"""Experiments run on the organism, for tests: outcomes as a reader of the directory has them."""

import json
from functools import cache

import torch

from safetyheads import load_demo
from safetyheads.demo import PLANTED_HEADS
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.experiments.lab import reproduce
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import RunDirectory

N = 6
SMALL = ReproductionConfig(
    limit=N,
    max_new_tokens=40,
    size=3,
    query_size=3,
    templates=("query_answer",),
    epsilons=(1.0, 0.1, 1e-5, 0.0),
    task_limit=8,
)
OWN = {"damage": "1-3", "theft": "2-5", "fraud": "2-1"}
"""The head that the organism's construction gives each category."""
PLANTED = {name: {str(head) for head in heads} for name, heads in PLANTED_HEADS.items()}


@cache
def engine_of(name):
    """The embedded checkpoint of that name, or at the end of that path."""
    return load_demo(name.removeprefix("demo:").rsplit("/", 1)[-1]).engine


def run_of(config, names, out, load=engine_of, shard=None):
    """Outcomes by name; what is read back is what was returned, and has no NaN."""
    torch.set_num_threads(1)
    results = reproduce(config, [EXPERIMENTS[name] for name in names], out, load, Progress(), shard=shard)
    read = RunDirectory.open(out).read_results()
    assert read == json.loads(json.dumps(results, allow_nan=False))
    outcomes = {outcome["name"]: outcome for outcome in read["experiments"]}
    for outcome in outcomes.values():
        for table in outcome["tables"]:
            assert {column["key"] for column in table["columns"]} & set(table["rows"][0])
        assert all(figure["points"] for figure in outcome["figures"])
        # Maps of one prompt have no number to lead with.
        leads = EXPERIMENTS[outcome["name"]].module != "attention_maps"
        assert bool(outcome["headline"]) == bool(outcome["tables"]) or not leads
    return outcomes


def rows(outcome, table=0, **having):
    """Rows of a table that have these cells."""
    return [
        row for row in outcome["tables"][table]["rows"] if all(row.get(key) == value for key, value in having.items())
    ]


def points(figure, **having):
    """Points of a figure that have these fields."""
    return [point for point in figure["points"] if all(point.get(key) == value for key, value in having.items())]


def figure_of(outcome, kind, containing=""):
    """The one figure of that kind whose title contains the text."""
    (figure,) = [figure for figure in outcome["figures"] if figure["kind"] == kind and containing in figure["title"]]
    return figure
