"""The HTTP application: routes over a `Service`, known by nothing but that, behind a door."""

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from gptj_serve import __version__
from gptj_serve.api import health, huggingface, openai, page, tokenization_routes
from gptj_serve.api.door.door import DOCS_ASSETS, Door
from gptj_serve.api.door.key_ring import KeyRing
from gptj_serve.api.door.ongoing import OngoingRequests
from gptj_serve.api.door.request_headers import REQUEST_ID, RequestHeaders
from gptj_serve.api.errors import install_error_handlers
from gptj_serve.api.request_log import RecordRequests, RequestLog
from gptj_serve.api.route_docs import describe, operation_id
from gptj_serve.api.service import Service
from gptj_serve.api.service_status import ServiceStatus


def create_app(service: Service, request_log: RequestLog | None = None, *, echoes_request_id: bool = True) -> FastAPI:
    """`request_log` takes note of the requests that are answered; a service that others share has one of its own.

    `echoes_request_id`: answer with the request's `X-Request-ID`, where nobody in front of this does. Raises
    `ConfigError` if the API keys can't be used.
    """
    request_log = request_log or RequestLog()
    app = FastAPIOffline(  # /docs asks nobody else for its scripts
        redoc_url=None,
        static_url=DOCS_ASSETS,
        title="gptj_serve",
        version=__version__,
        summary=f"{service.config.served_name}: text generation, classification and extractive question answering",
        generate_unique_id_function=operation_id,
    )
    describe(app)
    app.state.service = service
    app.state.ongoing = OngoingRequests(
        service.config.ingress.max_ongoing_requests, lambda: service.engine.queue_wait_s()
    )
    app.state.status = ServiceStatus(service, app.state.ongoing)
    _install_door(app, service, request_log, echoes_request_id)
    install_error_handlers(app)
    app.include_router(huggingface.router)
    app.include_router(openai.router)
    app.include_router(tokenization_routes.router)
    app.include_router(page.router)
    app.include_router(health.router)
    return app


def _install_door(app: FastAPI, service: Service, request_log: RequestLog, echoes_request_id: bool) -> None:
    """From the inside to the outside: what is added last sees a request first."""
    config = service.config.ingress
    app.add_middleware(
        Door,
        config=config,
        keys=KeyRing(config.api_keys_path),
        ongoing=app.state.ongoing,
        queue_wait_s=lambda: service.engine.queue_wait_s(),
        max_queue_wait_s=service.config.pipeline.scheduler.max_queue_wait_s,
    )
    app.add_middleware(RecordRequests, log=request_log)
    app.add_middleware(RequestHeaders, request_timeout_s=config.request_timeout_s, echoes_request_id=echoes_request_id)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
