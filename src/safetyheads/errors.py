"""The errors that users see."""


class SafetyheadsError(Exception):
    """Something failed, and one line says why; the command line exits with 1."""


class InputError(SafetyheadsError, ValueError):
    """The input cannot be used; the command line prints the line and exits with 2."""


class UnsupportedModelError(InputError):
    """The method would not be exact on this checkpoint; the message says why."""
