"""Other methods that undo refusals, for comparison: they name heads, prune or edit weights, or steer activations.

Each is a :class:`safetyheads.baselines.base.Method`; :mod:`safetyheads.baselines.catalogue` lists them.
"""
