"""What lm-eval does to the process around it, undone. Owns silence, seeds and staying offline; runs no task."""

from __future__ import annotations

import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

_DRAWING = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
"""Modules that draw bars of their own."""
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer."""


@contextmanager
def quiet() -> Iterator[None]:
    """No logs below errors, no warnings, no bars, and nothing on stdout, which is for results."""
    import datasets

    disabled, had_bars = logging.root.manager.disable, not datasets.are_progress_bars_disabled()
    logging.disable(max(logging.WARNING, disabled))
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators begin at ``seed`` and are as they were after."""
    import numpy as np
    import torch

    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """The hub is not asked, where so wanted; whatever was set before holds again after."""
    if not wanted:
        yield
        return
    import datasets.config
    import huggingface_hub.constants

    # Both libraries read the environment once, when they are imported; processes that they start read it again.
    places = [(huggingface_hub.constants, _OFFLINE[0]), *((datasets.config, name) for name in _OFFLINE)]
    values = [getattr(module, name) for module, name in places]
    environment = {name: os.environ.get(name) for name in _OFFLINE}
    for module, name in places:
        setattr(module, name, True)
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    try:
        yield
    finally:
        for (module, name), value in zip(places, values, strict=True):
            setattr(module, name, value)
        for name, before in environment.items():
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def hub_answers() -> bool:
    """Whether the hub can be reached now, and may be."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return False
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except (client_error, OSError):
        return False
    return True


@contextmanager
def _without_bars() -> Iterator[None]:
    drawing = [module for name in _DRAWING if hasattr(module := sys.modules.get(name), "tqdm")]
    bars = [module.tqdm for module in drawing]  # type: ignore[union-attr]
    try:
        for module, bar in zip(drawing, bars, strict=True):
            module.tqdm = _hidden(bar)  # type: ignore[union-attr]
        yield
    finally:
        for module, bar in zip(drawing, bars, strict=True):
            module.tqdm = bar  # type: ignore[union-attr]


def _hidden(bar: Callable[..., Any]) -> Callable[..., Any]:
    def hidden(*given: Any, **named: Any) -> Any:
        return bar(*given, **{**named, "disable": True})

    return hidden
