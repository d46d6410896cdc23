"""What tests of pages share."""

import pytest

from safetyheads.reports import page
from safetyheads.runs.config import AsrConfig, SaharaConfig, ShipsConfig
from safetyheads.runs.single_steps import run_asr, run_sahara, run_ships


@pytest.fixture(scope="session")
def steps(tmp_path_factory, engine):
    """The folder of finished runs of ships, sahara and asr, each under its name."""
    folder = tmp_path_factory.mktemp("steps")
    model = {"model": "demo:aligned_a", "prompts": "demo", "limit": 12}
    screen = {"screen": True, "candidates": 6, "sample": 4}
    run_ships(engine, ShipsConfig(**model, **screen), folder / "ships")
    run_sahara(engine, SaharaConfig(**model, **screen, score="refusal_score", size=2), folder / "sahara")
    asr = AsrConfig(**model, groups=("1-3,2-5", "1-3"), query_level=1, judges=("phrases", "paper"), max_new_tokens=16)
    run_asr(engine, asr, folder / "asr")
    return folder


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    """Stands in for the drawing library, whose 900 kB take long to parse; pages for the browser are made before it."""
    monkeypatch.setattr(page, "drawing_library", lambda: "/* drawing library */")
