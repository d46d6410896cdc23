"""Ablated models inside other tools. Each module needs the extra of its tool, and imports it in functions only."""
