"""`BatchEncoding`: what a tokenizer returns: a dictionary with attributes, and each text's encoding behind it."""

from collections import UserDict
from collections.abc import Sequence
from typing import Any, Literal, Self

import tokenizers

TensorType = Literal["pt", "np"]


class BatchEncoding(UserDict[str, Any]):
    """`inputs["input_ids"]`, `inputs.input_ids`, `model(**inputs)`; `inputs[0]` is the first text's encoding."""

    def __init__(self, data: dict[str, Any], encodings: Sequence[tokenizers.Encoding]) -> None:
        super().__init__(data)
        self.encodings = list(encodings)

    def __getitem__(self, key: Any) -> Any:
        return self.data[key] if isinstance(key, str) else self.encodings[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """Move the tensors, in place, and return itself."""
        self.data = {
            k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in self.data.items()
        }
        return self

    def convert_to_tensors(self, tensor_type: TensorType | None) -> Self:
        """Make tensors of the lists, in place. Raises ValueError if their lengths differ."""
        if tensor_type is not None:
            self.data = {key: _tensor(key, value, tensor_type) for key, value in self.data.items()}
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        return list(self.encodings[batch_index].tokens)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Which word each token belongs to; None for padding."""
        return list(self.encodings[batch_index].word_ids)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 for tokens of the first text of a pair, 1 for those of the second, None for padding."""
        return list(self.encodings[batch_index].sequence_ids)

    def char_to_token(self, batch_index: int, char_index: int, sequence_index: int = 0) -> int | None:
        """The token that holds a character of the text, or None."""
        place: int | None = self.encodings[batch_index].char_to_token(char_index, sequence_index)
        return place


def _tensor(name: str, value: Any, tensor_type: TensorType) -> Any:
    if tensor_type not in ("pt", "np"):
        raise ValueError(f"return_tensors={tensor_type!r}: expected 'pt' or 'np'")
    try:
        if tensor_type == "np":
            import numpy

            return numpy.array(value, dtype=numpy.int64)
        import torch

        return torch.tensor(value, dtype=torch.long)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Unable to create tensor of {name}: the texts have different numbers of tokens; you should probably "
            "activate truncation and/or padding with 'padding=True' 'truncation=True'"
        ) from error
