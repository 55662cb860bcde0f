"""API keys as people write them, in a file and in the environment. No key ever appears in a message or a repr."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, SecretStr, StringConstraints, model_validator
from pydantic import ValidationError as FileInvalid

from gptj_serve import environment
from gptj_serve.errors import ConfigError

MIN_KEY_CHARACTERS = 8
MAX_KEY_CHARACTERS = 512
_NAME_PATTERN = r"[A-Za-z0-9_.-]{1,64}"
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARACTERS},{MAX_KEY_CHARACTERS}}}")
_WHAT_A_KEY_IS = f"a key is {MIN_KEY_CHARACTERS} to {MAX_KEY_CHARACTERS} printable ASCII characters without blanks"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, known by its digest only, with the limits of the whole service for it. None: no limit."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256
    max_concurrent_requests: int | None = None
    max_tokens_per_minute: int | None = None


class KeyEntry(BaseModel):
    """One key of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=f"^{_NAME_PATTERN}$")] = Field(
        description="In logs, in the key's place."
    )
    key: SecretStr | None = Field(None, description="The key itself.")
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{64}$")] | None = Field(
        None, repr=False, description="Or, of the key, the SHA-256 in hexadecimal: the file then gives no key away."
    )
    max_concurrent_requests: PositiveInt | None = Field(None, description="Requests at a time. Default: no limit.")
    max_tokens_per_minute: PositiveInt | None = Field(
        None, description="Tokens, read and generated, per minute; unused ones of one minute stay. Default: no limit."
    )

    @model_validator(mode="after")
    def _has_one_key(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("needs either key or sha256")
        if self.key is not None and not _KEY.fullmatch(self.key.get_secret_value()):
            raise ValueError(f"key: {_WHAT_A_KEY_IS}")
        return self

    def as_api_key(self) -> ApiKey:
        digest = bytes.fromhex(self.sha256) if self.sha256 is not None else _digest_of(self.key)
        return ApiKey(self.name, digest, self.max_concurrent_requests, self.max_tokens_per_minute)


class KeyFile(BaseModel):
    """The file: `keys`, a list. It can't be empty: a service that was closed never opens by a slip in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    keys: Annotated[list[KeyEntry], Field(min_length=1)]


def read_keys(path: Path) -> list[ApiKey]:
    """Raises `ConfigError`, naming file and field."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8") from None
    # What the parsers say may quote the file, so of their errors only the place is told.
    try:
        parsed = json.loads(content) if path.suffix == ".json" else yaml.load(content, _YAML_LOADER)  # noqa: S506
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}: not valid JSON") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}: line {mark.line + 1 if mark else 1}: not valid YAML") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{path}: not valid YAML") from None
    try:
        return [entry.as_api_key() for entry in KeyFile.model_validate(parsed).keys]
    except FileInvalid as error:
        raise ConfigError(f"{path}: {_described(error)}") from None


def keys_of_environment() -> list[ApiKey]:
    """Raises `ConfigError`, naming variable and place."""
    value = environment.api_keys()
    if value is None:
        return []
    keys = []
    for number, written in enumerate(value.split(","), start=1):
        name, is_named, key = written.strip().partition("=")
        if not is_named:
            name, key = f"key-{number}", name
        if not re.fullmatch(_NAME_PATTERN, name) or not _KEY.fullmatch(key):
            raise ConfigError(
                f"{environment.API_KEYS}: entry {number} is not usable: write name=key, or only the key; a name has 1 "
                f"to 64 letters, digits, '_', '.' or '-'; {_WHAT_A_KEY_IS}, and here without commas"
            )
        keys.append(ApiKey(name, hashlib.sha256(key.encode()).digest()))
    return keys


def checked(keys: list[ApiKey], source: str) -> list[ApiKey]:
    """Raises `ConfigError` if two keys have the same name, or two names the same key."""
    names: set[str] = set()
    name_of: dict[bytes, str] = {}
    for key in keys:
        if key.name in names:
            raise ConfigError(f"{source}: two API keys have the name {key.name!r}")
        if key.digest in name_of:
            raise ConfigError(f"{source}: {name_of[key.digest]!r} and {key.name!r} are the same key")
        names.add(key.name)
        name_of[key.digest] = key.name
    return keys


_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The former is ten times faster, and a service may have thousands of keys."""


def _digest_of(key: SecretStr | None) -> bytes:
    assert key is not None
    return hashlib.sha256(key.get_secret_value().encode()).digest()


def _described(error: FileInvalid) -> str:
    """The first thing wrong, without the value: it may be a key, and so may the name of an unknown field."""
    details: dict[str, Any] = dict(error.errors(include_input=False, include_url=False)[0])
    location = [str(part) for part in details["loc"]] or ["the file"]
    if details["type"] == "extra_forbidden":
        *above, _ = location
        model = KeyEntry if above else KeyFile
        return f"{'.'.join(above) or 'the file'}: a field that is none of {', '.join(model.model_fields)}"
    return f"{'.'.join(location)}: {details['msg'].removeprefix('Value error, ')}"
