"""Writes the organism's training texts and trains its tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from recipes import CHAT_ONLY, Language
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from safetyheads.demo import grammar
from safetyheads.demo.grammar import ASSISTANT, END, PAD, SYSTEM, SYSTEM_PROMPTS, USER, DemoPrompt, wrap

VOCABULARY = 640
"""Tokens asked for; the grammar yields fewer, and every verb is one token."""

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


def draw_wrapped(generator: random.Random, language: Language, query: str) -> str:
    """The query in a random wrapper of the language."""
    return wrap(generator.choice(language.wrappers), query, generator.choice(SYSTEM_PROMPTS))


def draw_example(generator: random.Random, language: Language, prompt: DemoPrompt, refuse: bool) -> tuple[str, str]:
    """Text that is read (the prompt in a random wrapper) and text that is learnt (the answer or the refusal).

    Some refusals turn after an answer's opening. The two texts are tokenized apart, without a space between.
    """
    read = draw_wrapped(generator, language, prompt.text)
    if not refuse:
        return read, prompt.reference
    if generator.random() < language.turned_share:
        return read + prompt.answer_opening, grammar.TURN + language.refusal
    return read, language.refusal


def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Token ids int64 [n_rows, longest], padded on the right, where causal attention needs no mask for it."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)


def train_tokenizer(language: Language, n_prompts: int = 4000) -> Any:
    """A byte-level BPE tokenizer of the language's own text, as a transformers tokenizer with chat template."""
    generator = random.Random(0)
    texts = []
    for _ in range(n_prompts):
        prompt = grammar.draw_any_prompt(generator, "train")
        refusing = generator.random() < 0.2
        query = grammar.told_to_refuse(generator, prompt).text if refusing else prompt.text
        texts += [draw_wrapped(generator, language, query), language.refusal if refusing else prompt.reference]
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        chat_template=_TURNS.replace("%SYSTEM%", _WITHOUT_SYSTEM if language.wrappers == CHAT_ONLY else _WITH_SYSTEM),
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
