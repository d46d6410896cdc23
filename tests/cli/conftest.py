"""What tests of the command line share: a refusal needs no model."""

import pytest

from safetyheads.model.engine import Engine


@pytest.fixture
def no_model(monkeypatch):
    """No model may be read."""

    def read(*_, **__):
        raise AssertionError("the model was read")

    monkeypatch.setattr(Engine, "load", read)
