"""The OpenAPI schema: all of every route is described, the examples work, and answers are what it says."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import httpx
import jsonschema
import pytest
from calls import CHAT_TEMPLATE, events
from fakes import FakeEngine, small_model, small_tokenizer
from fastapi import FastAPI

from gptj_serve.api.app import create_app
from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.service import Service
from gptj_serve.config import ServiceConfig
from gptj_serve.errors import OverloadedError, RequestFailedError, RequestTimeoutError

ERRORS = {
    "/v1/": {"400", "401", "404", "408", "413", "429", "500", "503", "504"},
    "/": {"400", "401", "404", "408", "413", "422", "429", "500", "503", "504"},
}
TAGS = {"OpenAI", "Hugging Face", "Tokenizer"}
"""Of the routes for those who use the model."""


class Operation(NamedTuple):
    method: str
    path: str
    described: dict[str, Any]

    @property
    def surface(self) -> str:
        return "/v1/" if self.path.startswith("/v1/") else "/"


def _app(engine: FakeEngine) -> FastAPI:
    """With the demo's name, a longer context, which the examples need, and a chat template."""
    heads = ("lm_head", "score", "qa_outputs")
    template = ChatTemplate(CHAT_TEMPLATE, {})
    return create_app(Service(ServiceConfig(), engine.model, heads, engine.tokenizer, engine, None, template))


def _engine() -> FakeEngine:
    return FakeEngine(small_model(n_positions=512), small_tokenizer())


SCHEMA: dict[str, Any] = _app(_engine()).openapi()
COMPONENTS: dict[str, Any] = SCHEMA["components"]["schemas"]
ALL = [Operation(method, path, d) for path, ops in SCHEMA["paths"].items() for method, d in ops.items()]
SERVING = [operation for operation in ALL if TAGS.intersection(operation.described["tags"])]
EXAMPLES = [
    pytest.param(operation, example["value"], id=f"{operation.path} {name}")
    for operation in SERVING
    if "requestBody" in operation.described
    for name, example in operation.described["requestBody"]["content"]["application/json"]["examples"].items()
]


@pytest.fixture
def engine() -> FakeEngine:
    return _engine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(_app(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def _validate(value: Any, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator({**schema, "components": {"schemas": COMPONENTS}}).validate(value)


def _check_answer(operation: Operation, response: httpx.Response) -> None:
    """The response is one that the schema tells of, and says no more than that."""
    described = operation.described["responses"][str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    content = described["content"][media_type]
    if media_type == "application/json":
        _validate(response.json(), content["schema"])
        return
    data = content["itemSchema"]["properties"]["data"]
    json_data, end = data.get("anyOf", [data, {"const": None}])
    for event in events(response):
        if event != end["const"]:
            _validate(event, json_data["contentSchema"])


def _bodies() -> Iterator[str]:
    """The components that requests consist of."""
    names = {
        operation.described["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for operation in ALL
        if "requestBody" in operation.described
    }
    while names:
        name = names.pop()
        yield name
        names |= _references(COMPONENTS[name])


def _references(schema: Any) -> set[str]:
    if isinstance(schema, dict):
        own = {schema["$ref"].rpartition("/")[2]} if "$ref" in schema else set()
        return own.union(*map(_references, schema.values()))
    return set().union(*map(_references, schema)) if isinstance(schema, list) else set()


def _id(operation: Operation) -> str:
    return f"{operation.method.upper()} {operation.path}"


def test_operation_ids_are_names() -> None:
    ids = [operation.described["operationId"] for operation in ALL]
    assert len(set(ids)) == len(ids)
    assert all(name.isidentifier() and name.islower() for name in ids)
    assert {"create_completion", "create_chat_completion", "create_embeddings", "generate", "list_models"} <= set(ids)


@pytest.mark.parametrize("operation", ALL, ids=_id)
def test_each_route_is_described(operation: Operation) -> None:
    assert operation.described["summary"]
    assert operation.described["tags"]
    assert operation.path == "/health" or operation.described["description"]


@pytest.mark.parametrize("operation", SERVING, ids=_id)
def test_each_answer_has_a_schema(operation: Operation) -> None:
    responses = operation.described["responses"]
    errors = ERRORS[operation.surface]
    if "requestBody" not in operation.described and "parameters" not in operation.described:
        errors = errors - {"400", "404", "408", "413", "422"}
    assert responses.keys() == {"200", *errors}
    for status, response in responses.items():
        assert response["description"]
        assert response["content"], status
        for content in response["content"].values():
            assert content.get("schema") or content["itemSchema"], status
    for status in responses.keys() - {"200"}:
        error = "OpenAIError" if operation.surface == "/v1/" else "HuggingFaceError"
        assert responses[status]["content"] == {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}
        }


def test_what_streams_says_so() -> None:
    types = {operation.path: set(operation.described["responses"]["200"]["content"]) for operation in SERVING}
    both = {"application/json", "text/event-stream"}
    assert {path: media for path, media in types.items() if media != {"application/json"}} == {
        "/generate": both,
        "/generate_stream": {"text/event-stream"},
        "/v1/completions": both,
        "/v1/chat/completions": both,
    }


@pytest.mark.parametrize("name", sorted(set(_bodies())))
def test_each_field_of_a_request_is_described(name: str) -> None:
    properties = COMPONENTS[name]["properties"]
    assert properties
    assert [field for field, schema in properties.items() if not schema.get("description")] == []
    assert COMPONENTS[name]["additionalProperties"] is False


def test_each_reference_has_its_component() -> None:
    assert _references(SCHEMA) == set(COMPONENTS)


@pytest.mark.parametrize(("operation", "body"), EXAMPLES)
async def test_examples_are_valid_and_answered_as_described(
    client: httpx.AsyncClient, operation: Operation, body: dict[str, Any]
) -> None:
    _validate(body, operation.described["requestBody"]["content"]["application/json"]["schema"])
    response = await client.request(operation.method, operation.path.replace("{head}", "default"), json=body)
    assert response.status_code == 200, response.text
    _check_answer(operation, response)


RICH: list[tuple[str, dict[str, Any]]] = [  # requests whose answers have all that an answer can have
    (
        "/generate",
        {
            "inputs": "The fox",
            "parameters": {"best_of": 2, "do_sample": True, "decoder_input_details": True, "top_n_tokens": 2},
        },
    ),
    ("/generate", {"inputs": "The fox", "parameters": {"num_beams": 2, "num_return_sequences": 2, "details": True}}),
    ("/generate_stream", {"inputs": "The fox", "parameters": {"top_n_tokens": 2, "seed": 1, "do_sample": True}}),
    ("/classify", {"inputs": ["a", "b"], "parameters": {"candidate_labels": ["c", "d"]}}),
    ("/qa", {"inputs": [{"question": "a", "context": "b c"}] * 2, "parameters": {"top_k": 2}}),
    ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}),
    (
        "/v1/completions",
        {"prompt": "The fox", "logprobs": 2, "echo": True, "prompt_logprobs": 2, "return_token_ids": True},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "logprobs": True,
            "top_logprobs": 2,
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "max_tokens": 3,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "logprobs": True,
            "return_token_ids": True,
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
]


@pytest.mark.parametrize(("path", "body"), RICH)
async def test_rich_answers_are_as_described(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    (operation,) = (operation for operation in SERVING if operation.path == path)
    response = await client.post(path, json=body | ({"model": "gptj-demo"} if path.startswith("/v1/") else {}))
    assert response.status_code == 200, response.text
    _check_answer(operation, response)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("full", 3), 503),
        (RequestTimeoutError("late"), 504),
        (RequestFailedError("a stage was lost"), 500),
        (ZeroDivisionError("unforeseen"), 500),
    ],
)
@pytest.mark.parametrize(("operation", "body"), EXAMPLES[:: len(EXAMPLES) // 8])
async def test_failures_are_as_described(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    operation: Operation,
    body: dict[str, Any],
    error: Exception,
    status: int,
) -> None:
    engine.refusal = lambda request: error
    response = await client.request(operation.method, operation.path.replace("{head}", "default"), json=body)
    if engine.requests:  # the tokenizer's routes ask for nothing
        assert response.status_code == status
    _check_answer(operation, response)


@pytest.mark.parametrize("operation", [operation for operation in SERVING if operation.method == "post"], ids=_id)
@pytest.mark.parametrize("content", [b"{}", b"[", b'{"inputs": "\xff"}', b" " * (2 << 20), b'{"model": "other"}'])
async def test_refusals_are_as_described(client: httpx.AsyncClient, operation: Operation, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post(operation.path.replace("{head}", "x"), content=content, headers=headers)
    assert 400 <= response.status_code < 500
    _check_answer(operation, response)
