"""The line that is logged for each request, and what an observer of requests is told."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from fakes import FakeEngine
from fastapi import FastAPI

from gptj_serve.api.app import create_app
from gptj_serve.api.generation import GenerationParams, generate
from gptj_serve.api.request_context import RequestContext, answering, current_request
from gptj_serve.api.request_log import RequestLog
from gptj_serve.api.request_record import RequestRecord
from gptj_serve.api.service import Service
from gptj_serve.errors import OverloadedError, RateLimitedError, UnsatisfiableError
from gptj_serve.types import SamplingParams


class Notebook:
    """An `Observer` that keeps what it is told."""

    def __init__(self) -> None:
        self.ended_records: list[RequestRecord] = []
        self.first_tokens: list[float] = []
        self.next_tokens: list[float] = []

    def first_token(self, record: RequestRecord, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def next_token(self, seconds: float) -> None:
        self.next_tokens.append(seconds)

    def ended(self, record: RequestRecord) -> None:
        self.ended_records.append(record)

    @property
    def only(self) -> RequestRecord:
        (record,) = self.ended_records
        return record


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
async def client(service: Service, notebook: Notebook) -> Any:
    transport = httpx.ASGITransport(create_app(service, RequestLog(notebook)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def generation(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "Paris is", "parameters": {"max_new_tokens": 5} | parameters}


async def test_one_line_per_request(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    engine.script["Paris is"] = " the capital of France; Ljubljana is the capital of Slovenia."
    await client.post("/generate", json=generation())
    (line,) = caplog.records
    fields = vars(line)
    assert fields["request_id"] == engine.requests[0].request_id.rsplit("-", 2)[0] != ""
    num_prompt_tokens = len(engine.requests[0].prompt_token_ids)
    assert (fields["path"], fields["task"], fields["outcome"]) == ("POST /generate", "generate", "length")
    assert (fields["num_prompt_tokens"], fields["num_generated_tokens"]) == (num_prompt_tokens, 5)
    assert 0 < fields["ttft_s"] <= fields["e2e_s"]
    assert f"POST /generate: length; {num_prompt_tokens} prompt tokens, 5 generated, the first" in (line.getMessage())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 0, "echo": True}),
    ],
)
async def test_what_the_engine_had_nothing_to_do_with_has_its_line_too(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture, path: str, body: Any
) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    response = await client.post(path, json=body, headers={"X-Request-ID": "mine"})
    assert (response.status_code, engine.requests) == (200, [])
    (line,) = caplog.records
    assert re.fullmatch(rf"POST {path}: answered; done after \d\.\d{{3}} s", line.getMessage())
    assert (vars(line)["request_id"], vars(line)["outcome"]) == ("mine", "answered")


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/generate", {"inputs": "x", "parameters": {"temperature": -1}}, "parameters.temperature=-1: "),
        ("/v1/completions", {"model": "other", "prompt": "x"}, "model='other': this service has 'tiny' only"),
        ("/classify", b"{", "not valid JSON"),
        ("/v1/nowhere", {}, "POST /v1/nowhere: Not Found"),
        ("/generate", b" " * 5000, "over the limit of 4096 bytes"),
    ],
)
async def test_the_line_of_a_refusal_says_what_the_client_was_told(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, body: Any, told: str
) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    await client.post(path, content=content, headers={"Content-Type": "application/json"})
    (line,) = [record for record in caplog.records if record.name.startswith("gptj_serve")]
    assert line.getMessage().startswith(f"POST {path}: refused; ")
    assert told in line.getMessage()
    assert told in line.error


async def test_the_line_names_the_api_key(
    app_with: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    monkeypatch.setenv("GPTJ_SERVE_API_KEYS", "web=secret-0001")
    headers = {"X-API-Key": "secret-0001"}
    for path, body in (("/tokenize", {"prompt": "a"}), ("/classify", {"inputs": "a"})):
        assert (await client_of(app_with()).post(path, json=body, headers=headers)).status_code == 200
    assert [vars(line)["api_key"] for line in caplog.records] == ["web", "web"]
    assert all("; API key web; done after" in line.getMessage() for line in caplog.records)
    assert "secret" not in caplog.text


async def test_tokens_are_told_as_they_come(client: httpx.AsyncClient, notebook: Notebook) -> None:
    await client.post("/generate", json=generation(do_sample=True, num_return_sequences=3, ignore_eos=True))
    assert len(notebook.first_tokens) == 1  # of the request
    assert len(notebook.next_tokens) == 3 * 4  # of each sequence
    assert (notebook.only.num_sequences, notebook.only.num_generated_tokens) == (3, 15)


@pytest.mark.parametrize(
    ("path", "body", "task", "outcome", "num_generated"),
    [
        ("/generate", generation(), "generate", "length", 5),
        ("/generate_stream", generation(), "generate", "length", 5),
        ("/generate", generation(stop=["capital"]), "generate", "stop", 2),
        ("/generate", generation(max_new_tokens=60), "generate", "eos", None),
        ("/generate", generation(num_beams=2, max_new_tokens=3), "generate", "eos", None),
        ("/classify", {"inputs": ["a", "b"]}, "classify", "answered", 0),
        ("/qa", {"inputs": {"question": "a", "context": "b"}}, "qa", "answered", 0),
        ("/v1/completions", {"model": "tiny", "prompt": "Paris is", "max_tokens": 5}, "generate", "length", 5),
        ("/generate", generation(temperature=-1), None, "refused", 0),
        ("/v1/completions", {"model": "other", "prompt": "a"}, None, "refused", 0),
        ("/nowhere", {}, None, "refused", 0),
        ("/tokenize", {"prompt": "a"}, None, "answered", 0),
        ("/tokenize", {}, None, "refused", 0),
    ],
)
async def test_outcomes(
    client: httpx.AsyncClient, notebook: Notebook, engine: FakeEngine, path: str, body: Any, task: str | None,
    outcome: str, num_generated: int | None,
) -> None:  # fmt: skip
    engine.script["Paris is"] = " the capital of France; Ljubljana is the capital of Slovenia."
    await client.post(path, json=body)
    assert (notebook.only.task, notebook.only.outcome) == (task, outcome)
    if num_generated is not None:
        assert notebook.only.num_generated_tokens == num_generated
    else:
        assert notebook.only.num_generated_tokens > 0


async def test_other_requests_leave_no_record(client: httpx.AsyncClient, notebook: Notebook) -> None:
    for path in ("/health", "/status", "/v1/models", "/nowhere"):
        await client.get(path)
    assert notebook.ended_records == []


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("failure", "index", "outcome"),
    [("broken", 0, "failed"), ("broken", 2, "failed"), (KeyError("x"), 0, "failed"), (KeyError("x"), 2, "failed")],
)
async def test_failures(
    client: httpx.AsyncClient, notebook: Notebook, engine: FakeEngine, path: str, failure: Any, index: int, outcome: str
) -> None:
    engine.fail_at = lambda request, at: failure if at == index else None
    await client.post(path, json=generation())
    assert notebook.only.outcome == outcome
    assert notebook.only.num_generated_tokens == index


async def test_an_unexpected_error_in_a_stream_is_logged_with_its_request(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_at = lambda request, at: KeyError("x") if at == 2 else None
    await client.post("/generate_stream", json=generation())
    (line,) = [line for line in caplog.records if line.levelno == logging.ERROR]
    assert line.exc_info is not None
    assert vars(line)["request_id"] == engine.requests[0].request_id.rsplit("-", 2)[0]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(OverloadedError("full", 1.0), "overloaded"), (RateLimitedError("enough for this minute", 1.0), "refused")],
)
async def test_a_lack_of_room_is_told_from_the_clients_own_limits(
    client: httpx.AsyncClient, notebook: Notebook, engine: FakeEngine, error: OverloadedError, outcome: str
) -> None:
    engine.refusal = lambda request: error
    await client.post("/generate", json=generation())
    assert notebook.only.outcome == outcome


async def test_a_request_out_of_time(service: Service, notebook: Notebook, engine: FakeEngine) -> None:
    engine.pause_at = 1
    context = RequestContext("r", deadline=0.0)
    params = GenerationParams(SamplingParams(max_new_tokens=3))
    with pytest.raises(Exception, match="was not finished"), answering(context), RequestLog(notebook).recording("CALL"):
        [chunk async for chunk in generate(service, [1], params)]
    assert (notebook.only.request_id, notebook.only.outcome) == ("r", "timeout")


async def test_a_request_out_of_time_before_the_engine(
    client: httpx.AsyncClient, service: Service, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: Any, **__: Any) -> list[int]:
        await asyncio.sleep(5)
        return [1]

    monkeypatch.setattr(service, "encode_prompt", slow)
    response = await client.post("/generate", json=generation(), headers={"X-Request-Timeout": "0.05"})
    assert (response.status_code, notebook.only.task, notebook.only.outcome) == (504, None, "timeout")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_constraints_that_leave_nothing_are_a_refusal(
    client: httpx.AsyncClient, notebook: Notebook, engine: FakeEngine, path: str
) -> None:
    engine.fail_at = lambda request, at: UnsatisfiableError("no token is left") if at == 1 else None
    await client.post(path, json=generation())
    assert (notebook.only.outcome, notebook.only.num_generated_tokens) == ("refused", 1)


async def test_a_stream_that_is_closed_from_elsewhere(service: Service, notebook: Notebook) -> None:
    """Its context is not the one that it began in."""
    log = RequestLog(notebook)

    async def stream() -> AsyncGenerator[int]:
        with answering(RequestContext("r")), log.recording("CALL generate_stream"):
            yield 1
            yield 2

    items = stream()
    assert await asyncio.create_task(anext(items)) == 1
    await asyncio.create_task(items.aclose())
    assert (notebook.only.request_id, notebook.only.outcome) == ("r", "aborted")
    assert current_request().request_id != "r"


async def test_a_client_that_leaves(service: Service, notebook: Notebook, engine: FakeEngine) -> None:
    engine.pause_at = 2
    log = RequestLog(notebook)

    async def call() -> None:
        with log.recording("CALL generate"):
            async with aclosing(generate(service, [1], GenerationParams(SamplingParams(max_new_tokens=3)))) as chunks:
                async for _ in chunks:
                    pass

    task = asyncio.create_task(call())
    while not engine.requests or not notebook.first_tokens:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert notebook.only.outcome == "aborted"
