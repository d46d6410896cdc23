"""The errors that users see, their texts in one line, and limits of time and memory for what others wrote."""

import os
import signal
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral

# Where Linux tells how much memory a process has, in pages.
_MEMORY = "/proc/self/statm"
ERRORS_OF_CODE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
"""What code trips over where it is given something else than it expects, and nothing of the machine."""
OVERFLOWS = "{} is not finite: the ablated model's states overflow its dtype"


class SafetyheadsError(Exception):
    """Something failed, and one line says why; the command line exits with 1."""


class InputError(SafetyheadsError, ValueError):
    """The input cannot be used; the command line prints the line and exits with 2."""


class IncompleteError(InputError):
    """A run has not finished, or part of it is lost; the same command continues it. The command line exits with 3."""


class ElsewhereError(IncompleteError):
    """A stage needs what other shards of the run compute; ``places`` are its files."""

    def __init__(self, line: str, places: frozenset[str]) -> None:
        super().__init__(line)
        self.places = places


class TooFewPromptsError(InputError):
    """The held-out prompts cannot show anything; a command says so before a model is loaded, and exits with 0."""


class UnsupportedModelError(InputError):
    """The method would not be exact on this checkpoint; the message says why."""


def as_path(given: object, what: str) -> str:
    """A name or a path as a text; an InputError for anything else."""
    if isinstance(given, str | os.PathLike):
        return str(os.fspath(given))
    raise InputError(f"{what}: not a name or a path, but {shorten(repr(given), 60)}")


def whole_number(given: object, what: str, least: int = 0) -> int:
    """A whole number, ``least`` or more; an InputError for anything else."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
        raise InputError(f"{what} is a whole number, {least} or more; got {shorten(repr(given), 60)}")
    return int(given)


def refuse_unknown(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse a name that is not known, with the nearest one; ``what`` begins the message: "audit has no setting"."""
    if unknown := sorted(set(given) - set(known)):
        near = get_close_matches(unknown[0], known, 1)
        offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"{what} {unknown[0]!r}; {offer}")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All that an error says, in one line, and of what kind it is where that is no kind of ours or transformers'."""
    said = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {said}" if type(error).__module__ == "builtins" and said else said or kind


def shorten(text: str, width: int = 40) -> str:
    """The text, cut to a width that a line has room for."""
    return text if len(text) <= width else text[: width - 3] + "..."


def unicode_text(text: str) -> str:
    """The text with halves of surrogate pairs, as names of files may hold, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def library_failures(of: str = "") -> Iterator[None]:
    """Make an InputError of what the tokenizers library raises: bare exceptions, and panics, which are none of them."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(of + first_line(error)) from None


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """End what takes more than so many further bytes by a MemoryError, on Linux, where no other thread is at work.

    The limit is the whole process's, so another thread would be held to it too; daemons, which draw a bar or listen,
    take little.
    """
    at_work = [thread for thread in threading.enumerate() if not thread.daemon]
    if at_work != [threading.current_thread()] or not os.path.exists(_MEMORY):
        yield
        return
    import resource  # not on every system

    with open(_MEMORY) as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + n_bytes
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if before < 0 else min(before, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what never ends by a TimeoutError, after so many seconds of this process, in the main thread alone."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it takes longer than {seconds} s")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGPROF, end)
    # Again and again: jinja's optimizer takes the first error for one of the expression, and tries it once more.
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
