"""`GenerationConfig`: what `generate` can be told; names, meanings and defaults are transformers'."""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from gptj_serve.errors import ConfigError
from gptj_serve.model.config import GPTJConfig

GENERATION_CONFIG_FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 20

_INERT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "penalty_alpha": (None, 0.0),
    "typical_p": (1.0, None),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "repetition_penalty": (1.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "length_penalty": (1.0, None),
    "diversity_penalty": (0.0, None),
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "early_stopping": (False, None),
    "renormalize_logits": (False, None),
    "remove_invalid_values": (False, None),
    "return_dict_in_generate": (False, None),
    "output_scores": (False, None),
    "output_logits": (False, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "use_cache": (True, None),
    "streamer": (None,),
    "synced_gpus": (False, None),
}
"""What transformers also takes and this package does not do: taken at these values, which ask for nothing."""


def _as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else [value]


class GenerationConfig(BaseModel):
    """Unknown options are refused by name, as are those of transformers that nothing here follows."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    max_new_tokens: PositiveInt | None = None
    max_length: PositiveInt | None = None  # prompt and padding included
    min_new_tokens: NonNegativeInt | None = None
    min_length: NonNegativeInt | None = None
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    top_k: NonNegativeInt | None = 50
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    num_return_sequences: PositiveInt = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # default: drawn from torch's global generator
    bos_token_id: NonNegativeInt | None = None
    eos_token_id: Annotated[list[NonNegativeInt] | None, BeforeValidator(_as_list)] = None
    pad_token_id: NonNegativeInt | None = None
    stop_strings: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list)] = None

    @classmethod
    def for_model(cls, config: GPTJConfig) -> Self:
        return cls(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)

    def changed(self, **options: Any) -> Self:
        """A copy with other options. Raises ValueError, naming an option that is unknown or can't be followed."""
        for name, inert in _INERT.items():
            if name in options and (value := options.pop(name)) not in inert:
                raise ValueError(f"generate() does not support {name}={value!r}")
        if unknown := sorted(options.keys() - type(self).model_fields.keys()):
            raise ValueError(f"generate() does not support {', '.join(f'{n}={options[n]!r}' for n in unknown)}")
        return type(self)(**{**self.model_dump(exclude_unset=True), **options})

    def updated_from(self, directory: Path) -> Self:
        """With the options of the directory's `generation_config.json`, if it has one. Raises `ConfigError`."""
        path = directory / GENERATION_CONFIG_FILE
        if not path.is_file():
            return self
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            kept = {k: v for k, v in options.items() if k not in ("transformers_version", "_from_model_config")}
            return self.changed(**kept)
        except (ValueError, AttributeError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from None
