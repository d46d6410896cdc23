"""The errors users see. Owns their two meanings; knows nothing of where they are raised or printed."""


class SafetyheadsError(Exception):
    """Something failed for a reason that one line can tell; the command line exits with 1."""


class InputError(SafetyheadsError, ValueError):
    """What the user gave cannot be used; the command line prints the line and exits with 2."""


class UnsupportedModelError(InputError):
    """A checkpoint on which the method would not be exact; the message names the reason."""
