"""What tests of the command line share: a refusal is exit 2 and one line; it needs no model."""

import pytest

from safetyheads.model.engine import Engine


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
