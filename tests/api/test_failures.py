"""What a client sees when the service can't answer, and what the engine sees when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from calls import Call, events
from fakes import FakeEngine
from fastapi import FastAPI

from gptj_serve.api.streaming import merged
from gptj_serve.errors import OverloadedError, RequestFailedError, UnsatisfiableError

GENERATE = {"inputs": "The fox", "parameters": {"max_new_tokens": 10}}
COMPLETE = {"model": "tiny", "prompt": "The fox", "max_tokens": 10, "seed": 1}
CLASSIFY = {"inputs": ["one", "two"]}
QA = {"inputs": {"question": "Where?", "context": "The fox is here."}}

HUGGING_FACE = [
    ("/generate", GENERATE),
    ("/generate", GENERATE | {"stream": True}),
    ("/generate_stream", GENERATE),
    ("/classify", CLASSIFY),
    ("/qa", QA),
]
OPENAI = [("/v1/completions", COMPLETE), ("/v1/completions", COMPLETE | {"stream": True, "n": 2})]
CALLS = [*HUGGING_FACE, *OPENAI]
STREAMS = [("/generate_stream", GENERATE), ("/v1/completions", COMPLETE | {"stream": True})]


def _message(path: str, body: Any, openai_type: str, hugging_face_type: str) -> str:
    """The message of an error object, whose other keys must be as given."""
    if path.startswith("/v1/"):
        message = body["error"]["message"]
        assert body == {"error": {"message": message, "type": openai_type, "param": None, "code": None}}
    else:
        message = body["error"]
        assert body == {"error": message, "error_type": hugging_face_type}
    return message


@pytest.mark.parametrize(("path", "body"), CALLS)
@pytest.mark.parametrize(("retry_after_s", "header"), [(7.4, "8"), (7.0, "7"), (0.1, "1")])
async def test_overload(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any, retry_after_s: float, header: str
) -> None:
    engine.refusal = lambda request: OverloadedError("1024 requests are waiting", retry_after_s)
    response = await client.post(path, json=body)
    assert (response.status_code, response.headers["retry-after"]) == (503, header)
    assert _message(path, response.json(), "overloaded_error", "overloaded") == "1024 requests are waiting"


@pytest.mark.parametrize(("path", "body"), CALLS)
async def test_a_request_that_forbids_its_own_answer_is_at_fault(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any
) -> None:
    engine.fail_at = lambda request, index: UnsatisfiableError("no token is possible")
    response = await client.post(path, json=body)
    assert response.status_code == (400 if path.startswith("/v1/") else 422)
    assert _message(path, response.json(), "invalid_request_error", "validation") == "no token is possible"


@pytest.mark.parametrize(("path", "body"), CALLS)
@pytest.mark.parametrize(
    "failure", ["a stage was lost", RequestFailedError("a stage was lost")], ids=["event", "raised"]
)
async def test_failure_before_the_first_token(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any, failure: str | Exception
) -> None:
    engine.fail_at = lambda request, index: failure
    response = await client.post(path, json=body)
    assert response.status_code == 500
    assert _message(path, response.json(), "server_error", "generation") == "a stage was lost"
    assert engine.num_running == 0


@pytest.mark.parametrize(("path", "body"), CALLS)
async def test_an_unexpected_error_is_json_and_shows_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any
) -> None:
    engine.fail_at = lambda request, index: ZeroDivisionError("secret")
    response = await client.post(path, json=body)
    assert (response.status_code, response.headers["content-type"]) == (500, "application/json")
    assert _message(path, response.json(), "server_error", "internal").startswith("internal error")
    assert "secret" not in response.text
    assert "Traceback" not in response.text


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_failure_in_mid_stream_is_the_last_event(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any
) -> None:
    golden = events(await client.post(path, json=body))
    engine.fail_at = lambda request, index: "a stage was lost" if index == 3 else None
    *before, last = events(await client.post(path, json=body))
    assert _message(path, last, "server_error", "generation") == "a stage was lost"
    assert _content(before) == _content(golden[:3])


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_an_unexpected_error_in_mid_stream_is_the_last_event(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_at = lambda request, index: ZeroDivisionError("secret") if index == 3 else None
    *before, last = events(await client.post(path, json=body))
    assert _message(path, last, "server_error", "internal").startswith("internal error")
    assert len(before) == 3
    assert "secret" not in str(last)
    assert "ZeroDivisionError: secret" in caplog.text, "the log has what the client is not shown"


async def test_one_failing_choice_ends_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_at = lambda request, index: "lost" if request.sampling.seed == 2 and index == 3 else None
    response = await client.post("/v1/completions", json=COMPLETE | {"n": 3, "stream": True})
    *_, last = events(response)
    assert last["error"]["message"] == "lost"
    assert (engine.num_running, len(engine.aborted)) == (0, 2)
    response = await client.post("/v1/completions", json=COMPLETE | {"n": 3})
    assert (response.status_code, response.json()["error"]["message"]) == (500, "lost")
    assert (engine.num_running, len(engine.aborted)) == (0, 4)


async def test_one_failing_input_ends_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.pause_at = 0
    bad = engine.tokenizer.encode("two")
    engine.fail_at = lambda request, index: "lost" if request.prompt_token_ids == bad else None
    response = await client.post("/classify", json={"inputs": ["one", "two", "three"]})
    assert (response.status_code, response.json()["error"]) == (500, "lost")
    assert (engine.num_running, len(engine.aborted)) == (0, 2)


def _content(chunks: list[Any]) -> list[Any]:
    """The events without what differs from call to call."""
    return [
        {k: v for k, v in chunk.items() if k not in ("id", "created")} if isinstance(chunk, dict) else chunk
        for chunk in chunks
    ]


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_failing_requests_do_not_disturb_a_stream(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any
) -> None:
    golden = events(await client.post(path, json=body))
    engine.pause_at = 3
    stream = asyncio.create_task(client.post(path, json=body))
    while engine.num_running == 0:
        await asyncio.sleep(0)
    good = engine.requests[-1].request_id
    failures: list[str | Exception] = ["lost", ZeroDivisionError("bug"), RequestFailedError("lost")]
    for failure in failures:
        engine.fail_at = lambda request, index, failure=failure: None if request.request_id == good else failure
        statuses = [(await client.post(p, json=b)).status_code for p, b in CALLS]
        assert set(statuses) == {500}
    refused = [
        {"json": {"inputs": ""}},
        {"json": {"inputs": "The fox", "parameters": {"temperature": -1}}},
        {"content": b'{"inputs"', "headers": {"content-type": "application/json"}},
        {"content": b"x" * 9999, "headers": {"content-type": "application/json"}},
    ]
    assert [(await client.post("/generate", **request)).status_code for request in refused] == [422, 422, 422, 413]
    assert not stream.done()
    engine.resumed.set()
    assert _content(events(await stream)) == _content(golden)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_a_client_who_leaves_between_tokens_aborts_the_request(
    app: FastAPI, engine: FakeEngine, path: str, body: Any, spec_version: str
) -> None:
    engine.pause_at = 3
    async with Call(app, path, body, spec_version=spec_version) as call:
        assert len(await call.chunks(3)) == 3
        assert engine.num_running == 1
        leaving = asyncio.create_task(call.hang_up())
        if spec_version == "2.4":  # the server finds out when it sends the next token
            await asyncio.sleep(0)
            engine.resumed.set()
        await leaving
        assert (engine.num_running, engine.aborted) == (0, [engine.requests[0].request_id])


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(("path", "body"), STREAMS)
@pytest.mark.parametrize("stuck_after", [0, 3])
async def test_a_client_who_leaves_while_it_is_sent_to_aborts_the_request(
    app: FastAPI, engine: FakeEngine, path: str, body: Any, spec_version: str, stuck_after: int
) -> None:
    async with Call(app, path, body, spec_version=spec_version, stuck_after=stuck_after) as call:
        while engine.num_running == 0:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        await call.hang_up()
        assert (engine.num_running, engine.aborted) == (0, [engine.requests[0].request_id])


@pytest.mark.parametrize(("path", "body"), CALLS)
async def test_a_cancelled_call_aborts_its_requests(app: FastAPI, engine: FakeEngine, path: str, body: Any) -> None:
    """That is how Ray Serve tells a handler that its client has left."""
    engine.pause_at = 0
    async with Call(app, path, body) as call:
        async with asyncio.timeout(5):
            while engine.num_running == 0:
                await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert engine.aborted == []
        call.task.cancel()
        await asyncio.wait([call.task])
    assert engine.num_running == 0
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)


async def test_merged_streams_share_a_bounded_queue() -> None:
    """A stream whose items nobody takes is not read on without end."""
    num_made = 0

    async def endless() -> AsyncGenerator[int]:
        nonlocal num_made
        while True:
            num_made += 1
            yield num_made
            await asyncio.sleep(0)

    stream = merged([endless()])
    assert await anext(stream) == (0, 1)
    for _ in range(100):
        await asyncio.sleep(0)
    assert num_made < 5
    await stream.aclose()
