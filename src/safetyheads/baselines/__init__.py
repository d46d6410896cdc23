"""What a found group is held against: other methods that name heads, prune or edit weights, or steer activations.

Each is a :class:`safetyheads.baselines.base.Method` of one signature; :mod:`safetyheads.baselines.table` lists them.
"""
