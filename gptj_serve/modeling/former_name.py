"""The cache's former name: `cache` was `past_key_values` in transformers before 5.24.

Arguments, keys and attributes go by that name too, as in transformers until 5.40. As there, a `FutureWarning` tells of
it in a call, the log of it in an output.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

FORMER_NAME = "past_key_values"

P = ParamSpec("P")
R = TypeVar("R")


def takes_former_name(forward: Callable[P, R]) -> Callable[P, R]:
    """A `forward` that takes its `cache` by the former name too. If both are passed, `cache` counts."""

    @functools.wraps(forward)
    def taking(*args: P.args, **kwargs: P.kwargs) -> R:
        if FORMER_NAME in kwargs:
            former = kwargs.pop(FORMER_NAME)
            told = f"`{FORMER_NAME}` is deprecated. Use `cache` instead."
            if "cache" in kwargs:
                told = (
                    f"Both `{FORMER_NAME}` and `cache` are set. Using `cache` and ignoring deprecated `{FORMER_NAME}`."
                )
            else:
                kwargs["cache"] = former
            if not torch.compiler.is_compiling():
                warnings.warn(told, FutureWarning, stacklevel=2)
        return forward(*args, **kwargs)

    return taking


def made_by_former_name(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` of an output that takes its `cache` by the former name too. It raises `ValueError` for both."""

    @functools.wraps(init)
    def taking(*args: Any, **kwargs: Any) -> None:
        if FORMER_NAME in kwargs and "cache" in kwargs:
            raise ValueError(f"You cannot specify both `cache` and `{FORMER_NAME}`. use `cache` only.")
        init(*args, **{renamed(key): value for key, value in kwargs.items()})

    return taking


def renamed(key: str) -> str:
    """What an output's key is now. The log tells of the first former one that is asked for."""
    if key != FORMER_NAME:
        return key
    if not torch.compiler.is_compiling():
        _log_once()
    return "cache"


@functools.cache
def _log_once() -> None:
    logger.warning("`%s` is deprecated. Use `cache` instead.", FORMER_NAME)
