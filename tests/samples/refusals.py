"""Reads of odd values: whatever they refuse, they refuse in one line."""

from safetyheads.errors import InputError


def refused_in_one_line_if_at_all(*reads):
    for read in reads:
        said = ""
        try:
            read()
        except InputError as error:
            said = str(error)
        assert "\n" not in said
