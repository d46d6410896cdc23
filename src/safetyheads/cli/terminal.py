"""Makes anybody's text safe for a terminal: control characters, escapes and bidi marks are shown, not obeyed."""

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Controls, formats (bidi overrides, zero widths, tags), halves of surrogates, private and unassigned characters.
_UNSHOWN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def terminal_text(text: str, newlines: bool = True) -> str:
    r"""The text with all that a terminal would obey written as Python writes it, such as ``\x1b`` and ``\u202e``.

    ``newlines`` stay, unless the text is part of a line.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if newlines else "\t"
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if letter not in kept and unicodedata.category(letter) in _UNSHOWN
        else letter
        for letter in text
    )


class Terminal(Console):
    """A rich console on which every text is a :func:`terminal_text`, and brackets are text."""

    def __init__(self, file: TextIO, width: int | None = None) -> None:
        """``file`` is a stream, or one of :func:`escaped_streams`, past which the console's own styles go."""
        raw = getattr(file, "unescaped", file)
        super().__init__(file=raw, markup=False, highlight=False, emoji=False, width=width)

    def on_broken_pipe(self) -> None:
        """Leave it to the command what happens where nobody reads any more; rich would end it with 1."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """Before it is measured, so that columns are as wide as what is shown."""
        return super().render_str(terminal_text(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What comes in another way than as a string."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(terminal_text(segment.text), segment.style)


class _Escaped:
    """A stream whose every text is a :func:`terminal_text`."""

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        self.unescaped.write(terminal_text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    @property
    def rich_proxied_file(self) -> TextIO:
        """Where rich writes that is not ours, such as the help pages."""
        return self.unescaped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


@contextmanager
def escaped_streams() -> Iterator[None]:
    """Within, libraries and tracebacks too write only :func:`terminal_text` to stdout and stderr."""
    before = sys.stdout, sys.stderr
    with ExitStack() as opened:
        # One that is closed is None.
        streams = [stream or opened.enter_context(open(os.devnull, "w")) for stream in before]
        for stream in streams:
            if isinstance(stream, TextIOWrapper):  # not every terminal has every character
                stream.reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = map(_Escaped, streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
