"""The HTTP application: routes over a `Service`, known by nothing but that."""

import time

from fastapi import FastAPI

from gptj_serve import __version__
from gptj_serve.api import huggingface, openai
from gptj_serve.api.body_limit import BodyLimit
from gptj_serve.api.errors import install_error_handlers
from gptj_serve.api.request_record import RecordRequests, RequestLog
from gptj_serve.api.service import Service
from gptj_serve.api.service_status import ServiceStatus


def create_app(service: Service, request_log: RequestLog | None = None) -> FastAPI:
    """`request_log` takes note of the requests that are answered; a service that others share has one of its own."""
    request_log = request_log or RequestLog()
    app = FastAPI(
        title="gptj_serve",
        version=__version__,
        summary=f"{service.config.served_name}: text generation, classification and extractive question answering",
    )
    app.add_middleware(BodyLimit, max_body_bytes=service.config.ingress.max_body_bytes)
    app.add_middleware(RecordRequests, log=request_log)
    app.state.service = service
    app.state.started_at = int(time.time())
    install_error_handlers(app)
    app.include_router(huggingface.router)
    app.include_router(openai.router)
    app.get("/health", tags=["Operations"], summary="Is the service live?")(health)
    status = ServiceStatus(service, request_log)
    app.get("/status", tags=["Operations"], summary="What each pipeline and its stages are doing")(status.get)
    return app


async def health() -> dict[str, str]:
    return {"status": "ok"}
