"""JSON that follows a schema, with the `jsonschema` package as the judge, and the schemas that are refused."""

import functools
import json
import random
from decimal import Decimal, InvalidOperation
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import TOKENIZERS, accepts, matcher_of, random_output

from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import GrammarKind

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "größe": {"type": "number", "minimum": 0, "maximum": 2.5},
        "born": {"type": "string", "format": "date"},
        "tags": {
            "type": "array",
            "items": {"enum": ["a", "b", "ü", "東京", None, 3, 0.5]},
            "minItems": 1,
            "maxItems": 3,
        },
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "country": {"const": "SI"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
        "parent": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    True,
    {},
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
    {"type": "object", "properties": {"a": {}}, "required": ["a"], "minProperties": 2},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": {"type": "null"}},
    {"enum": ["a", 1, -2.5, None, True, [1, {"b": "ü"}], {}]},
    {"const": '\b\f\n\r\t"\\/é\u2028😀'},
    {"type": ["integer", "null"], "multipleOf": 7},
    {"type": "integer", "minimum": -20, "exclusiveMaximum": 5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"allOf": [{"type": "string", "minLength": 2}, {"pattern": "b"}], "maxLength": 9},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}, "maxItems": 2}}},
    PERSON,
]
REFUSED = [
    ("", "not JSON"),
    ('{"type": "string"', "not JSON"),
    ('{"maximum": NaN}', "not JSON: NaN"),
    ("[]", "an object, true or false"),
    ("false", "no text matches"),
    ('{"type": "text"}', "Invalid type: text"),
    ('{"type": "string", "minLength": -1}', "minLength"),
    ('{"type": "string", "pattern": "(a"}', "unclosed group"),
    ('{"type": "string", "pattern": "a(?!b)"}', "look-around"),
    ('{"type": "string", "format": "color"}', "Unknown format: color"),
    ('{"type": "array", "uniqueItems": true}', '"uniqueItems"'),
    ('{"type": "array", "contains": {}}', '"contains"'),
    ('{"not": {"type": "null"}}', '"not"'),
    ('{"if": {}, "then": {}}', '"if", "then"'),
    ('{"type": "object", "propertyNames": {}}', '"propertyNames"'),
    ('{"type": "object", "unevaluatedProperties": false}', '"unevaluatedProperties"'),
    ('{"properties": {"a": {"dependentRequired": {}}}}', '"dependentRequired"'),
    ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf constraints are not supported"),
    ('{"$ref": "https://example.com/schema"}', "https://example.com/schema"),
    ('{"$ref": "#/$defs/missing"}', "missing"),
    ('{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
    ('{"type": "object", "minProperties": 2}', "#/minProperties"),
    ('{"const": 9007199254740993}', "#/const: 9007199254740993"),
    ('{"items": {"enum": [1, {"a": 1e999}]}}', "#/items/enum: inf"),
    (f'{{"maximum": 1{"0" * 400}}}', "#/maximum"),
    ('{"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}', "#/exclusiveMinimum: 0"),
    ('{"minimum": -1.5, "maximum": -1, "exclusiveMaximum": true}', "#/exclusiveMaximum: -1"),
    ('{"allOf": [{"exclusiveMinimum": 1}, {"exclusiveMaximum": 1.5}]}', "#/exclusiveMinimum: 1"),
    ('{"anyOf": [{"const": "\\u0001"}]}', "#/anyOf/0/const"),
    ('{"type": "integer", "minimum": 3, "maximum": 2}', "Unsatisfiable"),
    ('{"enum": []}', "Unsatisfiable"),
    ('{"$ref": "#"}', "without end"),
    ('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "without end"),
    ('{"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/x"}}}}',
     "#/$defs/x: contains itself without end"),
    ('{"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"$ref": "#"}]}, '
     '"b": {"allOf": [{"type": "object"}, {"$ref": "#/$defs/a"}]}}}', "without end"),
    ('{"items": ' * 200 + "{}" + "}" * 200, "recursion limit"),
    ('{"items": ' * 5000 + "{}" + "}" * 5000, "nested too deeply"),
]  # fmt: skip


def exact_number(text: str) -> Decimal | float:
    """As a float, a long number could be its schema's excluded bound. Only huge exponents are beyond `Decimal`."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return float(text)


def check_outputs(schema: Any, choose: random.Random, tokenizer: str = "small") -> str:
    matcher = matcher_of(GrammarKind.JSON_SCHEMA, json.dumps(schema), tokenizer)
    text = random_output(matcher, TOKENIZERS[tokenizer], choose)
    exactly = functools.partial(json.loads, parse_float=exact_number)
    jsonschema.Draft202012Validator(exactly(json.dumps(schema))).validate(exactly(text))
    assert text == text.strip()
    assert "  " not in text or '"' in text
    return text


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_output_is_valid(schema: Any, tokenizer: str):
    for seed in range(10):
        check_outputs(schema, random.Random(seed), tokenizer)


VALUES = [
    ({"type": "object"}, {"a": [1, -2.5e-3, True, None, {"b": {}}], "ключ": "значение"}),
    (PERSON, {"name": "Jöhn", "größe": 1.85, "born": "1986-02-28", "tags": ["東京", None]}),
    (PERSON, {"name": "", "tags": [3], "address": {"zip": "01234"}, "parent": {"name": "x", "tags": ["a"]}}),
    ({"const": '\b\f\n\r\t"\\/é\u2028😀'}, '\b\f\n\r\t"\\/é\u2028😀'),
]


@pytest.mark.parametrize(("schema", "value"), VALUES, ids=lambda value: ascii(value)[:30])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : ")])
def test_valid_json_can_be_had_however_it_is_cut(schema: Any, value: Any, separators: tuple[str, str]):
    text = json.dumps(value, ensure_ascii=False, separators=separators)
    for choose in (None, random.Random(1), random.Random(2)):
        assert accepts(matcher_of(GrammarKind.JSON_SCHEMA, json.dumps(schema)), text, TOKENIZERS["small"], choose)


@pytest.mark.parametrize(
    "text", ['{"a":  1}', '{"a":\n1}', ' {"a":1}', '{"a":1} ', '{"a":1,}', "{'a':1}", '{"a":"\t"}']
)
def test_no_other_whitespace_than_single_blanks_inside(text: str):
    assert not accepts(matcher_of(GrammarKind.JSON_SCHEMA, '{"type": "object"}'), text, TOKENIZERS["small"])


def test_a_name_can_not_be_written_in_another_way_to_escape_its_schema():
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    for text in [r'{"\u0061": "x"}', '{"a": "x"}', r'{"a": 1, "\u0061": "x"}']:
        assert not accepts(matcher_of(GrammarKind.JSON_SCHEMA, json.dumps(schema)), text, TOKENIZERS["small"])


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=lambda text: text[:40])
def test_refused(schema: str, reason: str):
    with pytest.raises(InvalidRequestError) as refusal:
        matcher_of(GrammarKind.JSON_SCHEMA, schema)
    assert refusal.value.field == "grammar"
    assert reason in refusal.value.reason
    assert "\n" not in refusal.value.reason
    assert len(refusal.value.reason) <= 300
    assert len(refusal.value.value) <= 100


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"anyOf": [{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"type": "null"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"enum": [1, {"$ref": "#"}]}}},
    ],
    ids=json.dumps,
)
def test_what_contains_itself_may_if_it_can_end(schema: Any):
    for seed in range(5):
        check_outputs(schema, random.Random(seed))


numbers = st.integers(-(10**6), 10**6) | st.decimals(-1000, 1000, places=2).map(float)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=6)
scalars = st.none() | st.booleans() | numbers | texts


@st.composite
def bounded(draw: st.DrawFn, schema: dict[str, Any], minimum: str, maximum: str, bounds: st.SearchStrategy[Any]) -> Any:
    low, high = sorted([draw(bounds), draw(bounds)])
    return schema | draw(st.sampled_from([{}, {minimum: low}, {maximum: high}, {minimum: low, maximum: high}]))


@st.composite
def objects(draw: st.DrawFn, parts: st.SearchStrategy[Any]) -> Any:
    properties = draw(st.dictionaries(texts, parts, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    additional = draw(st.sampled_from([False, True, {"type": "boolean"}]))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": additional}


@st.composite
def arrays(draw: st.DrawFn, parts: st.SearchStrategy[Any]) -> Any:
    sizes = st.integers(0, 4)
    return draw(bounded({"type": "array", "items": draw(parts)}, "minItems", "maxItems", sizes))


schemas = st.recursive(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^(ab|é)+[0-9]?$"}])
    | st.builds(lambda value: {"const": value}, scalars)
    | st.builds(lambda values: {"enum": values}, st.lists(scalars, min_size=1, max_size=4))
    | bounded({"type": "integer"}, "minimum", "maximum", st.integers(-500, 500))
    | bounded({"type": "number"}, "minimum", "maximum", numbers)
    | bounded({"type": "string"}, "minLength", "maxLength", st.integers(0, 12)),
    lambda parts: (
        objects(parts)
        | arrays(parts)
        | st.builds(lambda options: {"anyOf": options}, st.lists(parts, min_size=1, max_size=3))
    ),
    max_leaves=6,
)


@settings(max_examples=100)
@given(schemas, st.randoms(use_true_random=False))
def test_output_of_any_schema_is_valid(schema: Any, choose: random.Random):
    text = check_outputs(schema, choose)
    assert accepts(matcher_of(GrammarKind.JSON_SCHEMA, json.dumps(schema)), text, TOKENIZERS["small"], choose)
