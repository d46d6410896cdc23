"""Stored answers made by hand."""

from typing import Any


def answer_record(
    number: int,
    label: str = "complied",
    behaviour: str = "",
    reason: str = "",
    surprise: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A record with one judge's verdict; ``judge`` names it, and other fields are added or replace those here.

    The rules of words say what the judge says unless told otherwise, and that it complied where that has no verdict.
    """
    behaviour = behaviour or ("complied" if label == "unscored" else label)
    verdicts = {more.pop("judge", "paper"): {"label": label, "reason": reason}}
    made = {"id": number, "seed": 0, "behaviour": behaviour, "answered": behaviour == "complied", "verdicts": verdicts}
    return made | ({} if surprise is None else {"surprise": surprise}) | more
