"""Makes and reads files that say what they hold: the run, a key, a count, and a checksum over the content.

A file that was cut, edited, swapped or written for another run does not fit what it says, and is never used.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Self, TypeAlias, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from safetyheads.errors import ERRORS_OF_CODE, InputError, SafetyheadsError, first_line
from safetyheads.files import canonical_json, parse_json
from safetyheads.judges.base import Label, Verdict

if TYPE_CHECKING:
    from torch import Tensor

Record: TypeAlias = Mapping[str, Any]
"""A stored line of JSON."""
Fits = TypeVar("Fits")
_Count = Annotated[int, Meta(ge=0, lt=2**53)]
Finite = Annotated[float, Meta(gt=-1e308, lt=1e308)]
"""A number of JSON with which something can be computed."""


class LaterRecord(TypedDict):
    """What a later judge said of an answer."""

    verdict: Verdict
    of: NotRequired[str]
    judge: NotRequired[str]


class AnswerRecord(TypedDict):
    """A stored answer (:func:`.kept_answers.record_of`); records of some stages have more fields."""

    id: _Count
    set: str
    part: NotRequired[str]
    group: str
    epsilon: NotRequired[Finite | None]
    seed: int
    verdicts: dict[str, Verdict]
    behaviour: Label
    answered: bool
    finished: NotRequired[bool]
    complete: NotRequired[bool]
    changed: NotRequired[bool | None]
    route: NotRequired[str]
    n_tokens: NotRequired[_Count]
    first_token: NotRequired[list[_Count]]
    token_ids: NotRequired[list[_Count]]
    query: NotRequired[str]
    text: NotRequired[str]
    thinks: NotRequired[bool]
    thought: NotRequired[str]
    unclosed: NotRequired[bool]
    surprise: NotRequired[Finite]
    cluster: NotRequired[int]
    category: NotRequired[str]


_CHECKED = "checksums"
KEY_DIGITS = 24
"""Of a key: 96 bits, so that two of a million files collide once in 10^17 runs."""


class DamagedError(InputError):
    """A stored file does not hold what it says, or what its place says."""


class UnfitError(DamagedError):
    """A value is not of the type that is read of it; the message names the field and not the file."""


@contextmanager
def as_damaged(path: Path | str) -> Iterator[None]:
    """Within, a field that is missing, or of another type, is one line that names the file and the field."""
    try:
        yield
    except UnfitError as error:
        raise DamagedError(f"{path} does not hold what is read of it: {error}") from None
    except SafetyheadsError:
        raise
    except ERRORS_OF_CODE as error:
        raise DamagedError(f"{path} does not hold what is read of it: {type(error).__name__}, {error}") from error


@dataclass(frozen=True, slots=True)
class Held:
    """What a file of records or tensors says of itself: its first line, or its metadata."""

    run: str
    """Key of the config of the run that wrote it."""
    stage: str
    """What it is a part of."""
    key: str
    """Names what the content depends on, the run's config aside."""
    count: int
    """Records or tensors in it."""
    sha256: str = ""
    """Checksum of the other fields and the content."""

    def with_checksum(self, content: bytes) -> Self:
        """The same, with the checksum of such content."""
        about = canonical_json(asdict(replace(self, sha256="")))
        return replace(self, sha256=hashlib.sha256(about.encode() + content).hexdigest())

    @classmethod
    def read(cls, text: str | bytes, content: bytes, count: int) -> Self:
        """What a file says, once it fits the content."""
        held = converted(parse_json(text, "its first line"), cls)
        if held.count != count:
            raise DamagedError(f"it holds {count} entries and should hold {held.count}")
        if held != held.with_checksum(content):
            raise DamagedError("its content does not fit its checksum")
        return held


def content_key(fields: Mapping[str, Any]) -> str:
    """The name of what ``fields`` determine: equal fields, in any order, give equal keys."""
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:KEY_DIGITS]


def converted(value: Any, kind: Callable[..., Fits]) -> Fits:
    """A value of JSON as a dataclass or another type; an error names the field that does not fit."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half a surrogate pair where no text should be
        raise UnfitError(str(error).replace("`", "").replace("$.", "").replace("$", "")) from None


# Records: a line that says what follows, then a line of JSON each.


def pack_records(run: str, stage: str, key: str, records: Iterable[Record]) -> bytes:
    """A file of records."""
    lines = [canonical_json(record) for record in records]
    content = "".join(line + "\n" for line in lines).encode()
    held = Held(run, stage, key, len(lines)).with_checksum(content)
    return canonical_json(asdict(held)).encode() + b"\n" + content


def unpack_records(file: bytes) -> tuple[Held, list[Record]]:
    """What a file of records says of itself, and the records."""
    first, _, content = file.partition(b"\n")
    held = Held.read(first, content, content.count(b"\n"))
    try:  # one text of all lines is read 2.5 times as fast as line by line
        lines = json.loads(b"[" + b",".join(content.splitlines()) + b"]", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its lines are not JSON: {first_line(error)}") from None
    converted(lines, list[dict[str, Any]])
    for field, kind in (("verdicts", AnswerRecord), ("verdict", LaterRecord)):
        converted([line for line in lines if field in line], list[kind])  # type: ignore[valid-type]
    return held, lines


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


# Tensors: a safetensors file that says in its metadata what it holds.


def pack_tensors(run: str, stage: str, key: str, tensors: Mapping[str, "Tensor"]) -> bytes:
    """A safetensors file."""
    import safetensors.torch  # torch is not needed to read results
    import torch

    # Cloned, because safetensors refuses views that share memory.
    whole = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    layout, data = _halves(safetensors.torch.save(whole))
    content = canonical_json(layout).encode() + data
    held = Held(run, stage, key, len(whole)).with_checksum(content)
    # One metadata entry only: the order of two, and so the bytes, would differ from run to run.
    head = canonical_json({"__metadata__": {"held": canonical_json(asdict(held))}, **layout}).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data


def unpack_tensors(file: bytes) -> tuple[Held, dict[str, "Tensor"]]:
    """What a safetensors file says of itself, and the tensors."""
    import safetensors.torch

    layout, data = _halves(file)
    told = layout.pop("__metadata__", {})
    text = told.get("held", "") if isinstance(told, dict) else ""
    held = Held.read(str(text), canonical_json(layout).encode() + data, len(layout))
    try:
        return held, safetensors.torch.load(file)
    except safetensors.SafetensorError as error:
        raise DamagedError(first_line(error)) from None


def _halves(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    end = 8 + int.from_bytes(file[:8], "little")
    return parse_json(file[8:end], "its header"), file[end:]


# Objects of JSON: a checksum a field, so that an error can name the field.


def with_checksums(run: str, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the checksum of every field, of a file of that name, which belongs to a run."""
    sums = {field: content_key({"run": run, "file": name, field: value}) for field, value in fields.items()}
    return {**fields, _CHECKED: sums}


def without_checksums(run: str, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """The object that :func:`with_checksums` was given; a DamagedError names a field that is missing or was changed."""
    fields = {field: value for field, value in told.items() if field != _CHECKED}
    expected = told.get(_CHECKED)
    if not isinstance(expected, dict):
        raise DamagedError(f"{name} has no {_CHECKED}")
    for field in sorted({*expected, *fields}):
        if field not in fields:
            raise DamagedError(f"{name} has no {field}")
        try:
            fits = expected.get(field) == content_key({"run": run, "file": name, field: fields[field]})
        except RecursionError:
            raise DamagedError(f"{name}: {field} is nested too deep") from None
        except ValueError:
            raise DamagedError(f"{name}: {field} holds a number that is not finite") from None
        if not fits:
            raise DamagedError(f"{name}: {field} was changed, or belongs to another run: it does not fit its checksum")
    return fields
