"""`GenerationConfig`: what `generate` can be told; names, meanings and defaults are transformers'."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from gptj_serve.errors import ConfigError, InvalidOptionError
from gptj_serve.model.config import GPTJConfig
from gptj_serve.modeling.hub import checkpoint_directory
from gptj_serve.modeling.unsupported_options import without_inert
from gptj_serve.types import MAX_BEAMS, MAX_DRAFT_TOKENS

GENERATION_CONFIG_FILE = "generation_config.json"

_NO_OPTIONS = ("transformers_version", "_from_model_config", "_commit_hash")
"""What transformers writes into the file about the file."""


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _pairs(value: Any) -> Any:
    """{(id, …): bias} as [([id, …], bias)]."""
    return [(list(ids), bias) for ids, bias in value.items()] if isinstance(value, dict) else value


def as_list(value: Any) -> list[Any]:
    """Of what may be one, several or None."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = Annotated[list[NonNegativeInt], BeforeValidator(_plain)]
OneOrMore = Annotated[NonNegativeInt | Annotated[list[NonNegativeInt], Field(min_length=1)], BeforeValidator(_plain)]
Tokens = Annotated[list[NonNegativeInt], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class GenerationConfig(BaseModel):
    """What is None is unset: then the model's own config counts, or else transformers' default.

    Raises a ValueError that names the option for values out of bounds, unknown options, and those of transformers that
    nothing here follows. `seed`, `presence_penalty`, `frequency_penalty` and `logit_bias` are vLLM's.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    max_new_tokens: PositiveInt | None = None
    max_length: PositiveInt | None = None  # prompt and padding included; default: 20 new tokens
    min_new_tokens: NonNegativeInt | None = None
    min_length: NonNegativeInt | None = None
    max_time: Annotated[Finite, Field(ge=0)] | None = None  # seconds
    stop_strings: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    forced_bos_token_id: NonNegativeInt | None = None
    forced_eos_token_id: OneOrMore | None = None
    exponential_decay_length_penalty: tuple[NonNegativeInt, Annotated[Finite, Field(gt=0)]] | None = None

    do_sample: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # default: drawn from torch's global generator
    temperature: Annotated[Finite, Field(gt=0)] | None = None
    top_k: NonNegativeInt | None = None  # default: 50, or what the model's config says
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None

    sequence_bias: Annotated[list[tuple[Tokens, Finite]], Field(min_length=1), BeforeValidator(_pairs)] | None = (
        None  # or {(id, …): bias}
    )
    logit_bias: dict[NonNegativeInt, Finite] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0)] | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    no_repeat_ngram_size: NonNegativeInt | None = None
    bad_words_ids: Annotated[list[Tokens], Field(min_length=1), BeforeValidator(_plain)] | None = None
    suppress_tokens: TokenIds | None = None
    begin_suppress_tokens: TokenIds | None = None
    guidance_scale: Finite | None = None

    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = None
    length_penalty: Finite | None = None
    early_stopping: bool | Literal["never"] | None = None
    num_return_sequences: PositiveInt | None = None
    prompt_lookup_num_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] | None = None
    max_matching_ngram_size: Annotated[int, Field(ge=1, le=8)] | None = None

    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    use_cache: bool | None = None  # the engine always does, which changes no token
    disable_compile: bool | None = None  # it never does

    bos_token_id: NonNegativeInt | None = None
    eos_token_id: OneOrMore | None = None
    pad_token_id: NonNegativeInt | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**without_inert(options))

    @classmethod
    def for_model(cls, config: GPTJConfig) -> Self:
        return cls(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """From the `generation_config.json` of a directory or a repository of the hub, with `options` changed.

        Raises `CheckpointError` or `ConfigError`.
        """
        directory = checkpoint_directory(
            pretrained_model_name_or_path,
            revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            files=[GENERATION_CONFIG_FILE],
        )
        return cls.from_file(directory / GENERATION_CONFIG_FILE).changed(**options)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises `ConfigError`."""
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            return cls().changed(**{name: value for name, value in options.items() if name not in _NO_OPTIONS})
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: {error}") from None

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `generation_config.json`, which transformers reads too."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / GENERATION_CONFIG_FILE).write_text(self.to_json_string(), encoding="utf-8")

    @property
    def end_token_ids(self) -> list[int]:
        """`eos_token_id` as a list."""
        return as_list(self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The options that are set."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def changed(self, **options: Any) -> Self:
        """A copy with other options, None unsetting one. Raises `InvalidOptionError` for what can't be followed."""
        followed = without_inert(options)
        if unknown := sorted(followed.keys() - type(self).model_fields.keys()):
            raise InvalidOptionError(unknown[0], followed[unknown[0]], "generate() knows no such option")
        try:
            return type(self)(**{**self.model_dump(exclude_none=True), **followed})
        except ValidationError as error:
            raise _refusal(error) from None


def _refusal(error: ValidationError) -> InvalidOptionError:
    """What is wrong farthest inside: of an option that may have one of two forms, that is the form it has."""
    worst = max(error.errors(), key=lambda one: len(one["loc"]))
    name, *inner = worst["loc"]
    dotted = ".".join([str(name), *(str(part) for part in inner if isinstance(part, int))])
    return InvalidOptionError(dotted, worst["input"], worst["msg"])
