"""What tests of the command line share: calls of it; a refusal is exit 2 and one line."""

import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from safetyheads.cli.app import main
from safetyheads.model.engine import Engine


@pytest.fixture(scope="session")
def call():
    """As ``run``, for fixtures that tests share."""

    def called(*arguments):
        out, err = StringIO(), StringIO()
        with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
            patched.delitem(os.environ, "COLUMNS", raising=False)
            with pytest.raises(SystemExit) as ended:
                main([str(argument) for argument in arguments])
        return ended.value.code, out.getvalue(), err.getvalue()

    return called


@pytest.fixture
def refused(run):
    """Calls the command line; it has to end with 2, one line on stderr and nothing on stdout. Gives the line."""

    def called(*arguments):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        return err

    return called


@pytest.fixture
def no_model(monkeypatch):
    """No model may be read."""

    def read(*_, **__):
        raise AssertionError("the model was read")

    monkeypatch.setattr(Engine, "load", read)
