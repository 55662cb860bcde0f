"""`StopStrings`: whether a token completes one; the meaning is that of transformers' `StopStringCriteria`."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    def decode(self, token_ids: list[int]) -> str: ...


_UNFINISHED = "\ufffd"
"""What tokens that end in the middle of a character decode to."""


class StopStrings:
    def __init__(self, stop_strings: Sequence[str], tokenizer: Decoder) -> None:
        self._stop_strings = stop_strings
        self._tokenizer = tokenizer
        self._num_tokens = max(len(stop.encode()) for stop in stop_strings) + 1  # none of them stands for no byte

    def are_completed_by_last(self, token_ids: Sequence[int]) -> bool:
        """A stop string ends in the text of the last token, wherever in it; where it begins does not matter.

        So it may begin in the prompt, and one that the prompt holds as a whole is no end.
        """
        tail = list(token_ids[-self._num_tokens :])
        text = self._tokenizer.decode(tail)
        num_before = len(self._tokenizer.decode(tail[:-1]).rstrip(_UNFINISHED)) if len(tail) > 1 else 0
        return any(text.find(stop, max(0, num_before - len(stop) + 1)) >= 0 for stop in self._stop_strings)
