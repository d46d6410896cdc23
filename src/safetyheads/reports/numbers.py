"""How the report writes numbers and names.

Owns digits, signs, brackets and the words for a change; refuses to know where on the page they stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup


def _two(value: float) -> str:
    # Adding 0 takes the sign from what rounds to nothing: a "−0.00" would be read as a loss.
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _rate(rate: Mapping[str, Any] | None) -> str:
    return "–" if not rate or rate["rate"] is None else _two(rate["rate"])


def rate_words(rate: Mapping[str, Any]) -> str:
    """A rate with its interval, for a sentence."""
    return f"{_rate(rate)} {_interval(rate['interval'])}".strip()


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("+0.00", "0.00").replace("-", "−")


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """Significant digits, with the sign of a minus and no exponent down to a millionth."""
    if value is None:
        return "–"
    size = abs(value)
    text = f"{size:.2g}" if 0 < size < 1e-4 else f"{size:.{digits}g}" if round(size) < 10**digits else f"{size:.0f}"
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    return sign + re.sub(r"e-0?(\d+)$", r"e−\1", text)


def _interval(bounds: Sequence[float] | None, signed: bool = False) -> str:
    write = _signed if signed else _two
    return f"[{write(bounds[0])}, {write(bounds[1])}]" if bounds else ""


def _interval_of_numbers(bounds: Sequence[float], signed: bool = False) -> str:
    return f"[{number(bounds[0], signed, 2)}, {number(bounds[1], signed, 2)}]"


def _range_of(values: Sequence[float]) -> str:
    return f"{_two(min(values))} to {_two(max(values))}" if values else ""


def _p_value(value: float | None, equals: str = "") -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else equals + (f"{value:.3f}" if value < 0.1 else f"{value:.2f}")


def _percent(share: float) -> str:
    return f"{number(100 * share, digits=2)} %"


def _in_words(change: Mapping[str, Any] | None, alpha: float) -> tuple[str, str]:
    """What a change means, and the class of its colour."""
    if not change or change["change"] is None:
        return "not measured", "soft"
    p_value = change.get("p_holm", change["p_value"])
    if p_value is None or p_value >= alpha:
        return "no clear change", "soft"
    return ("complies more", "yes") if change["change"] > 0 else ("complies less", "less")


def _ties(groups: Sequence[Sequence[str]]) -> str:
    shown = "; ".join(" = ".join(group) for group in groups[:4])
    return shown + (f"; and {len(groups) - 4} more" if len(groups) > 4 else "")


_APART = re.compile(r"(?P<interval>\[[−+\-.,\d\s]*\])|\b\d+-\d+\b")


def _sentence(text: str) -> Markup:
    """The verdict with its intervals set apart and its heads kept on one line; everything else is escaped."""
    from markupsafe import Markup, escape

    def span(found: re.Match[str]) -> str:
        return f'<span class="{"interval" if found["interval"] else "nowrap"}">{found[0]}</span>'

    return Markup(_APART.sub(span, str(escape(text))))


def _point_first(text: str) -> Markup:
    """The first sentence set apart from the rest."""
    from markupsafe import Markup

    point, stop, rest = text.partition(". ")
    return Markup("<strong>{}</strong>{}").format(point + stop.rstrip(), f" {rest}" if rest else "")


def _heads(names: Sequence[str]) -> Markup:
    """Heads with commas, broken between lines at the commas only."""
    from markupsafe import Markup

    return Markup(", ").join(Markup('<span class="nowrap">{}</span>').format(name) for name in names)


FILTERS: dict[str, Callable[..., Any]] = {
    "rate": _rate,
    "two": _two,
    "signed": _signed,
    "number": number,
    "interval": _interval,
    "interval_of_numbers": _interval_of_numbers,
    "range_of": _range_of,
    "p_value": _p_value,
    "percent": _percent,
    "in_words": _in_words,
    "ties": _ties,
    "heads": _heads,
    "sentence": _sentence,
    "point_first": _point_first,
    "sentence_case": lambda text: text[:1].upper() + text[1:],
    "quoted": lambda text: json.dumps(text, ensure_ascii=False),
}
"""What the template calls them."""
