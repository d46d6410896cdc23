"""The model hub. Owns telling at once, and in one line, that something is not there."""

from __future__ import annotations

from safetyheads.errors import InputError

_KNOWN_BY = ("config.json", "adapter_config.json")
"""A model's file, or an adapter's, that in the cache makes asking needless."""
_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""


def look_at_hub(name: str) -> None:
    """Refuse at once what is neither a directory nor on the hub: left alone, transformers retries for half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    # The base class of a refused connection: the HTTP client, and with it the name, differs between versions.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _KNOWN_BY):
            return
        HfApi().model_info(name, timeout=_TIMEOUT)
    except HFValidationError:
        raise InputError(f"{name!r} is neither a directory nor a hub id") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name}: no such directory, and no such model on the hub that you may read") from None
    except HfHubHTTPError as error:
        raise InputError(f"{name}: no such directory, and the hub answers: {first_line(error)}") from error
    except (client_error, OSError) as error:
        raise InputError(f"{name}: no such directory, and the hub cannot be reached ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All that an error says, in one line, and of what kind it is where that is no kind of ours or transformers'."""
    said = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {said}" if type(error).__module__ == "builtins" and said else said or kind
