"""`GPTJConfig`: a model's shape and its classes' behaviour, from a Hugging Face `config.json` or built by hand.

The one config class of the package: the service reads it, the model classes take and save it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from gptj_serve.errors import ConfigError

Activation = Literal[
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh"
]  # fmt: skip
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]

CONFIG_FILE = "config.json"
_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "torch_dtype": "dtype",
}
_INERT: dict[str, Any] = {"chunk_size_feed_forward": 0, "is_encoder_decoder": False, "model_type": "gptj"}
"""Parameters of transformers' GPTJConfig that a GPT-J can't follow: taken at this value, refused at any other."""


def _alias(name: str) -> Any:
    def read(self: "GPTJConfig") -> Any:
        return getattr(self, name)

    return property(read, doc=f"The same as `{name}`.")


class GPTJConfig(BaseModel):
    """transformers' GPTJConfig: its parameters, names, aliases and defaults; a value that can't work is refused.

    Built by hand (`GPTJConfig(n_layer=2, num_labels=3)`) an unknown parameter is refused too. Read from a file, the
    keys without an effect (`rotary`, `n_ctx`, `scale_attn_weights`, `summary_*`, …), which have none in transformers'
    GPT-J either, are dropped. Assignment is checked like construction; a model reads its sizes when it is built.
    Bad values raise `ConfigError` when read from a file or dictionary, pydantic's ValidationError (a ValueError) else.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    vocab_size: PositiveInt = 50400
    n_positions: PositiveInt = 2048
    n_embd: PositiveInt = 4096
    n_layer: PositiveInt = 28
    n_head: PositiveInt = 16
    rotary_dim: PositiveInt | None = 64
    n_inner: PositiveInt | None = None
    activation_function: Activation = "gelu_new"
    resid_pdrop: float = Field(default=0.0, ge=0, le=1)
    embd_pdrop: float = Field(default=0.0, ge=0, le=1)
    attn_pdrop: float = Field(default=0.0, ge=0, le=1)
    layer_norm_epsilon: float = Field(default=1e-5, gt=0)
    initializer_range: NonNegativeFloat = 0.02
    use_cache: bool = True
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: NonNegativeInt | None = 50256
    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = 50256
    pad_token_id: NonNegativeInt | None = None
    id2label: dict[int, str] = {0: "LABEL_0", 1: "LABEL_1"}
    label2id: dict[str, int] = {"LABEL_0": 0, "LABEL_1": 1}
    problem_type: ProblemType | None = None
    architectures: list[str] | None = None
    dtype: Dtype | None = None  # of the saved weights

    if TYPE_CHECKING:  # the fields above, `num_labels` and the aliases

        def __init__(self, **values: Any) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _canonical(cls, values: Any) -> Any:
        """Resolve aliases and `num_labels`, check the parameters without an effect."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for alias, name in _ALIASES.items():
            if alias in values:
                values.setdefault(name, values[alias])
                del values[alias]
        for name, inert in _INERT.items():
            if name in values and (value := values.pop(name)) != inert:
                raise ValueError(f"{name}={value!r} has no meaning for GPT-J (only {inert!r} is taken)")
        if "dtype" in values and values["dtype"] is not None:
            values["dtype"] = str(values["dtype"]).removeprefix("torch.")
        _resolve_labels(values)
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.rotated_dim % 2 or self.rotated_dim > self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}")
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label must number its labels from 0 without gaps, not {sorted(self.id2label)}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("problem_type='single_label_classification' needs num_labels > 1")
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.copy()
        try:
            super().__setattr__(_ALIASES.get(name, name), value)
        except ValidationError:  # pydantic leaves a value that only `_fits_together` refuses in place
            self.__dict__.update(before)
            raise

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
        """Check a parsed `config.json`, dropping unknown keys; `source` goes into the error message."""
        known = {*cls.model_fields, *_ALIASES, "num_labels"}
        try:
            return cls.model_validate({key: value for key, value in raw.items() if key in known})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            value = f"{where}={first['input']!r}: " if where else ""
            hint = f" (known: {', '.join(get_args(Activation))})" if where == "activation_function" else ""
            raise ConfigError(f"{source}: {value}{first['msg']}{hint}") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> Self:
        """The `config.json` of a checkpoint directory (or that file itself), with parameters changed."""
        path = Path(directory).expanduser()
        return cls.from_file(path if path.suffix == ".json" else path / CONFIG_FILE).changed(**changes)

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, checked as a whole. Raises pydantic's ValidationError."""
        values: dict[str, Any] = {**self.model_dump(), **changes}
        if "num_labels" in changes and "id2label" not in changes and changes["num_labels"] == self.num_labels:
            del values["num_labels"]
        elif "num_labels" in changes or "id2label" in changes:
            values = {k: v for k, v in values.items() if k in changes or k not in ("id2label", "label2id")}
        for alias, name in _ALIASES.items():
            if alias in changes:
                values[name] = values.pop(alias)
        return type(self)(**values)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {**self.model_dump(), "model_type": "gptj"}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / CONFIG_FILE).write_text(self.to_json_string(), encoding="utf-8")

    max_position_embeddings: ClassVar[Any] = _alias("n_positions")
    hidden_size: ClassVar[Any] = _alias("n_embd")
    num_attention_heads: ClassVar[Any] = _alias("n_head")
    num_hidden_layers: ClassVar[Any] = _alias("n_layer")

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

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if num_labels != self.num_labels:
            self.id2label = {index: f"LABEL_{index}" for index in range(num_labels)}
            self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def eos_token_ids(self) -> frozenset[int]:
        if self.eos_token_id is None:
            return frozenset()
        return frozenset(self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id])


def _resolve_labels(values: dict[str, Any]) -> None:
    """From whichever of `num_labels`, `id2label` and `label2id` are given, the latter two."""
    num_labels = values.pop("num_labels", None)
    if values.get("id2label") is None:
        values.pop("id2label", None)
        if num_labels is not None:
            if not isinstance(num_labels, int) or num_labels < 1:
                raise ValueError(f"num_labels={num_labels!r} must be a whole number from 1 on")
            values["id2label"] = {index: f"LABEL_{index}" for index in range(num_labels)}
            values.pop("label2id", None)
        elif isinstance(values.get("label2id"), dict):
            values["id2label"] = {index: label for label, index in values["label2id"].items()}
    id2label = values.get("id2label")
    if not isinstance(id2label, dict):
        return
    if num_labels is not None and num_labels != len(id2label):
        raise ValueError(f"num_labels={num_labels!r} but id2label has {len(id2label)} labels")
    if values.get("label2id") is None:
        values["label2id"] = {label: index for index, label in id2label.items()}
