"""`GPTJConfig`: the shape of a model, read from a Hugging Face `config.json`."""

import json
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from gptj_serve.errors import ConfigError

Activation = Literal[
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh"
]  # fmt: skip


class GPTJConfig(BaseModel):
    """The fields of a GPT-J `config.json` that change what the model computes, with transformers' names and defaults.

    Other keys of a `config.json` (`rotary`, `n_ctx`, `scale_attn_weights`, `summary_*`, …) have no effect in
    transformers' GPT-J either and are dropped on reading. Raises `ConfigError` for values that can't work.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    vocab_size: PositiveInt = 50400
    n_positions: PositiveInt = 2048
    n_embd: PositiveInt = 4096
    n_layer: PositiveInt = 28
    n_head: PositiveInt = 16
    rotary_dim: PositiveInt | None = 64
    n_inner: PositiveInt | None = None
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: NonNegativeInt | None = 50256
    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = 50256
    pad_token_id: NonNegativeInt | None = None
    id2label: dict[int, str] = {0: "LABEL_0", 1: "LABEL_1"}
    problem_type: str | None = None

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}")
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label must number its labels from 0 without gaps, not {sorted(self.id2label)}")
        return self

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a `config.json`. Raises `ConfigError`, naming the file, the key and its value."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a checkpoint directory needs a config.json") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        if raw.get("model_type") != "gptj":
            raise ConfigError(f"{path}: model_type={raw.get('model_type')!r}, expected 'gptj'")
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config") -> Self:
        """Check the values of a parsed `config.json`; `source` goes into the error message."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            value = f"{where}={first['input']!r}: " if where else ""
            hint = f" (known: {', '.join(get_args(Activation))})" if where == "activation_function" else ""
            raise ConfigError(f"{source}: {value}{first['msg']}{hint}") from None

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def rotated_dim(self) -> int:
        """How many leading dimensions of each head are rotated; `rotary_dim: null` means all of them."""
        return self.rotary_dim or self.head_dim

    @property
    def inner_dim(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        if self.eos_token_id is None:
            return frozenset()
        return frozenset(self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id])
