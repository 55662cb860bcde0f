"""`to_lark`: what was asked for, in llguidance's dialect of Lark, which has a place for all of it.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md is the dialect, docs/json_schema.md beside it the
JSON Schema that it knows. Of Lark, whatever is about tokens instead of text is refused here.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from gptj_serve.grammar import json_schema
from gptj_serve.types import Grammar, GrammarKind

MAX_CHARS = 1 << 16
"""Of a grammar's text; larger ones take llguidance seconds."""

_JSON_OPTIONS = {
    # One blank at most, wherever JSON may have whitespace: greedy models can go on with whitespace for ever.
    "whitespace_pattern": " ",
    # Without u: else llguidance would let {"\u0061": 1} pass for a name that is not "a".
    "json_allowed_escapes": 'nrbtf\\"',
}

_LARK_PART = re.compile(
    r"""(?: (?:\#|//)[^\n]*            # a comment
          | "(?:\\.|[^"\\\n])*+"?      # a string; in the JSON after %json, too
          | /(?:\\.|[^/\\])++/?        # a regex
        )
      | (?P<token> <[^<>\s]+> )
      | (?P<option> \b(?:max_tokens|stop|temperature)\b (?=\s*=) )
    """,
    re.VERBOSE | re.DOTALL,
)


def to_lark(grammar: Grammar) -> str:
    """Raises `ValueError` with the reason why there is none."""
    if len(grammar.text) > MAX_CHARS:
        raise ValueError(f"has {len(grammar.text)} characters, more than {MAX_CHARS}")
    return _WRITERS[grammar.kind](grammar.text)


def _json_schema(text: str) -> str:
    schema = _parse_json(text)
    json_schema.check(schema)
    if schema is False:
        raise ValueError("no text matches it")
    options = {"x-guidance": _JSON_OPTIONS}
    return f"start: %json {_json(options if schema is True else schema | options)}"


def _regex(text: str) -> str:
    """Of Rust's dialect. In Lark a regex stands between slashes, and a backslash doesn't escape a newline."""
    if not text:
        raise ValueError("the regex is empty")
    if re.fullmatch(r"(?:[^\\]|\\.)*+\\", text, re.DOTALL):
        raise ValueError("a backslash at the end escapes nothing")
    replacements = {"/": r"\/", "\\\n": r"\n"}
    escaped = re.sub(r"\\.|/", lambda found: replacements.get(found[0], found[0]), text, flags=re.DOTALL)
    return f"start: /{escaped}/"


def _choice(text: str) -> str:
    """One terminal: as alternatives of a rule they would be parsed side by side, and 2000 is the limit for that."""
    choices = _parse_json(text)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("the choices are not a JSON array of strings")
    if not choices:
        raise ValueError("there is no choice")
    if "" in choices:
        raise ValueError("a choice is empty")
    (commonest, times), *_ = Counter(choices).most_common(1)
    if times > 1:
        raise ValueError(f"the choice {commonest!r} is there {times} times")
    return f"start: CHOICE\nCHOICE: {' | '.join(map(_json, choices))}"


def _lark(text: str) -> str:
    for part in _LARK_PART.finditer(text):
        if part["token"]:
            raise ValueError(f"references to tokens like {part['token']} are not supported: only text can be matched")
        if part["option"]:
            raise ValueError(f"the option {part['option']} is not supported")
    return text


_WRITERS: dict[GrammarKind, Callable[[str], str]] = {
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.REGEX: _regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.LARK: _lark,
}


def _json(value: Any) -> str:
    """Lark's strings are JSON's, but for U+007F."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name}")
