"""Text to tokens and back: the tokenizer, text that streams in whole characters, stop strings that span tokens."""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from gptj_serve.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"


class Encoding(NamedTuple):
    """Token ids and, for each, the half-open span of characters it covers in the encoded string."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]


class Tokenizer:
    """GPT-J's byte-level BPE, from a checkpoint's directory. Nothing is added around the text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_bytes = _token_bytes(backend)
        self.max_token_bytes = max(map(len, self._token_bytes))

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """Raises `CheckpointError` if there is no tokenizer, or one that is damaged or not a byte-level BPE."""
        return cls(backend_from_directory(directory))

    @property
    def num_token_ids(self) -> int:
        """One more than the highest id that stands for a token; a model may have more logits than that."""
        return len(self._token_bytes)

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """In a thread, this holds up no other: of the backend's methods only those for batches release the GIL."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> Encoding:
        """Holds up no other thread either."""
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        return Encoding(encoding.ids, encoding.offsets, encoding.word_ids)

    def token_string(self, token_id: int) -> str:
        """As it is written in the vocabulary, in GPT-2's byte alphabet; nothing for an id without a token."""
        return self._backend.id_to_token(token_id) or ""

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of whole tokens; bytes that are no UTF-8 become U+FFFD, ids without a token become nothing."""
        return b"".join(self.token_bytes(i, skip_special_tokens) for i in token_ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        if token_id >= len(self._token_bytes) or (skip_special_tokens and token_id in self.special_token_ids):
            return b""
        return self._token_bytes[token_id]


class IncrementalDetokenizer:
    """Turns tokens into text as they come, releasing only whole characters.

    The pieces of `push` and `flush`, joined, are `Tokenizer.decode` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special_tokens))

    def flush(self) -> str:
        """What an unfinished character leaves at the end: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


class StopStringScanner:
    """Watches streamed text for stop strings and holds back what may become one.

    The one that is complete first counts (of several, the longest), so it does not matter how the text is cut.
    """

    def __init__(self, stop_strings: Iterable[str], *, include_in_output: bool) -> None:
        self._stop_strings = tuple(stop_strings)
        self._include_in_output = include_in_output
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what can be released. Once `stopped_by` is set the output is complete."""
        if self.stopped_by is not None or not self._stop_strings:
            return "" if self.stopped_by is not None else text
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stop_strings]
        position, stop = min(
            (f for f in found if f[0] >= 0), default=(-1, None), key=lambda f: (f[0] + len(f[1]), f[0])
        )
        if stop is not None:
            self.stopped_by = stop
            released = self._held[: position + len(stop) if self._include_in_output else position]
            self._held = ""
            return released
        keep = max(_longest_prefix_at_end(self._held, stop) for stop in self._stop_strings)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def flush(self) -> str:
        """At the end of the sequence: what was held back and became no stop string."""
        released, self._held = self._held, ""
        return released


def backend_from_directory(directory: Path) -> tokenizers.Tokenizer:
    """From `tokenizer.json`, or if there is none the same from `vocab.json`, `merges.txt` and `added_tokens.json`.

    Raises `CheckpointError` if what is there is incomplete, damaged or not a byte-level BPE.
    """
    file = directory / "tokenizer.json"
    if not file.exists() and (directory / "vocab.json").exists():
        return _backend_from_vocabulary(directory)
    try:
        text = file.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        decoder = json.loads(text).get("decoder") or {}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
    if decoder.get("type") != "ByteLevel":
        raise CheckpointError(f"{file}: decoder {decoder.get('type')!r}, but GPT-J's tokenizer is ByteLevel")
    return backend


def _backend_from_vocabulary(directory: Path) -> tokenizers.Tokenizer:
    """The files of the slow GPT-2 tokenizer, with one special token as in GPT-J's tokenizer.json."""
    vocabulary, merges, added = (directory / name for name in ("vocab.json", "merges.txt", "added_tokens.json"))
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{vocabulary}, {merges.name}: not a vocabulary with its merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=True)])
    try:
        ids: dict[str, int] = json.loads(added.read_text(encoding="utf-8")) if added.exists() else {}
        in_order = sorted(ids.items(), key=lambda item: item[1])
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{added}: not a mapping of tokens to ids: {error}") from error
    for token, token_id in in_order:
        is_special = token == END_OF_TEXT
        backend.add_tokens([tokenizers.AddedToken(token, special=is_special, normalized=True)])
        if backend.token_to_id(token) != token_id:
            raise CheckpointError(f"{added}: {token!r} is {token_id}, but its turn is {backend.token_to_id(token)}")
    return backend


def _longest_prefix_at_end(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _token_bytes(backend: tokenizers.Tokenizer) -> list[bytes]:
    """Each token's bytes, by id. Ids without a token have none."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    byte_of_character = _byte_of_character()
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        try:
            result[token_id] = bytes(byte_of_character[character] for character in token)
        except KeyError:  # an added token with characters outside the byte alphabet stands for itself
            result[token_id] = token.encode("utf-8")
    return result


def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
