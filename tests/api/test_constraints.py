"""What the text must match, in each of the ways in which clients say it."""

import json
from typing import Any

import httpx
import pytest
from fakes import FakeEngine

from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import EngineRequest, Grammar, GrammarKind

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"const": "é"}}, "required": ["z"]}
SCHEMA_TEXT = json.dumps(SCHEMA)
JSON = Grammar(GrammarKind.JSON_SCHEMA, SCHEMA_TEXT)
ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
REGEX = Grammar(GrammarKind.REGEX, "a+")
LARK = Grammar(GrammarKind.LARK, 'start: "a"')
CHOICE = Grammar(GrammarKind.CHOICE, json.dumps(["yes", "né"]))

COMPLETE: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"structured_outputs": {"json": SCHEMA}}, JSON),
    ({"structured_outputs": {"json": SCHEMA_TEXT}}, JSON),
    ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
    ({"structured_outputs": {"regex": "a+", "json": None}}, REGEX),
    ({"structured_outputs": {"choice": ["yes", "né"]}}, CHOICE),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, LARK),
    ({"guided_json": SCHEMA}, JSON),
    ({"guided_json": SCHEMA_TEXT}, JSON),
    ({"guided_regex": "a+"}, REGEX),
    ({"guided_choice": ["yes", "né"]}, CHOICE),
    ({"guided_grammar": 'start: "a"'}, LARK),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "text"}, "guided_regex": "a+"}, REGEX),
    ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        JSON,
    ),
    ({"guided_json": None, "structured_outputs": None, "response_format": None}, None),
]
GENERATE: list[tuple[str, Any, Grammar]] = [
    ("json", SCHEMA, JSON),
    ("json", SCHEMA_TEXT, JSON),
    ("json_object", SCHEMA, JSON),
    ("json_schema", {"name": "x", "schema": SCHEMA}, JSON),
    ("json_schema", {"schema": SCHEMA_TEXT}, JSON),
    ("regex", "a+", REGEX),
    ("choice", ["yes", "né"], CHOICE),
    ("lark", 'start: "a"', LARK),
]


def _id(value: Any) -> str:
    return "" if isinstance(value, Grammar) else json.dumps(value)[:40]


@pytest.mark.parametrize(("said", "grammar"), COMPLETE, ids=_id)
async def test_complete(client: httpx.AsyncClient, engine: FakeEngine, said: Any, grammar: Grammar | None) -> None:
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "The fox", **said})
    assert response.status_code == 200, response.text
    assert engine.requests[0].sampling.grammar == grammar


@pytest.mark.parametrize(("kind", "value", "grammar"), GENERATE, ids=_id)
async def test_generate(client: httpx.AsyncClient, engine: FakeEngine, kind: str, value: Any, grammar: Grammar) -> None:
    body = {"inputs": "The fox", "parameters": {"grammar": {"type": kind, "value": value}}}
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    assert engine.requests[0].sampling.grammar == grammar
    assert engine.requests[0].sampling.warpers.temperature == 0


def _named(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


BAD_COMPLETE: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "5"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": '{"minimum": NaN}'}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[" * 3000}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": {}, "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_grammar": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": "true"}, "guided_json"),
    ({"response_format": {"type": "json"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"response_format": _named("{}")}, "response_format.json_schema.schema"),
    ({"response_format": _named({"minimum": float("nan")})}, "response_format.json_schema.schema.minimum"),
]
BAD_GENERATE: list[tuple[Any, str]] = [
    ({"type": "yaml", "value": "a"}, "parameters.grammar.type"),
    ({"type": "regex"}, "parameters.grammar.value"),
    ({"type": "regex", "value": ""}, "parameters.grammar.value"),
    ({"type": "regex", "value": {}}, "parameters.grammar.value"),
    ({"type": "lark", "value": 5}, "parameters.grammar.value"),
    ({"type": "json", "value": "{"}, "parameters.grammar.value"),
    ({"type": "json", "value": [1]}, "parameters.grammar.value"),
    ({"type": "json_schema", "value": {"type": "object"}}, "parameters.grammar.value"),
    ({"type": "json_schema", "value": {"schema": {}, "x": 1}}, "parameters.grammar.value"),
    ({"type": "json_schema", "value": {"schema": 5}}, "parameters.grammar.value.schema"),
    ({"type": "choice", "value": []}, "parameters.grammar.value"),
    ({"type": "choice", "value": ["a", 5]}, "parameters.grammar.value"),
    ({"type": "choice", "value": "a"}, "parameters.grammar.value"),
    ({"type": "regex", "value": "a", "x": 1}, "parameters.grammar.x"),
    ("a", "parameters.grammar"),
]


def _post(body: Any) -> dict[str, Any]:
    """As `json=`, but with NaN, which Python's JSON knows and httpx refuses."""
    return {"content": json.dumps(body).encode(), "headers": {"content-type": "application/json"}}


@pytest.mark.parametrize(("said", "field"), BAD_COMPLETE, ids=_id)
async def test_bad_constraints_of_a_completion(
    client: httpx.AsyncClient, engine: FakeEngine, said: Any, field: str
) -> None:
    response = await client.post("/v1/completions", **_post({"model": "tiny", "prompt": "The fox", **said}))
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert engine.requests == []


@pytest.mark.parametrize(("grammar", "field"), BAD_GENERATE, ids=_id)
async def test_bad_grammars_of_a_generation(
    client: httpx.AsyncClient, engine: FakeEngine, grammar: Any, field: str
) -> None:
    response = await client.post("/generate", **_post({"inputs": "The fox", "parameters": {"grammar": grammar}}))
    assert response.status_code == 422
    assert response.json()["error"].startswith(f"{field}=")
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_has_the_clients_name(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    def refuse(request: EngineRequest) -> Exception:
        assert request.sampling is not None
        assert request.sampling.grammar is not None
        return InvalidRequestError("grammar", request.sampling.grammar.text, "is not an expression")

    engine.refusal = refuse
    body = {"model": "tiny", "prompt": "The fox", "guided_regex": "(", "stream": stream}
    response = await client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_regex")
    body = {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "("}}, "stream": stream}
    response = await client.post("/generate", json=body)
    assert (response.status_code, response.json()["error"]) == (
        422,
        "parameters.grammar.value='(': is not an expression",
    )


async def test_a_prompt_that_the_engine_refuses_is_inputs_in_one_shape(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.refusal = lambda request: InvalidRequestError("prompt", 3, "is too long for this engine")
    response = await client.post("/generate", json={"inputs": "a"})
    assert response.json()["error"] == "inputs=3: is too long for this engine"
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert response.json()["error"]["param"] == "prompt"
