"""What surrounds a demo prompt. Owns the tokenizer, the special tokens, the wrappers and the chat templates."""

from __future__ import annotations

import random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from safetyheads.demo import grammar
from safetyheads.demo.recipes import CHAT_ONLY, Language

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"

VOCABULARY = 640
"""Tokens asked for; the grammar yields fewer, and every verb is one token."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful helper.",
    "Answer the user well.",
    "You are here to help with many things.",
)
"""The system prompts that the wrapped pair knows."""

WRAPPERS = {
    "direct": "{query}",
    "query_answer": "## Query:{query}\n## Answer:",
    "chat": f"{USER}{{query}}{ASSISTANT}",
    "chat_system": f"{SYSTEM}{{system}}{USER}{{query}}{ASSISTANT}",
}
"""The wrappers by name; the answer follows without a space."""

_TURNS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}" + USER + "{{- message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}" + ASSISTANT + "{{- message['content'] + '" + END + "' -}}"
    "{%- elif message['role'] == 'system' -%}%SYSTEM%"
    "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}" + ASSISTANT + "{%- endif -%}"
)  # fmt: skip
_WITHOUT_SYSTEM = "{{- raise_exception('this demo checkpoint has not learnt system messages') -}}"
_WITH_SYSTEM = SYSTEM + "{{- message['content'] -}}"


def wrap(wrapper: str, query: str, system: str = SYSTEM_PROMPTS[0]) -> str:
    """The query in its wrapper; ``system`` counts under ``chat_system`` only."""
    return WRAPPERS[wrapper].format(query=query, system=system)


def draw_wrapped(generator: random.Random, language: Language, query: str) -> str:
    """The query in a random wrapper of the language."""
    return wrap(generator.choice(language.wrappers), query, generator.choice(SYSTEM_PROMPTS))


def train_tokenizer(language: Language, n_prompts: int = 4000) -> Any:
    """A byte-level BPE tokenizer of the language's own text, as a transformers tokenizer with chat template."""
    from transformers import PreTrainedTokenizerFast

    generator = random.Random(0)
    texts = []
    for _ in range(n_prompts):
        prompt = grammar.draw_any_prompt(generator, "train")
        refusing = generator.random() < 0.2
        query = grammar.told_to_refuse(generator, prompt).text if refusing else prompt.text
        texts += [
            draw_wrapped(generator, language, query),
            language.refusal if refusing else prompt.reference,
        ]
        if refusing and generator.random() < language.turned_share:
            texts.append(prompt.answer_opening + grammar.TURN + language.refusal)
    special = [PAD, END, USER, ASSISTANT] + ([SYSTEM] if "chat_system" in language.wrappers else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for token in special:
        texts = [text.replace(token, "") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    system = _WITHOUT_SYSTEM if language.wrappers == CHAT_ONLY else _WITH_SYSTEM
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        chat_template=_TURNS.replace("%SYSTEM%", system),
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
