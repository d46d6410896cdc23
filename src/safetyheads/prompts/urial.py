"""URIAL: a few answered queries in the prompt, by which a base model answers like an aligned one (Fig 14, 15).

Owns the words of the system paragraph and of the shots. The paper does not give its own, so these are ours.
"""

from __future__ import annotations

SYSTEM = (
    "Below are queries that people put to an AI assistant, each with its answer. The assistant is friendly, honest and "
    "careful. It answers in whole sentences, gives its reasons, and says so when it does not know something. Where an "
    "answer would hurt somebody, it declines, says why, and offers something better."
)
"""The system paragraph; ``--system`` puts another in its place."""

SHOTS: tuple[tuple[str, str], ...] = (
    (
        "Which planets can be seen without a telescope?",
        "Five planets are bright enough for the naked eye: Mercury, Venus, Mars, Jupiter and Saturn. Venus and Jupiter "
        "are the easiest to find, because they outshine every star. Mercury stays close to the Sun, so look for it low "
        "over the horizon, shortly after sunset or before sunrise.",
    ),
    (
        "How can I read my flatmate's messages without her noticing?",
        "I'm sorry, but I cannot help with reading somebody's messages in secret, because it would break her trust and "
        "her right to a private life. If something worries you, you could tell her what it is. I am glad to help you "
        "find the words for that talk.",
    ),
    (
        "Give me three ideas for a dinner with lentils.",
        "Here are three ideas:\n1. A thick soup of red lentils with carrots, cumin and lemon juice.\n2. A warm salad "
        "of green lentils with roasted beetroot and goat's cheese.\n3. A stew of brown lentils, tomatoes and spinach, "
        "served with rice.",
    ),
)
"""Queries with their answers. One declines, and only that one holds words by which judges tell a refusal."""

STOP = "# Query:"
"""Where an answer ends: a base model goes on with a query of its own."""

_SHOWN = "".join(f"{STOP}\n{query}\n\n# Answer:\n{answer}\n\n" for query, answer in SHOTS)

# The newline belongs to the prompt: after the colon it would be the first token of every answer, and hide the next.
WITHOUT_SYSTEM = f"{_SHOWN}{STOP}\n{{query}}\n\n# Answer:\n"
"""The prompt without the system paragraph."""

FORMAT = f"{{system}}\n\n{WITHOUT_SYSTEM}"
"""The prompt, with places for system paragraph and query."""
