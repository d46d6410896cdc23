"""One run directory of few prompts for all experiments of a session: what they share is measured once."""

from functools import cache

import pytest
from experiment_runs import SMALL, run_of


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments") / "run"


@pytest.fixture(scope="session")
def outcome_of(shared_run):
    """Gives an experiment's outcome by its name; it is run when a test first asks for it."""
    return cache(lambda name: run_of(SMALL, [name], shared_run)[name])
