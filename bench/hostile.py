"""Counts payloads that stay inert and hostile endpoints that are survived; each is a test, so both say the same.

python bench/hostile.py                  both counters
python bench/hostile.py --only endpoints
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "tests"
COUNTERS = {
    "payloads inert": (
        *("cli/test_terminal.py", "model/test_pickles.py", "model/test_lies.py", "judges/test_function.py"),
        "integrations/test_utility.py::test_code_of_tasks_runs_only_where_it_is_trusted",
        "reports/test_browser.py::test_what_comes_from_outside_does_not_run_and_widens_no_page",
        "reports/test_browser.py::test_what_were_on_the_page_unescaped_would_not_run_either",
    ),
    "endpoints survived": ("judges/test_hostile_endpoints.py",),
}
"""Tests of each counter."""


class Outcomes:
    """A plugin of pytest that keeps whether each test held; one that was skipped was not tried."""

    def __init__(self) -> None:
        self.held: dict[str, bool] = {}
        """By the test's name."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after set-up, call and clean-up of a test."""
        if report.when == "call" or report.failed:
            self.held[report.nodeid] = self.held.get(report.nodeid, True) and report.passed


def tried(tests: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each test by name, and whether it held."""
    outcomes = Outcomes()
    pytest.main(
        ["--quiet", "--no-header", "-p", "no:cacheprovider", *(str(TESTS / test) for test in tests)], [outcomes]
    )
    yield from outcomes.held.items()


def main(arguments: list[str] | None = None) -> int:
    """Print, and return 1 where anything was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=[name.split()[0] for name in COUNTERS], help="this alone")
    given, lost = parser.parse_args(arguments), 0
    for name, tests in COUNTERS.items():
        if given.only is None or name.split()[0] in given.only:
            held = dict(tried(tests))
            failed = [what for what, holds in held.items() if not holds]
            lost += len(failed) + (not held)
            found = {"counter": name, "tried": len(held), "survived": len(held) - len(failed), "lost": failed}
            print(json.dumps(found))
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
