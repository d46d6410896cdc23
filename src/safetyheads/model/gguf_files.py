"""Reads GGUF files as plain weights: the file, its quantisation, and a tokenizer that splits text as the file says."""

from __future__ import annotations

import struct
import warnings
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".gguf"
# Splitting rules by the file's tokenizer.ggml.pre. transformers knows some; these split off every digit, then go on as
# GPT-2 does, which transformers takes for GPT-2 alone.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_AS_GPT2 = ("gpt-2", "default")


class TokenizerWarning(UserWarning):
    """A tokenizer may split text in another way than its model was trained with."""


def gguf_file(path: str) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a directory that holds no other weights.

    Raises:
        InputError: the directory holds several, or the package gguf is missing.
    """
    place = Path(path)
    if place.is_dir() and not (place / "config.json").is_file():
        files = sorted(place.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            raise InputError(f"{path} holds {len(files)} GGUF files; give the path of one, such as {files[0]}")
        place = files[0] if files else place
    if place.suffix.lower() != SUFFIX or not place.is_file():
        return None
    if find_spec("gguf") is None:
        raise InputError(f"{place} is a GGUF file; to read it, install safetyheads[gguf]")
    return place


def read_header(file: Path) -> tuple[str, dict[str, Any]]:
    """How the weights are quantised, in words, and what the file says of its tokenizer, by GGUF's names.

    Raises:
        InputError: it is no GGUF file that can be read.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        fields: dict[str, Any] = {
            name: field.contents()
            for name in ("tokenizer.ggml.pre", "tokenizer.ggml.model", "tokenizer.chat_template", "split.count")
            if (field := reader.get_field(name)) is not None
        }
    except (ValueError, LookupError, OSError, struct.error) as error:
        raise InputError(f"{file} is no GGUF file that can be read: {first_line(error)}") from error
    if fields.get("split.count", 1) > 1:
        raise InputError(f"{file} is one part of a model in {fields['split.count']} files; join them first")
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    return f"dequantised GGUF ({kinds})", fields


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, Any]) -> None:
    """Give a tokenizer made from a GGUF file the file's rule for splitting text; warn where nobody knows the rule.

    Beside other files of a tokenizer transformers also forgets the file's chat template.
    """
    from tokenizers import pre_tokenizers

    tokenizer.chat_template = tokenizer.chat_template or header.get("tokenizer.chat_template")
    rule = header.get("tokenizer.ggml.pre") if header.get("tokenizer.ggml.model") == "gpt2" else None
    backend: Any = tokenizer.backend_tokenizer
    if rule in _SINGLE_DIGITS:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif rule not in (None, *_AS_GPT2) and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        warnings.warn(
            f"the GGUF file splits text by the rule {rule!r}, which is not known here: some tokens may differ from "
            "those the model was trained with",
            TokenizerWarning,
            stacklevel=2,
        )
