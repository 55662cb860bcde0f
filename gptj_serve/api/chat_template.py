"""Chat templates: a chat's messages as one prompt, by a Jinja template, as transformers renders them.

The same environment, filters, functions and variables as `apply_chat_template` in transformers 5. The template is the
operator's; what fills it is the client's, and so the prompt's length is bounded while it grows.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from gptj_serve.config import ServiceConfig
from gptj_serve.errors import ConfigError, InvalidRequestError
from gptj_serve.model.config import GPTJConfig
from gptj_serve.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own, since templates may look at it
_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt"}


class ChatTemplate:
    """One compiled template, and the special tokens' texts that it may use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str = "chat template") -> None:
        """`name` is what errors call it by. Raises `ConfigError` if the source is no template."""
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{name}: not a chat template: {error}") from error

    @classmethod
    def open(cls, config: ServiceConfig, model: GPTJConfig, tokenizer: Tokenizer) -> Self | None:
        """The deployment's template, else the checkpoint's own, else None.

        Raises `ConfigError`, naming the file, if one can't be read or is no template.
        """
        found = _find_source(config)
        if found is None:
            return None
        name, source = found
        return cls(source, special_tokens_of(config.checkpoint_dir, model, tokenizer), name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        max_characters: int,
    ) -> str:
        """The prompt. `messages` are plain JSON; `variables` are what the template knows besides.

        Raises `InvalidRequestError` for what the template refuses or can't render, and for a prompt that grows over
        `max_characters`.
        """
        for name in _OWN_VARIABLES & variables.keys():
            raise InvalidRequestError(f"chat_template_kwargs.{name}", variables[name], "is a field of its own, if any")
        chat = [dict(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] += _CONTINUE_HERE
        values = {"tools": None, "documents": None, **self._special_tokens, **variables}
        parts: list[str] = []
        num_characters = 0
        try:
            for part in self._template.generate(messages=chat, add_generation_prompt=add_generation_prompt, **values):
                parts.append(part)
                num_characters += len(part)
                if num_characters > max_characters:
                    reason = f"make a prompt of over {max_characters} characters; the model's context holds no more"
                    raise InvalidRequestError("messages", list(messages), reason)
        except InvalidRequestError:
            raise
        except _RefusedError as error:
            raise InvalidRequestError("messages", list(messages), f"the chat template refuses: {error}") from None
        except Exception as error:  # whatever a template can run into with values that it was not written for
            reason = f"the chat template can't render these: {type(error).__name__}: {error}"
            raise InvalidRequestError("messages", list(messages), reason) from None
        prompt = "".join(parts)
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # which a template can make, of a number say
            raise InvalidRequestError("chat_template_kwargs", dict(variables), f"no valid text: {error}") from None
        return _up_to_end_of(str(messages[-1]["content"]), prompt) if continue_final_message else prompt


def _find_source(config: ServiceConfig) -> tuple[str, str] | None:
    """Where the template is written, and the template."""
    file = config.chat_template_file
    if file is None and (config.checkpoint_dir / TEMPLATE_FILE).exists():
        file = config.checkpoint_dir / TEMPLATE_FILE
    if file is not None:
        try:
            return str(file), file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: the chat template can't be read: {error}") from error
    source = _tokenizer_config(config.checkpoint_dir).get("chat_template")
    if source is None:
        return None
    name = f"{config.checkpoint_dir / TOKENIZER_CONFIG_FILE}: chat_template"
    if isinstance(source, list):  # transformers' older way to write several
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ConfigError(f"{name}: must be a text, or have one by the name default")
    return name, source


def special_tokens_of(directory: Path, model: GPTJConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """By name, the texts of a checkpoint's special tokens: those of its tokenizer_config.json, else of its ids."""
    written = _tokenizer_config(directory)
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        value = written.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    eos_token_id = min(model.eos_token_ids) if model.eos_token_ids else None
    for name, token_id in (("bos_token", model.bos_token_id), ("eos_token", eos_token_id)):
        if name not in tokens and token_id is not None:
            tokens[name] = tokenizer.decode([token_id], skip_special_tokens=False)
    return tokens


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    file = directory / TOKENIZER_CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: can't be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold an object")
    return values


def _up_to_end_of(content: str, prompt: str) -> str:
    """Cut a rendered chat where its last message ends, by the mark that was put there (transformers' way)."""
    mark = _CONTINUE_HERE.strip()
    if mark not in prompt or content.strip() not in prompt:
        raise InvalidRequestError("continue_final_message", True, "the chat template doesn't show the last message")
    end = prompt.rindex(mark)
    is_kept_whole = prompt[end : end + len(_CONTINUE_HERE)] == _CONTINUE_HERE
    return prompt[:end] if is_kept_whole else prompt[:end].rstrip()  # or the template trimmed its blanks


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates for training mark what the model said: here only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
