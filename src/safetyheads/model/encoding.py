"""From prompts to token ids that the model can read. Owns which it cannot; knows no ablations."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import TYPE_CHECKING, Any

from safetyheads.errors import InputError

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

# Characters of a prompt that an error shows.
_WORDS_SHOWN = 60


class DatedPromptWarning(UserWarning):
    """Prompts hold today's date, so that they are others tomorrow."""


def token_ids_of(engine: Engine, prompts: PromptSet) -> tuple[tuple[int, ...], ...]:
    """Token ids of each prompt under its template.

    Raises:
        InputError: a prompt is longer than the model's context, or holds a token that the model does not know.
    """
    template = engine.template_for(prompts).bound(engine.tokenizer)
    if template.note is not None:
        warnings.warn(template.note, DatedPromptWarning, stacklevel=3)
    encoded = tuple(tuple(template.encode(prompt.query)) for prompt in prompts)
    limit, size = engine.architecture.context_length, n_embedded(engine)
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        # By its words and not its number: sets are shuffled halves of files.
        start = prompt.query[:_WORDS_SHOWN] + ("..." if len(prompt.query) > _WORDS_SHOWN else "")
        if limit is not None and len(token_ids) > limit:
            raise InputError(
                f"a prompt of {prompts.name} has {len(token_ids)} tokens; the model's context is {limit}. "
                f"It begins: {start!r}"
            )
        if max(token_ids) >= size:
            raise InputError(
                f"a prompt of {prompts.name} has the token {max(token_ids)}, and the model knows {size} tokens; is the "
                f"tokenizer that of another model? It begins: {start!r}"
            )
    return encoded


def n_embedded(engine: Engine) -> int:
    """Tokens that the model has an embedding for; a tokenizer may have more of them, or fewer."""
    embedding = engine.model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])


def tokenizer_sha256(engine: Engine) -> str:
    """Of all by which a text becomes token ids: vocabulary, merges, special tokens, and the chat template.

    What a tokenizer merely remembers of its last call, truncation and padding, is left out.
    """
    tokenizer = engine.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    adds = [getattr(tokenizer, f"add_{name}_token", None) for name in ("bos", "eos")]
    facts = [rules, special, adds, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
