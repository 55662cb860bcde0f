"""Options that are several numbers: `--rates 0.05,0.1`."""

import math
from collections.abc import Callable
from typing import TypeVar

import typer

Number = TypeVar("Number", int, float)


def positive_numbers(option: str, text: str, number: Callable[[str], Number]) -> list[Number]:
    """Raises `typer.BadParameter`, naming the option and the part that is none."""
    found = []
    for part in text.split(","):
        try:
            value = number(part)
        except ValueError:
            value = number("0")
        if not 0 < value < math.inf:
            kind = "whole number" if number is int else "number"
            raise typer.BadParameter(f"{part!r} is no {kind} above 0", param_hint=option)
        found.append(value)
    return found
