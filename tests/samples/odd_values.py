"""Values that fit nowhere, and the places in JSON where one may stand."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck))
"""Of tests whose examples load models or run commands."""
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 64, 10**9, 10**30, -0.5, 1e308, float("nan"), "", " ", "\x1b[31m", "a" * 300]),
    st.sampled_from(["0-0", "\ud800", [], {}, [None], ["x"], [[1], 2], {"n": "x"}]),
    st.integers(1, 700).map(lambda levels: json.loads("[" * levels + "]" * levels)),
)
"""JSON of every type: numbers beyond any size, control characters, half a surrogate pair, deep nesting."""
LOST = "lost"
"""Instead of a value: nothing stands in the place any more."""


def places_of(fields, place=()):
    """Every place in JSON, as keys and indices."""
    yield place
    below = fields.items() if isinstance(fields, dict) else enumerate(fields) if isinstance(fields, list) else ()
    for key, value in below:
        yield from places_of(value, (*place, key))


def with_value(fields, place, value):
    """JSON with another value in a place, or without it where the value is LOST."""
    if not place:
        return value
    changed = json.loads(json.dumps(fields))
    part = changed
    for key in place[:-1]:
        part = part[key]
    if value is LOST:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return changed
