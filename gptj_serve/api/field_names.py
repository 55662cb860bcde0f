"""What a client calls the parameters that the engine and the rules call by other names."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptj_serve.errors import InvalidRequestError

_ENGINE_NAMES = {"negative_prompt_token_ids": "negative_prompt", "max_time_s": "max_time", "stop_strings": "stop"}
"""Names that no client knows."""


@dataclass(frozen=True, slots=True)
class FieldNames:
    """`names` are whole; those that are not among them are only preceded by `prefix`."""

    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.names.get(name) or self.prefix + _ENGINE_NAMES.get(name, name)

    def translated(self, error: InvalidRequestError) -> InvalidRequestError:
        return InvalidRequestError(self[error.field], error.value, error.reason)
