"""`SpecialTokens`: a tokenizer's bos, eos, unk and pad token, as text and as id, each of which can be set."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tokenizers

from gptj_serve.tokenizer import END_OF_TEXT

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class SpecialTokens:
    """All are `<|endoftext|>` by default, but the pad token, which GPT-J lacks: None."""

    if TYPE_CHECKING:
        bos_token: str | None
        bos_token_id: int | None
        eos_token: str | None
        eos_token_id: int | None
        unk_token: str | None
        unk_token_id: int | None
        pad_token: str | None
        pad_token_id: int | None

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        self.backend_tokenizer = backend
        self._special: dict[str, str | None] = {}
        has_end = backend.token_to_id(END_OF_TEXT) is not None
        for name in SPECIAL_TOKENS:
            token = settings.get(name, END_OF_TEXT if has_end and name != "pad_token" else None)
            self._set_special(name, token["content"] if isinstance(token, dict) else token)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(token for token in self._special.values() if token is not None))

    @property
    def all_special_ids(self) -> list[int]:
        ids = [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]
        return [token_id for token_id in ids if token_id is not None]

    def _set_special(self, name: str, token: str | None) -> None:
        if token is not None and self.backend_tokenizer.token_to_id(token) is None:
            raise ValueError(f"{name}={token!r} is not in the vocabulary")
        self._special[name] = token

    def _special_id(self, name: str) -> int | None:
        token = self._special[name]
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def __getattr__(self, name: str) -> Any:
        """`eos_token`, `eos_token_id` and so on, for bos, eos, unk and pad."""
        if name in SPECIAL_TOKENS:
            return self._special[name]
        if name.endswith("_id") and name.removesuffix("_id") in SPECIAL_TOKENS:
            return self._special_id(name.removesuffix("_id"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Special tokens can be set to any token of the vocabulary, or to None, by text or by id."""
        if name.endswith("_id") and name.removesuffix("_id") in SPECIAL_TOKENS:
            token = None if value is None else self.backend_tokenizer.id_to_token(value)
            if value is not None and token is None:
                raise ValueError(f"{name}={value!r} is not in the vocabulary")
            self._set_special(name.removesuffix("_id"), token)
        elif name in SPECIAL_TOKENS:
            self._set_special(name, value)
        else:
            super().__setattr__(name, value)
