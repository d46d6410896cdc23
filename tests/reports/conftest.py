"""What tests of pages share."""

import pytest

from safetyheads.reports import page


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    """Stands in for the drawing library, whose 900 kB take long to parse; pages for the browser are made before it."""
    monkeypatch.setattr(page, "drawing_library", lambda: "/* drawing library */")
