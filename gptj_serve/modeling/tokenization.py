"""`AutoTokenizer` and the tokenizer it loads: called as people know it, with transformers' names and results.

The service uses the plainer `gptj_serve.tokenizer.Tokenizer`. Torch is imported when tensors are asked for, not before.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal, Self

import tokenizers

from gptj_serve.errors import CheckpointError
from gptj_serve.modeling.batch_encoding import BatchEncoding, TensorType
from gptj_serve.modeling.hub import TOKENIZER_FILES, checkpoint_directory
from gptj_serve.modeling.special_tokens import SPECIAL_TOKENS, SpecialTokens
from gptj_serve.tokenizer import backend_from_directory

Side = Literal["left", "right"]
NO_LIMIT = int(1e30)
"""transformers' `model_max_length` of a tokenizer that has none."""

_STRATEGIES = ("longest_first", "only_first", "only_second")


class GPTJTokenizer(SpecialTokens):
    """GPT-J's byte-level BPE. It adds no tokens around a text; a pair is its two texts one after the other."""

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    is_fast = True

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any] | None = None) -> None:
        """`settings` are those of `tokenizer_config.json`; unknown ones have no effect but are kept."""
        super().__init__(backend, settings or {})
        backend.no_padding()
        backend.no_truncation()
        self._settings = dict(settings or {})
        self._lock = Lock()  # truncation is a setting of the backend, not of a call
        self.padding_side: Side = _side(self._settings.get("padding_side", "right"))
        self.truncation_side: Side = _side(self._settings.get("truncation_side", "right"))
        self.model_max_length = int(self._settings.get("model_max_length") or NO_LIMIT)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> Self:
        """From a directory or a repository of the hub. `settings` (`padding_side="left"`, `pad_token=…`) override its.

        Raises `CheckpointError`.
        """
        if unknown := settings.keys() - {*SPECIAL_TOKENS, "padding_side", "truncation_side", "model_max_length"}:
            raise TypeError(f"from_pretrained() does not support {', '.join(sorted(unknown))}")
        directory = checkpoint_directory(
            pretrained_model_name_or_path,
            revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            files=TOKENIZER_FILES,
        )
        stored = {
            **_read_json(directory / "special_tokens_map.json"),
            **_read_json(directory / "tokenizer_config.json"),
        }
        return cls(backend_from_directory(directory), {**stored, **settings})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads too."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend_tokenizer.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{k: v for k, v in self._settings.items() if k != "special_tokens_map_file"},
            **self._special,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_max_length": self.model_max_length,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        stride: int = 0,
        padding_side: Side | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: TensorType | None = None,
        return_token_type_ids: bool = False,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        return_overflowing_tokens: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Token ids of a text, a pair of texts, or a list of either.

        `padding`: True or "longest", "max_length". `truncation`: True or "longest_first", "only_first", "only_second".
        `max_length` defaults to `model_max_length`. With `return_overflowing_tokens`, what was cut off follows as
        further rows that overlap by `stride`, and `overflow_to_sample_mapping` says whose. Raises ValueError.
        """
        is_batch = not isinstance(text, str)
        inputs = _inputs(text, text_pair)
        encodings, samples = self._encode(inputs, add_special_tokens, truncation, max_length, stride)
        if not return_overflowing_tokens:
            first = [index for index, sample in enumerate(samples) if index == 0 or samples[index - 1] != sample]
            encodings, samples = [encodings[index] for index in first], [samples[index] for index in first]
        self._pad(encodings, padding, max_length, _side(padding_side or self.padding_side), pad_to_multiple_of)
        data: dict[str, Any] = {"input_ids": [encoding.ids for encoding in encodings]}
        if return_token_type_ids:
            data["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        if return_attention_mask:
            data["attention_mask"] = [encoding.attention_mask for encoding in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [encoding.special_tokens_mask for encoding in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [encoding.offsets for encoding in encodings]
        if return_length:
            data["length"] = [len(encoding.ids) for encoding in encodings]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = samples
        if not is_batch and return_tensors is None and not return_overflowing_tokens:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(data, encodings).convert_to_tensors(return_tensors)

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> Any:
        """The token ids alone; `options` as in a call."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(self, text: str) -> list[str]:
        return list(self.backend_tokenizer.encode(text, add_special_tokens=False).tokens)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """The text of one id, a list or a 1-D tensor; a list of texts for a list of lists or a 2-D tensor."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else [i.tolist() if hasattr(i, "tolist") else i for i in ids]
        if any(isinstance(row, list) for row in ids):
            return [self.decode(row, skip_special_tokens) for row in ids]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(sequence, skip_special_tokens) for sequence in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """An unknown token is that of `unk_token`."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(token_id)) for token_id in ids]

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @property
    def vocab_size(self) -> int:
        """Without the added tokens; `len(tokenizer)` counts them too."""
        size: int = self.backend_tokenizer.get_vocab_size(with_added_tokens=False)
        return size

    def __len__(self) -> int:
        size: int = self.backend_tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def _encode(
        self,
        inputs: list[str | tuple[str, str]],
        add_special_tokens: bool,
        truncation: bool | str | None,
        max_length: int | None,
        stride: int,
    ) -> tuple[list[tokenizers.Encoding], list[int]]:
        """All encodings, what was cut off behind each, and for each the index of its text."""
        limit = self.model_max_length if max_length is None else max_length
        strategy = "longest_first" if truncation is True else truncation or "do_not_truncate"
        if strategy not in (*_STRATEGIES, "do_not_truncate"):
            raise ValueError(f"truncation={truncation!r}: expected a bool or one of {', '.join(_STRATEGIES)}")
        with self._lock:
            if strategy in _STRATEGIES and limit < NO_LIMIT:
                self.backend_tokenizer.enable_truncation(
                    limit, stride=stride, strategy=strategy, direction=self.truncation_side
                )
            try:
                encoded = self.backend_tokenizer.encode_batch(inputs, add_special_tokens=add_special_tokens)
            except BaseException as error:
                # tokenizers raises bare Exception, and for a stride that leaves no room it panics (a BaseException).
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                raise ValueError(f"max_length={limit}, truncation={truncation!r}, stride={stride}: {error}") from error
            finally:
                self.backend_tokenizer.no_truncation()
        parts = [(part, index) for index, whole in enumerate(encoded) for part in (whole, *whole.overflowing)]
        return [part for part, _ in parts], [index for _, index in parts]

    def _pad(
        self,
        encodings: list[tokenizers.Encoding],
        padding: bool | str,
        max_length: int | None,
        side: Side,
        multiple: int | None,
    ) -> None:
        match padding:
            case False | "do_not_pad":
                return
            case True | "longest":
                length = max((len(encoding.ids) for encoding in encodings), default=0)
            case "max_length":
                length = self.model_max_length if max_length is None else max_length
                if length >= NO_LIMIT:
                    raise ValueError("padding='max_length' needs max_length: the tokenizer has no model_max_length")
            case _:
                raise ValueError(f"padding={padding!r}: expected a bool, 'longest', 'max_length' or 'do_not_pad'")
        if self.pad_token is None or self.pad_token_id is None:
            raise ValueError(
                "Asking to pad but the tokenizer does not have a padding token. Please select a token to use as "
                "`pad_token` `(tokenizer.pad_token = tokenizer.eos_token e.g.)`."
            )
        if multiple:
            length = -(-length // multiple) * multiple
        for encoding in encodings:
            encoding.pad(length, direction=side, pad_id=self.pad_token_id, pad_token=self.pad_token)


class AutoTokenizer:
    """Loads the one kind of tokenizer that GPT-J has."""

    def __init__(self) -> None:
        raise TypeError("AutoTokenizer is not made but asked: AutoTokenizer.from_pretrained(directory or hub name)")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **options: Any) -> GPTJTokenizer:
        """As `GPTJTokenizer.from_pretrained`."""
        return GPTJTokenizer.from_pretrained(pretrained_model_name_or_path, **options)


def _inputs(text: str | Sequence[str], text_pair: str | Sequence[str] | None) -> list[str | tuple[str, str]]:
    texts = [text] if isinstance(text, str) else list(text)
    if text_pair is None:
        inputs: list[str | tuple[str, str]] = [*texts]
    else:
        pairs = [text_pair] if isinstance(text_pair, str) else list(text_pair)
        if isinstance(text, str) != isinstance(text_pair, str) or len(texts) != len(pairs):
            raise ValueError(
                f"text and text_pair must be two strings or two lists as long, not {len(texts)}, {len(pairs)}"
            )
        inputs = list(zip(texts, pairs, strict=True))
    for entry in inputs:
        if not all(isinstance(part, str) for part in (entry if isinstance(entry, tuple) else [entry])):
            raise ValueError(f"text input must be a string or a list of strings, not {entry!r}")
    return inputs


def _side(side: str) -> Side:
    match side:
        case "left" | "right":
            return side
    raise ValueError(f"a side is 'left' or 'right', not {side!r}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
