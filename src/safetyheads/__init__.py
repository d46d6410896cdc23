"""Attention heads a language model's refusals depend on."""
