"""What all tests share: one thread, a call of the command line in this process, a folder of their own."""

import gc
import json
import os

# Before torch is imported: models here are tiny, and two busy processes of two threads each stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest-xdist tells its workers the terminal's width, by which tables would be laid out.
os.environ.pop("COLUMNS", None)

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent / "samples"


def pytest_collection_finish():
    """What was imported stays: the garbage collector, which took an eighth of the tests' time, looks at it no more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """A machine that loses its power loses its tests too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def run():
    """Calls the command line; gives its exit code, stdout and stderr."""
    from safetyheads.cli.app import main

    def called(*arguments):
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, out.getvalue(), err.getvalue()

    return called


@pytest.fixture(scope="session")
def run_json(run):
    """Calls the command line for JSON; it has to end with 0. Gives what it prints, read."""

    def called(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return called


@pytest.fixture(scope="session")
def refused(run):
    """Calls the command line; it has to end with 2, one line on stderr and nothing on stdout. Gives the line."""

    def called(*arguments):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        return err

    return called


@pytest.fixture(scope="session")
def organism():
    """The embedded model whose refusal heads are known, loaded once; who changes it puts it back."""
    import torch

    from safetyheads import load_demo

    torch.set_num_threads(1)
    return load_demo("aligned_a")


@pytest.fixture(scope="session")
def engine(organism):
    return organism.engine


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pages without the pictures that browsers without JavaScript show: each takes a while, and a test has them."""
    from safetyheads.reports import page

    monkeypatch.setattr(page, "pictures", lambda *_: {})


@pytest.fixture
def own_folder(monkeypatch, tmp_path):
    """The test runs in a folder of its own, on one thread, and the modules in samples/ can be named."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SAMPLES)
    torch.set_num_threads(1)
