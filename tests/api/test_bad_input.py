"""Bad input: a 4xx, an error object that names the field and its value, and nothing that reaches the engine."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, small_model
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from starlette._utils import get_route_path

from gptj_serve.api.app import create_app
from gptj_serve.api.errors import most_telling
from gptj_serve.api.openai_schemas import CompletionRequest
from gptj_serve.api.route_path import route_path
from gptj_serve.api.schema_types import Body
from gptj_serve.api.service import Service

LONG = "The quick brown fox. " * 20
JSON = {"content-type": "application/json"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


def _generate(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "The fox", "parameters": parameters}


def _classify(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "The fox", "parameters": parameters}


def _qa(**parameters: Any) -> dict[str, Any]:
    return {"inputs": {"question": "Where?", "context": "The fox is here."}, "parameters": parameters}


def _complete(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "The fox", **changes}


HUGGING_FACE: list[tuple[str, Any, str, Any]] = [  # path, body, field, value
    ("/generate", {"inputs": ""}, "inputs", ""),
    ("/generate", {"inputs": 5}, "inputs", 5),
    ("/generate", {"inputs": ["a"]}, "inputs", ["a"]),
    ("/generate", {"inputs": "\ud800"}, "inputs", "\ud800"),
    ("/generate", _generate(grammar={"type": "regex", "value": "\ud800"}), "parameters.grammar.value", "\ud800"),
    ("/generate", _generate(grammar={"type": "lark", "value": "\ud800"}), "parameters.grammar.value", "\ud800"),
    (
        "/generate",
        _generate(grammar={"type": "choice", "value": ["a", "\udfff"]}),
        "parameters.grammar.value.1",
        "\udfff",
    ),
    (
        "/generate",
        _generate(grammar={"type": "json", "value": {"properties": {"\ud800": {}}}}),
        "parameters.grammar.value.properties",
        "\ud800",
    ),
    (
        "/generate",
        _generate(grammar={"type": "json", "value": '{"const": "\\ud800"}'}),
        "parameters.grammar.value",
        '{"const": "\\ud800"}',
    ),
    ("/generate", _generate(cache_salt="\ud800"), "parameters.cache_salt", "\ud800"),
    ("/tokenize", {"inputs": "\ud800"}, "inputs", "\ud800"),
    ("/tokenize", {"prompt": "\ud800"}, "prompt", "\ud800"),
    ("/tokenize", {"prompt": "a", "model": "\ud800"}, "model", "\ud800"),
    ("/tokenize", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "\ud800"),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        "messages.0.content.0.text",
        "\ud800",
    ),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": {"b": ["\ud800"]}}},
        "chat_template_kwargs.a.b.0",
        "\ud800",
    ),
    ("/classify", {"inputs": ["\ud800"]}, "inputs.0", "\ud800"),
    ("/qa", {"inputs": {"question": "\ud800", "context": "a"}}, "inputs.question", "\ud800"),
    ("/embed", {"inputs": ["a", "\ud800"]}, "inputs.1", "\ud800"),
    ("/generate", {}, "inputs", None),
    ("/generate", [1], "body", [1]),
    ("/generate", "text", "body", "text"),
    ("/generate", {"inputs": "a", "Extra": 1}, "Extra", 1),
    ("/generate", {"inputs": "a", "list": 1}, "list", 1),
    ("/generate", {"inputs": "a", "with-hyphen": 1}, "with-hyphen", 1),
    ("/generate", {"inputs": "a", "stream": "maybe"}, "stream", "maybe"),
    ("/generate", {"inputs": "a", "parameters": 5}, "parameters", 5),
    ("/generate", {"inputs": "a", "parameters": None}, "parameters", None),
    ("/generate", _generate(unknown=1), "parameters.unknown", 1),
    ("/generate", _generate(Unknown={"a": 1}), "parameters.Unknown", {"a": 1}),
    ("/generate", _generate(max_tokens=1), "parameters.max_tokens", 1),
    ("/generate", _generate(temperature=-1), "parameters.temperature", -1),
    ("/generate", _generate(temperature="hot"), "parameters.temperature", "hot"),
    ("/generate", _generate(temperature=float("nan")), "parameters.temperature", float("nan")),
    ("/generate", _generate(temperature=float("inf")), "parameters.temperature", float("inf")),
    ("/generate", _generate(top_p=1.5), "parameters.top_p", 1.5),
    ("/generate", _generate(top_p=0), "parameters.top_p", 0),
    ("/generate", _generate(top_p=float("nan")), "parameters.top_p", float("nan")),
    ("/generate", _generate(top_k=-1), "parameters.top_k", -1),
    ("/generate", _generate(top_k=2.5), "parameters.top_k", 2.5),
    ("/generate", _generate(top_k=2**31), "parameters.top_k", 2**31),
    ("/generate", _generate(seed=-1), "parameters.seed", -1),
    ("/generate", _generate(seed=2**63), "parameters.seed", 2**63),
    ("/generate", _generate(max_new_tokens=0), "parameters.max_new_tokens", 0),
    ("/generate", _generate(max_new_tokens=None), "parameters.max_new_tokens", None),
    ("/generate", _generate(min_new_tokens=-1), "parameters.min_new_tokens", -1),
    ("/generate", _generate(min_new_tokens=2**31), "parameters.min_new_tokens", 2**31),
    ("/generate", _generate(stop=[""]), "parameters.stop.0", ""),
    ("/generate", _generate(stop=["a", "b" * 257]), "parameters.stop.1", "b" * 257),
    ("/generate", _generate(stop="a"), "parameters.stop", "a"),
    ("/generate", _generate(stop=["a"] * 17), "parameters.stop", ["a"] * 17),
    ("/generate", _generate(min_new_tokens=9, max_new_tokens=8), "parameters.min_new_tokens", 9),
    ("/generate", _generate(stop_token_ids=[-1]), "parameters.stop_token_ids.0", -1),
    ("/generate", _generate(stop_token_ids=[405]), "parameters.stop_token_ids", 405),
    ("/generate", _generate(stop_token_ids=[1] * 257), "parameters.stop_token_ids", [1] * 257),
    ("/generate", _generate(max_new_tokens=64), "parameters.max_new_tokens", 64),
    ("/generate", _generate(max_new_tokens=10**30), "parameters.max_new_tokens", 10**30),
    ("/generate", {"inputs": LONG}, "inputs", LONG),
    ("/generate_stream", {"inputs": LONG}, "inputs", LONG),
    ("/generate_stream", _generate(max_new_tokens=64), "parameters.max_new_tokens", 64),
    ("/generate_stream", _generate(temperature=-1), "parameters.temperature", -1),
    ("/generate", _generate(temperature=-1) | {"stream": True}, "parameters.temperature", -1),
    ("/classify", {"inputs": ""}, "inputs", ""),
    ("/classify", {"inputs": []}, "inputs", []),
    ("/classify", {"inputs": ["a", ""]}, "inputs.1", ""),
    ("/classify", {"inputs": ["a", 5]}, "inputs.1", 5),
    ("/classify", {"inputs": {"a": 1}}, "inputs", {"a": 1}),
    ("/classify", {"inputs": LONG}, "inputs", LONG),
    ("/classify", {"inputs": ["a"] * 5}, "inputs", 5),
    ("/classify", {}, "inputs", None),
    ("/classify", _classify(top_k=0), "parameters.top_k", 0),
    ("/classify", _classify(function_to_apply="tanh"), "parameters.function_to_apply", "tanh"),
    ("/classify", _classify(return_all_scores=True), "parameters.return_all_scores", True),
    ("/classify", {"inputs": "a", "stream": True}, "stream", True),
    ("/classify", {"inputs": "a", "model": "tune"}, "model", "tune"),
    ("/classify/tone", {"inputs": "a", "model": "default"}, "model", "default"),
    ("/classify/tone", _classify(candidate_labels=["a"]), "model", "tone"),
    ("/qa/reader", {"inputs": {"question": "a", "context": "b"}, "model": "default"}, "model", "default"),
    ("/classify", {"inputs": "a", "model": "reader"}, "model", "reader"),
    ("/classify", {"inputs": "a", "model": ""}, "model", ""),
    ("/classify", _classify(hypothesis_template="{}"), "parameters.hypothesis_template", "{}"),
    ("/classify", _classify(multi_label=True), "parameters.multi_label", True),
    ("/classify", _classify(candidate_labels=[]), "parameters.candidate_labels", []),
    ("/classify", _classify(candidate_labels=" , ,"), "parameters.candidate_labels", " , ,"),
    ("/classify", _classify(candidate_labels=["a", ""]), "parameters.candidate_labels.1", ""),
    ("/classify", _classify(candidate_labels=["a"], hypothesis_template="a"), "parameters.hypothesis_template", "a"),
    ("/classify", _classify(candidate_labels=["b", "a", "b"]), "parameters.candidate_labels", "b"),
    ("/classify", _classify(candidate_labels="a, b,a"), "parameters.candidate_labels", "a"),
    (
        "/classify",
        _classify(candidate_labels=["a"], hypothesis_template="{} {}"),
        "parameters.hypothesis_template",
        "{} {}",
    ),
    ("/classify", _classify(candidate_labels=["a"], top_k=1), "parameters.top_k", 1),
    (
        "/classify",
        _classify(candidate_labels=["a"], function_to_apply="none"),
        "parameters.function_to_apply",
        "none",
    ),
    ("/classify", {"model": "tone", **_classify(candidate_labels=["a"])}, "model", "tone"),
    (
        "/classify",
        {"inputs": ["a"] * 4, "parameters": {"candidate_labels": [str(n) for n in range(257)]}},
        "parameters.candidate_labels",
        257,
    ),
    ("/classify", {"inputs": LONG, "parameters": {"candidate_labels": "a"}}, "inputs", LONG),
    ("/qa", {"inputs": {"question": "a", "context": "b"}, "model": "tone"}, "model", "tone"),
    ("/qa", {"inputs": "Where?"}, "inputs", "Where?"),
    ("/qa", {"inputs": {"question": "Where?"}}, "inputs.context", None),
    ("/qa", {"inputs": {"question": "Where?", "context": 5}}, "inputs.context", 5),
    ("/qa", {"inputs": {"question": "", "context": "a"}}, "inputs.question", ""),
    ("/qa", {"inputs": {"question": "a", "context": ""}}, "inputs.context", ""),
    ("/qa", {"inputs": {"question": "a", "context": "b", "id": 7}}, "inputs.id", 7),
    ("/qa", {"inputs": []}, "inputs", []),
    ("/qa", {"inputs": [{"question": "a", "context": "b"}, {"question": "a"}]}, "inputs.1.context", None),
    ("/qa", {"inputs": [{"question": "a", "context": "b"}] * 5}, "inputs", 5),
    ("/qa", _qa(top_k=0), "parameters.top_k", 0),
    ("/qa", _qa(top_k=1001), "parameters.top_k", 1001),
    ("/qa", _qa(max_answer_len=0), "parameters.max_answer_len", 0),
    ("/qa", _qa(max_seq_len=65), "parameters.max_seq_len", 65),
    ("/qa", _qa(doc_stride=64), "parameters.doc_stride", 64),
    ("/qa", _qa(doc_stride=-1), "parameters.doc_stride", -1),
    ("/qa", _qa(max_question_len=0), "parameters.max_question_len", 0),
    ("/qa", _qa(topk=2), "parameters.topk", 2),
]

OPENAI: list[tuple[Any, str, Any]] = [  # body, field, value
    (_complete(prompt=""), "prompt", ""),
    (_complete(prompt=[]), "prompt", []),
    (_complete(prompt="\ud800"), "prompt", "\ud800"),
    (_complete(user="\ud800"), "user", "\ud800"),
    (_complete(guided_regex="\ud800"), "guided_regex", "\ud800"),
    (_complete(guided_choice=["\ud800"]), "guided_choice.0", "\ud800"),
    (_complete(guided_json={"enum": ["\ud800"]}), "guided_json.enum.0", "\ud800"),
    (_complete(structured_outputs={"json": {"\ud800": 1}}), "structured_outputs.json", "\ud800"),
    (_complete(prompt=["a", ""]), "prompt.1", ""),
    (_complete(prompt=[[]]), "prompt.0", []),
    (_complete(prompt=[[1], []]), "prompt.1", []),
    (_complete(prompt=[1, -1]), "prompt.1", -1),
    (_complete(prompt=[[1], [2, -1]]), "prompt.1.1", -1),
    (_complete(prompt=[1, 405]), "prompt", 405),
    (_complete(prompt=[[1], [2, 405]]), "prompt", 405),
    (_complete(prompt=5), "prompt", 5),
    (_complete(prompt=LONG), "prompt", LONG),
    (_complete(prompt=[1] * 64), "prompt", [1] * 64),
    (_complete(prompt=["a"] * 5), "prompt", 5),
    (_complete(prompt=["a"] * 2, n=3), "prompt", 6),
    ({"model": "tiny"}, "prompt", None),
    ({"prompt": "a"}, "model", None),
    (_complete(model=5), "model", 5),
    (_complete(max_tokens=0), "max_tokens", 0),
    (_complete(max_tokens=64), "max_tokens", 64),
    (_complete(prompt=[1] * 60, max_tokens=5), "max_tokens", 5),
    (_complete(min_tokens=-1), "min_tokens", -1),
    (_complete(min_tokens=2**31), "min_tokens", 2**31),
    (_complete(temperature=-1), "temperature", -1),
    (_complete(temperature=float("nan")), "temperature", float("nan")),
    (_complete(top_p=1.5), "top_p", 1.5),
    (_complete(top_p=0), "top_p", 0),
    (_complete(top_k=-2), "top_k", -2),
    (_complete(top_k=2**31), "top_k", 2**31),
    (_complete(n=0), "n", 0),
    (_complete(n=65), "n", 65),
    (_complete(seed=2**63), "seed", 2**63),
    (_complete(stop=""), "stop", ""),
    (_complete(stop=["a", ""]), "stop.1", ""),
    (_complete(stop=["a"] * 17), "stop", ["a"] * 17),
    (_complete(min_tokens=9, max_tokens=8), "min_tokens", 9),
    (_complete(stop_token_ids=[405]), "stop_token_ids", 405),
    (_complete(stream="maybe"), "stream", "maybe"),
    (_complete(stream_options={"include_usage": True, "x": 1}, stream=True), "stream_options.x", 1),
    (_complete(messages=[]), "messages", []),
    (_complete(Prompt="a"), "Prompt", "a"),
]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _encoded(body: Any) -> dict[str, Any]:
    """As `json=`, but with NaN and lone surrogates, which Python's JSON knows and httpx refuses."""
    return {"content": json.dumps(body).encode(), "headers": JSON}


def _case(case: tuple[Any, ...]) -> str:
    return f"{case[-2]}={_shortened(case[-1])[:25]}"


@pytest.mark.parametrize("case", HUGGING_FACE, ids=_case)
async def test_hugging_face_routes_name_the_field_and_value(
    client: httpx.AsyncClient, engine: FakeEngine, case: tuple[str, Any, str, Any]
) -> None:
    path, body, field, value = case
    response = await client.post(path, **_encoded(body))
    assert (response.status_code, response.headers["content-type"]) == (422, "application/json")
    error = response.json()
    assert (set(error), error["error_type"]) == ({"error", "error_type"}, "validation")
    assert error["error"].startswith(f"{field}={_shortened(value)}: ")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/generate", {"inputs": "a", "\ud800": 1}, "'\\ud800': Input should be a valid string"),
        ("/v1/completions", _complete(**{"\ud800": 1}), "'\\ud800': Input should be a valid string"),
        ("/v1/completions", _complete(logit_bias={"\ud800": 1}), "logit_bias='\\ud800': "),
        ("/v1/chat/completions", CHAT | {"metadata": {"\ud800": "a"}}, "metadata='\\ud800': "),
        ("/v1/chat/completions", CHAT | {"tools": [{"\ud800": "a"}]}, "tools.0='\\ud800': "),
    ],
)
async def test_a_key_that_is_no_unicode_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], message: str
) -> None:
    response = await client.post(path, **_encoded(body))
    assert response.status_code == (400 if path.startswith("/v1/") else 422)
    assert message in _message(path, response)


def test_no_body_has_a_field_that_takes_unchecked_values() -> None:
    """Pydantic looks into all types but `Any`."""
    bodies = [Body]
    for body in bodies:
        bodies += body.__subclasses__()
        for name, field in body.model_fields.items():
            assert "Any" not in str(field.annotation), f"{body.__name__}.{name}"
    assert len(bodies) > 15


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", OPENAI, ids=_case)
async def test_openai_routes_name_the_field_and_value(
    client: httpx.AsyncClient, engine: FakeEngine, case: tuple[Any, str, Any], stream: bool
) -> None:
    body, field, value = case
    response = await client.post("/v1/completions", **_encoded({"stream": stream, **body}))
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
    error = response.json()["error"]
    message = error["message"]
    assert response.json() == {
        "error": {"message": message, "type": "invalid_request_error", "param": field, "code": None}
    }
    assert message.startswith(f"{field}={_shortened(value)}: ")
    assert engine.requests == []


async def test_stream_options_without_a_stream_are_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/v1/completions", json=_complete(stream_options={"include_usage": True}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"
    assert response.json()["error"]["message"] == "stream_options={'include_usage': True}: goes with stream only"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/models/other"), ("GET", "/v1/models/some/other")]
)
async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient, method: str, path: str) -> None:
    name = path.removeprefix("/v1/models/") if method == "GET" else "other"
    response = await client.request(method, path, json=_complete(model=name) if method == "POST" else None)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert response.json()["error"]["message"] == f"model={name!r}: this service has 'tiny' only"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/chat", 404),
        ("GET", "/v1", 404),
        ("GET", "/generate", 405),
        ("DELETE", "/qa", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ],
)
async def test_unknown_paths_and_methods(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    message = f"{method} {path}: {'Not Found' if status == 404 else 'Method Not Allowed'}"
    if path.startswith("/v1/"):
        type_ = "invalid_request_error"
        assert response.json() == {"error": {"message": message, "type": type_, "param": None, "code": None}}
    else:
        assert response.json() == {"error": message, "error_type": "validation"}
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("prefix", ["", "/gptj", "/v1"])
async def test_errors_below_a_prefix(app: FastAPI, prefix: str) -> None:
    """Ray Serve sets `root_path` and leaves its prefix in the path."""
    transport = httpx.ASGITransport(app, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{prefix}") as client:
        for body in (_complete(temperature=-1), _complete(model="other"), {}):
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == (404 if body.get("model") == "other" else 400)
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert (await client.get("/v1/nowhere")).json()["error"]["type"] == "invalid_request_error"
        assert (await client.get("/nowhere")).json()["error_type"] == "validation"
        assert (await client.post("/generate", json={})).json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [("/a/b", "", "/a/b"), ("/a/b", "/a", "/b"), ("/ab", "/a", "/ab"), ("/a", "/a", ""), ("/b", "/a", "/b")],
)
def test_the_path_as_routes_know_it(path: str, root: str, below: str) -> None:
    scope = {"path": path, "root_path": root}
    assert route_path(scope) == get_route_path(scope) == below


ROUTES = [
    "/generate",
    "/generate_stream",
    "/classify",
    "/classify/tone",
    "/qa",
    "/qa/reader",
    "/embed",
    "/tokenize",
    "/detokenize",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
]


def _message(path: str, response: httpx.Response) -> str:
    body = response.json()
    return body["error"]["message"] if path.startswith("/v1/") else body["error"]


@pytest.mark.parametrize("path", ROUTES)
async def test_invalid_json(client: httpx.AsyncClient, path: str) -> None:
    for content in (b'{"inputs": ', b"", b"{'inputs': 'a'}", b"{} {}"):
        response = await client.post(path, content=content, headers=JSON)
        assert response.status_code == (400 if path.startswith("/v1/") else 422)
        if content:
            assert _message(path, response).startswith(f"body={content.decode()!r}: not valid JSON: ")
        else:
            assert _message(path, response) == "body=None: Field required"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content", [b'{"inputs": "\xff"}', b"[" * 3000, b"9" * 4096], ids=["utf-8", "deep", "digits"])
async def test_json_that_python_can_not_parse(client: httpx.AsyncClient, path: str, content: bytes) -> None:
    response = await client.post(path, content=content, headers=JSON)
    assert 400 <= response.status_code < 500
    assert "body" in _message(path, response)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_a_wrong_content_type_is_named(client: httpx.AsyncClient, path: str, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await client.post(path, content=b'{"inputs": "a"}', headers=headers)
    assert response.status_code == (400 if path.startswith("/v1/") else 422)
    assert _message(path, response) == f"Content-Type={content_type!r}: must be application/json"


async def test_json_by_another_name_is_accepted(client: httpx.AsyncClient) -> None:
    for content_type in ("application/json; charset=utf-8", "application/vnd.api+json"):
        response = await client.post("/generate", content=b'{"inputs": "a"}', headers={"content-type": content_type})
        assert response.status_code == 200


@pytest.mark.parametrize("path", [*ROUTES, "/nowhere", "/v1/nowhere"])
@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit(client: httpx.AsyncClient, engine: FakeEngine, path: str, declared: bool) -> None:
    num_read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield b" " * 1000

    response = await client.post(path, content=b" " * 4097 if declared else chunks(), headers=JSON)
    assert (response.status_code, response.headers["content-type"]) == (413, "application/json")
    size = "of 4097 bytes " if declared else ""
    assert _message(path, response) == f"POST {path}: the body {size}is over the limit of 4096 bytes"
    assert num_read < 10
    assert engine.requests == []


async def test_a_body_at_the_limit_is_accepted(client: httpx.AsyncClient) -> None:
    content = b'{"inputs": "a"}'.ljust(4096)
    assert (await client.post("/generate", content=content, headers=JSON)).status_code == 200


@pytest.mark.parametrize(
    ("head", "path", "body", "task"),
    [
        ("lm_head", "/generate", _generate(), "generation"),
        ("lm_head", "/generate_stream", _generate(), "generation"),
        ("score", "/classify", _classify(), "classification"),
        ("qa_outputs", "/qa", _qa(), "question answering"),
        ("lm_head", "/v1/completions", _complete(), "generation"),
    ],
)
async def test_a_checkpoint_without_the_head(service: Service, head: str, path: str, body: Any, task: str) -> None:
    service.heads = [h for h in service.heads if h != head]
    service.named_heads = {}
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(path, json=body)
        status = (await client.get("/status")).json()
    assert response.status_code == (404 if path.startswith("/v1/") else 422)
    assert _message(path, response).startswith(f"model='tiny': the checkpoint has no {task} head ({head})")
    assert len(status["tasks"]) == 2


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)))
def test_any_prompt_is_accepted_or_refused_with_a_value_that_is_in_it(prompt: Any) -> None:
    try:
        accepted = CompletionRequest.model_validate({"model": "tiny", "prompt": prompt})
    except ValidationError as error:
        details = most_telling(error.errors())
        value = prompt
        for part in (part for part in details["loc"][1:] if isinstance(part, int)):
            value = value[part]
        assert value is details["input"] or value == details["input"]
    else:
        TypeAdapter(list[str] | list[list[int]]).validate_python(accepted.prompts, strict=True)
        assert all(accepted.prompts)


def test_the_vocabulary_of_these_cases() -> None:
    """The token id that they refuse is the first that the model does not have."""
    assert small_model().vocab_size == 405
