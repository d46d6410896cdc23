"""What a long run tells while it runs. Owns the protocol and its silent form; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Somebody who watches a run."""

    def say(self, line: str | Callable[[], str]) -> None:
        """One line worth keeping; one that costs something is given as what makes it."""

    def track(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context that gives a function to call with the number of items just done."""


class Silent:
    """Nobody watches."""

    def say(self, line: str | Callable[[], str]) -> None:
        """Nothing."""

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Nothing, as often as asked."""
        yield lambda _: None
