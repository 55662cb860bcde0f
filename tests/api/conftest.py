"""The HTTP application over a fake engine."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, small_model, small_tokenizer
from fastapi import FastAPI

from gptj_serve.api.app import create_app
from gptj_serve.api.service import Service
from gptj_serve.config import IngressConfig, ServiceConfig
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
    return Service(config, engine.model, HEADS, engine.tokenizer, engine, NAMED_HEADS)


@pytest.fixture
def app_with(engine: FakeEngine) -> Callable[..., FastAPI]:
    """`app_with(**ingress)` → the application with these settings of `IngressConfig`."""

    def make(*, echoes_request_id: bool = True, **ingress: Any) -> FastAPI:
        config = ServiceConfig(model_name="tiny", ingress=IngressConfig(**ingress))
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
