"""Routes for probes, open to all: is the process live, are there pipelines, which version is this?"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from typing_extensions import TypedDict

from gptj_serve import __version__
from gptj_serve.api.service import EngineClient
from gptj_serve.errors import OverloadedError

router = APIRouter(tags=["Operations"])

CACHED_S = 0.5
RETRY_AFTER_S = 2.0


class PipelineReadiness(TypedDict):
    replica_id: str
    is_ready: bool


@dataclass(frozen=True, slots=True)
class Report:
    pipelines: list[PipelineReadiness]
    problem: str | None = None
    retry_after_s: float = RETRY_AFTER_S

    @property
    def is_ready(self) -> bool:
        return any(pipeline["is_ready"] for pipeline in self.pipelines)


class Readiness:
    """Asks the pipelines at most twice a second, once at a time, however many probes there are."""

    def __init__(self, engine: EngineClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._lock = asyncio.Lock()
        self._report = Report([])
        self._reported_at: float | None = None

    async def report(self) -> Report:
        async with self._lock:
            if self._reported_at is None or self._clock() - self._reported_at >= CACHED_S:
                self._report = await self._ask()
                self._reported_at = self._clock()
            return self._report

    async def _ask(self) -> Report:
        try:
            pipelines = await self._engine.status()
        except OverloadedError as error:
            return Report([], str(error), error.retry_after_s)
        return Report([{"replica_id": each["replica_id"], "is_ready": each["is_ready"]} for each in pipelines])


@router.get("/health", summary="Is the service live?")
async def health() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.get("/ready", summary="Is there a pipeline to work?")
async def ready(request: Request) -> JSONResponse:
    """200 if at least one pipeline is ready, else 503 with Retry-After."""
    readiness: Readiness = request.app.state.readiness
    report = await readiness.report()
    body: dict[str, Any] = {"is_ready": report.is_ready, "pipelines": report.pipelines}
    if report.problem is not None:
        body["problem"] = report.problem
    if report.is_ready:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": str(max(1, round(report.retry_after_s)))})


@router.get("/version", summary="Which version is this?")
async def version() -> dict[str, str]:
    return {"version": __version__}
