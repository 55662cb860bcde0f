"""The HTTP application over a fake engine."""

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from calls import CHAT_TEMPLATE, TEXT
from fakes import SPECIAL_TOKEN, FakeEngine, small_model, small_tokenizer
from fastapi import FastAPI

from gptj_serve.api.app import create_app
from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.service import Service
from gptj_serve.config import AutoscalingConfig, IngressConfig, ServiceConfig
from gptj_serve.model.heads import HeadInfo, HeadKind

NAMED_HEADS = {
    "tone": HeadInfo(
        kind=HeadKind.CLASSIFIER,
        name="tone",
        labels=["angry", "calm", "sad"],
        problem_type="multi_label_classification",
        pooling="mean",
        backbone="-",
    ),
    "reader": HeadInfo(kind=HeadKind.QA, name="reader", backbone="-"),
}
HEADS = ("lm_head", "score", "qa_outputs")


@pytest.fixture(autouse=True)
def _no_keys_of_the_developers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTJ_SERVE_API_KEYS", raising=False)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(small_model(), small_tokenizer())


@pytest.fixture
def service(engine: FakeEngine) -> Service:
    config = ServiceConfig(model_name="tiny", ingress=IngressConfig(max_body_bytes=4096, max_batch_inputs=4))
    template = ChatTemplate(CHAT_TEMPLATE, {"eos_token": SPECIAL_TOKEN})
    return Service(config, engine.model, HEADS, engine.tokenizer, engine, NAMED_HEADS, template)


@pytest.fixture
def app_with(engine: FakeEngine) -> Callable[..., FastAPI]:
    """`app_with(**ingress)` → the application with these settings of `IngressConfig`."""

    def make(
        *, echoes_request_id: bool = True, autoscaling: AutoscalingConfig | None = None, **ingress: Any
    ) -> FastAPI:
        config = ServiceConfig(model_name="tiny", ingress=IngressConfig(**ingress), autoscaling=autoscaling)
        service = Service(config, engine.model, HEADS, engine.tokenizer, engine, NAMED_HEADS)
        return create_app(service, echoes_request_id=echoes_request_id)

    return make


@pytest.fixture
async def client_of() -> AsyncIterator[Callable[[FastAPI], httpx.AsyncClient]]:
    """`client_of(app)` → a client, closed at the test's end."""
    clients = []

    def make(app: FastAPI) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://test"))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def app(service: Service) -> FastAPI:
    return create_app(service)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A real server on a free port, in a thread of its own. Of the named heads it has "tone" and "reader"."""
    engine = FakeEngine(small_model(), small_tokenizer())
    engine.script |= {"The fox": TEXT, "u>The fox|a>": TEXT}
    template = ChatTemplate(CHAT_TEMPLATE, {})
    service = Service(ServiceConfig(), engine.model, HEADS, engine.tokenizer, engine, NAMED_HEADS, template)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()
