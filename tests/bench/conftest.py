"""The benches lie outside the package; their tests run them at a reduced size and time nothing."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))


@pytest.fixture
def lines(capsys):
    """Reads the JSON lines that were printed since the last call."""
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
