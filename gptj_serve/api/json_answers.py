"""Answers that may be large, as JSON."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

NUM_ITEMS_PER_PIECE = 32
"""A piece of a list: the encoder lets no other thread run, the event loop's neither, until it is done with one."""


def encode_answer(answer: Mapping[str, Any] | Iterable[object]) -> bytes:
    """Lists, also those that are a mapping's values, are taken and encoded piece by piece."""
    if isinstance(answer, Mapping):
        fields = {
            name: msgspec.Raw(encode_answer(value)) if isinstance(value, list) else value
            for name, value in answer.items()
        }
        return msgspec.json.encode(fields)
    items = iter(answer)
    pieces = []
    while piece := list(itertools.islice(items, NUM_ITEMS_PER_PIECE)):
        pieces.append(msgspec.json.encode(piece)[1:-1])
    return b"[" + b",".join(pieces) + b"]"
