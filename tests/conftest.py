"""What all tests share: one thread, a call of the command line in this process, a folder of their own."""

import os

# Before torch is imported: models here are tiny, and two busy processes of two threads each stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture
def run(capsys, monkeypatch):
    """Calls the command line; gives its exit code, stdout and stderr."""
    from safetyheads.cli.app import main

    # pytest-xdist tells its workers the terminal's width, by which tables would be laid out.
    monkeypatch.delenv("COLUMNS", raising=False)

    def called(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return called


@pytest.fixture
def own_folder(monkeypatch, tmp_path):
    """The test runs in a folder of its own, on one thread, and the modules in samples/ can be named."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SAMPLES)
    torch.set_num_threads(1)
