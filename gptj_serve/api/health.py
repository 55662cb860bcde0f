"""Routes for probes and operators: is the process live, are pipelines ready, what do they do, which version is this?"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from typing_extensions import TypedDict

from gptj_serve import __version__
from gptj_serve.api.huggingface_responses import HuggingFaceError
from gptj_serve.api.service_status import ServiceStatus
from gptj_serve.api.status import ScalingStatus, Status

router = APIRouter(tags=["Operations"])

RETRY_AFTER_S = 2


class PipelineReadiness(TypedDict):
    replica_id: str
    is_ready: bool


class Readiness(TypedDict):
    is_ready: bool
    pipelines: list[PipelineReadiness]  # that answered; /status, which may need a key, tells of the others
    scaling: ScalingStatus | None


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Is the service live?")
async def health() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Is there a pipeline to work?", responses={503: {"model": Readiness}})
async def ready(request: Request) -> Any:
    """200 if at least one pipeline is ready, or if there is none and requests start one. Else 503 with Retry-After."""
    status = await _status(request)
    pipelines: list[PipelineReadiness] = [
        {"replica_id": each["replica_id"], "is_ready": each["is_ready"]} for each in status["pipelines"]
    ]
    scaling = status["scaling"]
    may_be_none = scaling is not None and scaling["min_pipelines"] == 0 and not status["problems"]
    is_ready = any(each["is_ready"] for each in pipelines) or (may_be_none and not pipelines)
    body: Readiness = {"is_ready": is_ready, "pipelines": pipelines, "scaling": scaling}
    if is_ready:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_S)})


@router.head("/version", include_in_schema=False)
@router.get("/version", summary="Which version is this?")
async def version() -> dict[str, str]:
    """That of `gptj_serve`."""
    return {"version": __version__}


@router.get(
    "/status",
    summary="What each pipeline and its stages are doing",
    responses={401: {"model": HuggingFaceError, "description": "The API key is missing or not known."}},
)
async def status(request: Request) -> Status:
    """What is served; per pipeline its stages, their steps, KV blocks in use, sequences and counters."""
    return await _status(request)


async def _status(request: Request) -> Status:
    service_status: ServiceStatus = request.app.state.status
    return await service_status.get()
