"""Experiments run on the organism, for tests: outcomes as a reader of the directory has them."""

import json
from functools import cache

import pytest
import torch

from safetyheads import load_demo
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.experiments.run import reproduce
from safetyheads.runs.progress import Silent


@cache
def engine_of(name):
    """The embedded checkpoint of that name, or at the end of that path."""
    return load_demo(name.removeprefix("demo:").rsplit("/", 1)[-1]).engine


def run_of(config, names, out, load=engine_of):
    """Outcomes by name; what is read back is what was returned, and has no NaN."""
    torch.set_num_threads(1)
    results = reproduce(config, [EXPERIMENTS[name] for name in names], out, load, Silent())
    read = json.loads((out / "results.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    assert read == json.loads(json.dumps(results))
    return {one["name"]: one for one in read["experiments"]}
