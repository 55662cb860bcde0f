"""The HTTP application: routes over a `Service`, known by nothing but that."""

import time
from typing import Any

from fastapi import FastAPI, Request

from gptj_serve import __version__
from gptj_serve.api import huggingface, openai, page
from gptj_serve.api.body_limit import BodyLimit
from gptj_serve.api.errors import install_error_handlers
from gptj_serve.api.service import Service


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="gptj_serve",
        version=__version__,
        summary=f"{service.config.served_name}: text generation, classification and extractive question answering",
    )
    app.add_middleware(BodyLimit, max_body_bytes=service.config.ingress.max_body_bytes)
    app.state.service = service
    app.state.started_at = int(time.time())
    install_error_handlers(app)
    app.include_router(huggingface.router)
    app.include_router(openai.router)
    app.include_router(page.router)
    app.get("/health", tags=["Operations"], summary="Is the service live?")(health)
    app.get("/status", tags=["Operations"], summary="What each pipeline is doing")(status)
    return app


async def health() -> dict[str, str]:
    return {"status": "ok"}


async def status(request: Request) -> dict[str, Any]:
    """Per pipeline: its stages and their layers, KV blocks in use, running and waiting sequences, counters."""
    service: Service = request.app.state.service
    return {
        "model": service.config.served_name,
        "version": __version__,
        "tasks": service.tasks,
        "pipelines": await service.engine.status(),
    }
