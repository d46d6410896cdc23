"""What a run calls to report its progress; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Watches a run."""

    def say(self, line: str | Callable[[], str]) -> None:
        """Show a line; a line that costs something is given as the function that makes it."""

    def track(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context that gives a function to call with the number of items just done."""


class Silent:
    """Shows nothing."""

    def say(self, line: str | Callable[[], str]) -> None:
        """Do nothing."""

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Do nothing."""
        yield lambda _: None
