"""The handle's methods answer what the routes of the same names do, to a job that knows nothing but Ray."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from tests.serving.service import URL, eventually

pytestmark = pytest.mark.serve

SEEDED = {"model": "gptj-demo", "seed": 7, "max_tokens": 8}
PROMPT = SEEDED | {"prompt": ["The President said", "The fox"], "n": 2}
CHAT = SEEDED | {"messages": [{"role": "user", "content": "Who are you?"}]}

CALLS = {
    "generate": ("/generate", {"inputs": "The President said", "parameters": {"seed": 7, "do_sample": True}}),
    "classify": ("/classify", {"inputs": ["what is my balance", "hello"], "parameters": {"top_k": 2}}),
    "qa": ("/qa", {"inputs": {"question": "Where does Anna live?", "context": "Anna lives in Paris."}}),
    "embed": ("/embed", {"inputs": ["what is my balance", "hello"]}),
    "complete": ("/v1/completions", PROMPT),
    "chat": ("/v1/chat/completions", CHAT),
    "tokenize": ("/tokenize", {"prompt": "The President said"}),
    "detokenize": ("/detokenize", {"tokens": [1, 2, 3]}),
}
STREAMS = {
    "generate_stream": ("/generate", {"inputs": "The President said", "parameters": {"max_new_tokens": 6}}),
    "complete_stream": ("/v1/completions", PROMPT | {"stream_options": {"include_usage": True}}),
    "chat_stream": ("/v1/chat/completions", CHAT),
}


@pytest.fixture
def handle(cluster: None) -> DeploymentHandle:
    return serve.get_app_handle("gptj")


def comparable(answer: Any) -> Any:
    """Without what no two answers share: ids and times; numbers as far as batches do not change them."""
    if isinstance(answer, dict):
        return {key: comparable(value) for key, value in answer.items() if key not in ("id", "created")}
    if isinstance(answer, list):
        return [comparable(value) for value in answer]
    return round(answer, 3) if isinstance(answer, float) else answer


@pytest.mark.parametrize("method", CALLS)
async def test_an_answer(handle: DeploymentHandle, http: httpx.AsyncClient, method: str) -> None:
    path, body = CALLS[method]
    expected = (await http.post(path, json=body)).json()
    assert "error" not in expected
    assert comparable(await getattr(handle, method).remote(body)) == comparable(expected)


def texts(chunks: Iterator[Any], method: str) -> dict[int, str]:
    """What each choice says."""
    said: dict[int, str] = {}
    for chunk in chunks:
        if method == "generate_stream":
            said[0] = said.get(0, "") + chunk["token"]["text"]
        for choice in chunk.get("choices", ()):
            piece = choice["text"] if method == "complete_stream" else choice["delta"].get("content", "")
            said[choice["index"]] = said.get(choice["index"], "") + piece
    return said


@pytest.mark.parametrize("method", STREAMS)
def test_a_stream(handle: DeploymentHandle, method: str) -> None:
    path, body = STREAMS[method]
    chunks = list(getattr(handle.options(stream=True), method).remote(body))
    assert len(chunks) > 3
    body = {key: value for key, value in body.items() if key != "stream_options"}
    whole = httpx.post(f"{URL}{path}", json=body, timeout=60).json()
    if method == "generate_stream":
        assert texts(iter(chunks), method) == {0: whole["generated_text"]}
        return
    expected = {
        choice["index"]: choice["text"] if method == "complete_stream" else choice["message"]["content"]
        for choice in whole["choices"]
    }
    assert texts(iter(chunks), method) == expected
    if method == "complete_stream":
        assert chunks[-1]["usage"] == whole["usage"]


async def test_a_cancelled_stream_ends_its_request(handle: DeploymentHandle, http: httpx.AsyncClient) -> None:
    body = SEEDED | {"prompt": "The President said", "max_tokens": 900, "ignore_eos": True}
    stream = handle.options(stream=True).complete_stream.remote(body)
    await anext(stream)
    stream.cancel()

    async def is_idle() -> bool:
        """nothing runs any more"""
        pipelines = (await http.get("/status")).json()["pipelines"]
        return all(pipeline["engine"]["num_running"] == 0 for pipeline in pipelines)

    await eventually(is_idle)


@pytest.mark.parametrize(
    ("method", "body", "named"),
    [
        ("complete", PROMPT | {"temperature": -1}, "temperature=-1"),
        ("complete", PROMPT | {"model": "gpt-4"}, "model='gpt-4'"),
        ("complete", PROMPT | {"stream": True}, "call complete_stream on handle.options"),
        ("generate", {"inputs": "x", "stream": True}, "call generate_stream on handle.options"),
        ("chat", CHAT | {"messages": []}, "messages"),
        ("embed", {"inputs": []}, "inputs"),
        ("tokenize", {}, "inputs"),
        ("detokenize", {"tokens": [99999]}, "tokens"),
    ],
)
def test_a_refusal(handle: DeploymentHandle, method: str, body: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        getattr(handle, method).remote(body).result()


def test_a_call_may_be_of_a_session(handle: DeploymentHandle) -> None:
    body = {"inputs": "The President said", "parameters": {"max_new_tokens": 5}}
    expected = handle.generate.remote(body).result()
    assert handle.options(session_id="user-7").generate.remote(body).result() == expected
    with pytest.raises(ValueError, match=r"session_id='user 7': must be 1 to 128 printable ASCII characters"):
        handle.options(session_id="user 7").generate.remote(body).result()


def test_a_refused_stream(handle: DeploymentHandle) -> None:
    with pytest.raises(ValueError, match="temperature=-1"):
        next(handle.options(stream=True).complete_stream.remote(PROMPT | {"temperature": -1}))
