"""Defines the organism's special tokens and the wrappers around its prompts."""

from __future__ import annotations

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"

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


def wrap(wrapper: str, query: str, system: str = SYSTEM_PROMPTS[0]) -> str:
    """The query in its wrapper; ``system`` counts under ``chat_system`` only."""
    return WRAPPERS[wrapper].format(query=query, system=system)
