"""Chat templates: what transformers renders is what we render; what can't be used is refused at the start."""

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import SPECIAL_TOKEN, small_backend_json, small_model, small_tokenizer
from transformers import PreTrainedTokenizerFast

from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.config import ServiceConfig
from gptj_serve.errors import ConfigError, InvalidRequestError

CHATML = """\
{%- for message in messages -%}
    {{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
DIALOGUE = """\
{{ bos_token }}
{% for message in messages %}
    {% if loop.index0 % 2 != (message.role == "assistant") %}
{{ raise_exception("roles must take turns") }}
    {% endif %}
    {% if message.role == "assistant" %}
Assistant: {% generation %}{{ message.content }}{% endgeneration %}

    {% else %}
User: {{ message.content }}
    {% endif %}
    {% if message.content == "break" %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""
JSON = """\
{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ tools is none }} {{ documents is none }} {{ mood }}
{%- set ns = namespace(count=0) -%}{%- for m in messages -%}{%- set ns.count = ns.count + 1 -%}{%- endfor -%}
{{ ns.count }}{{ eos_token }}{{ pad_token is defined }}{{ strftime_now("%Y") | length }}"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Where is the <fox>?"}],
    [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b & c\n"}],
    [{"role": "user", "content": "break"}, {"role": "assistant", "content": "東京 “é”"}],
]


def _theirs(template: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(small_backend_json())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL_TOKEN, eos_token=SPECIAL_TOKEN)
    tokenizer.chat_template = template
    return tokenizer


def _ours(template: str) -> ChatTemplate:
    return ChatTemplate(template, {"bos_token": SPECIAL_TOKEN, "eos_token": SPECIAL_TOKEN})


def _render(template: ChatTemplate, chat: list[dict[str, Any]], max_characters: int = 10_000, **changes: Any) -> str:
    options = {"add_generation_prompt": True, "continue_final_message": False} | changes
    variables = options.pop("variables", {})
    return template.render(chat, variables, max_characters=max_characters, **options)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, DIALOGUE, JSON], ids=["chatml", "dialogue", "json"])
@pytest.mark.parametrize("adds_prompt", [True, False])
def test_as_transformers_renders(template: str, chat: list[dict[str, Any]], adds_prompt: bool) -> None:
    expected = _theirs(template).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=adds_prompt, mood="glad"
    )
    rendered = _render(_ours(template), chat, add_generation_prompt=adds_prompt, variables={"mood": "glad"})
    assert rendered == expected
    assert chat == json.loads(json.dumps(chat)), "the chat itself is left as it was"


@pytest.mark.parametrize("template", [CHATML, DIALOGUE], ids=["chatml", "dialogue"])
@pytest.mark.parametrize("end", ["b", "b ", "  b\n"])
def test_a_last_message_is_continued_as_by_transformers(template: str, end: str) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": end}]
    expected = _theirs(template).apply_chat_template(chat, tokenize=False, continue_final_message=True)
    ours = _render(_ours(template), chat, add_generation_prompt=False, continue_final_message=True)
    assert ours == expected
    assert ours.rstrip().endswith("b")


def test_a_last_message_that_is_not_shown_is_not_continued() -> None:
    with pytest.raises(InvalidRequestError, match="continue_final_message=True"):
        _render(_ours("always the same"), CHATS[0], continue_final_message=True)


def test_what_the_template_refuses_is_the_clients_fault() -> None:
    chat = [{"role": "assistant", "content": "b"}]
    with pytest.raises(InvalidRequestError, match="the chat template refuses: roles must take turns"):
        _render(_ours(DIALOGUE), chat)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[7].content.upper() }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for _ in range(1000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_runs_into_is_a_refusal(template: str) -> None:
    with pytest.raises(InvalidRequestError, match="the chat template can't render these"):
        _render(_ours(template), CHATS[0])


def test_a_prompt_is_bounded_while_it_grows() -> None:
    endless = _ours("{% for a in range(9999) %}{% for b in range(9999) %}{{ messages }}{% endfor %}{% endfor %}")
    with pytest.raises(InvalidRequestError, match="a prompt of over 100 characters"):
        _render(endless, CHATS[0], max_characters=100)


def test_variables_are_not_the_fields_of_the_request() -> None:
    with pytest.raises(InvalidRequestError, match=r"^chat_template_kwargs\.messages='x': "):
        _render(_ours(CHATML), CHATS[0], variables={"messages": "x"})


def test_variables_are_valid_text() -> None:
    with pytest.raises(InvalidRequestError, match=r"chat_template_kwargs=.*no valid text"):
        _render(_ours("{{ end }}"), CHATS[0], variables={"end": "\ud800"})


# ── where it comes from ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(small_backend_json(), encoding="utf-8")
    return tmp_path


def _open(checkpoint: Path, **config: Any) -> ChatTemplate | None:
    return ChatTemplate.open(ServiceConfig(checkpoint=str(checkpoint), **config), small_model(), small_tokenizer())


def _write_config(checkpoint: Path, **values: Any) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")


def test_a_checkpoint_without_a_template_has_none(checkpoint: Path) -> None:
    assert _open(checkpoint) is None
    _write_config(checkpoint, bos_token="<s>")
    assert _open(checkpoint) is None
    assert ChatTemplate.open(ServiceConfig(), small_model(), small_tokenizer()) is None, "nor has the demo"


def test_the_configured_file_comes_before_the_checkpoints_own(checkpoint: Path, tmp_path: Path) -> None:
    sources = []
    _write_config(checkpoint, chat_template="in the configuration")
    sources.append(_open(checkpoint))
    _write_config(checkpoint, chat_template=[{"name": "default", "template": "one of several"}])
    sources.append(_open(checkpoint))
    (checkpoint / "chat_template.jinja").write_text("beside it")
    sources.append(_open(checkpoint))
    (tmp_path / "other.jinja").write_text("configured")
    sources.append(_open(checkpoint, chat_template=str(tmp_path / "other.jinja")))
    assert [template and template.source for template in sources] == [
        "in the configuration",
        "one of several",
        "beside it",
        "configured",
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, f"{SPECIAL_TOKEN}/{SPECIAL_TOKEN}/"),
        ({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}, "<s>/</s>/"),
        ({"pad_token": "<p>"}, f"{SPECIAL_TOKEN}/{SPECIAL_TOKEN}/<p>"),
    ],
)
def test_special_tokens(checkpoint: Path, written: dict[str, Any], expected: str) -> None:
    _write_config(checkpoint, chat_template="{{ bos_token }}/{{ eos_token }}/{{ pad_token }}", **written)
    template = _open(checkpoint)
    assert template is not None
    assert _render(template, CHATS[0]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for message in messages %}", "not a chat template: Unexpected end of template"),
        (b"{{ messages | no_such_filter }}", "not a chat template: No filter named 'no_such_filter'"),
        (b"\xff", "the chat template can't be read"),
        (None, "the chat template can't be read"),
    ],
)
def test_a_file_that_is_no_template_is_refused(checkpoint: Path, content: bytes | None, message: str) -> None:
    file = checkpoint / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file}: {message}"):
        _open(checkpoint, chat_template=str(file))


@pytest.mark.parametrize("template", [5, {"tool_use": "a"}, [{"name": "tool_use", "template": "a"}], "{{", ["a"]])
def test_a_tokenizer_config_without_a_usable_template_is_refused(checkpoint: Path, template: Any) -> None:
    _write_config(checkpoint, chat_template=template)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template: "):
        _open(checkpoint)


@pytest.mark.parametrize("text", ["[]", "{", "\ud800"])
def test_a_damaged_tokenizer_config_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "tokenizer_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: "):
        _open(checkpoint)
