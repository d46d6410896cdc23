"""Gives the files of a run checksums that fit whatever they hold, as somebody would who forges a run."""

import json
from contextlib import suppress
from dataclasses import asdict, replace

from safetyheads.files import canonical_json
from safetyheads.runs.directory import _FOLDERS
from safetyheads.runs.stored_files import Held, _halves, content_key, converted, with_checksums

CANNOT_FIT = (LookupError, TypeError, AttributeError, ValueError, RecursionError)
"""What is raised by content for which there is no checksum; such a file stays as it is."""


def seal(folder, changed, alone=False):
    """Give every file of a run checksums that fit, or ``alone`` the changed one; what lists others follows them."""
    with suppress(*CANNOT_FIT):
        key, held, digests = content_key(json.loads((folder / "manifest.json").read_bytes())["config"]), {}, {}
        places = [changed] if alone else sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        # Stages list the parts, and the results the stages.
        for place in sorted(places, key=lambda place: (place == "results.json", place.startswith("stages/"))):
            with suppress(*CANNOT_FIT):
                if place.split("/")[0] in _FOLDERS:
                    held[place] = _sealed_part(folder / place, key)
                elif place.endswith(".json"):
                    fields = json.loads((folder / place).read_bytes())
                    fields.pop("checksums", None)
                    if place.startswith("stages/") and place != changed:
                        fields["files"] = [[part, *held.get(part, told)] for part, *told in fields["files"]]
                    if place == "results.json" and place != changed:
                        fields["stages"] |= digests
                    (folder / place).write_text(json.dumps(with_checksums(key, place, fields)))
                    if place.startswith("stages/"):
                        digests[fields["stage"]] = content_key({"files": fields["files"]})


def _sealed_part(path, key):
    """The count and the checksum of a file of records or tensors, which is written anew with them."""
    if path.suffix == ".jsonl":
        first, _, content = path.read_bytes().partition(b"\n")
        about = replace(converted(json.loads(first), Held), run=key, count=content.count(b"\n")).with_checksum(content)
        path.write_bytes(canonical_json(asdict(about)).encode() + b"\n" + content)
    else:
        layout, data = _halves(path.read_bytes())
        first, content = layout.pop("__metadata__")["held"], canonical_json(layout).encode() + data
        about = replace(converted(json.loads(first), Held), run=key, count=len(layout)).with_checksum(content)
        head = canonical_json({"__metadata__": {"held": canonical_json(asdict(about))}, **layout}).encode()
        head += b" " * (-len(head) % 8)
        path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return about.count, about.sha256
