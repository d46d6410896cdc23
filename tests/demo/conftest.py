"""What the tests of the command line share: a call in this process, and a folder of their own."""

from pathlib import Path

import pytest

from safetyheads.cli import main


@pytest.fixture
def run(capsys):
    """Calls the command line; gives its exit code, stdout and stderr."""

    def called(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return called


@pytest.fixture
def own_folder(monkeypatch, tmp_path):
    """The test runs in a folder of its own, on one thread, and the modules beside it can be named."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    torch.set_num_threads(1)
