"""`GET /status`: what is served, by what, and what it is doing."""

import asyncio
import time
from typing import cast

from gptj_serve import __version__
from gptj_serve.api.request_record import RequestLog
from gptj_serve.api.service import Service
from gptj_serve.api.status import PipelineStatus, Status

CACHE_S = 0.5
"""The pipelines are asked at most so often, however many ask for the status."""


class ServiceStatus:
    def __init__(self, service: Service, request_log: RequestLog) -> None:
        self._service = service
        self._request_log = request_log
        self._started_at = time.monotonic()
        self._lock = asyncio.Lock()
        self._pipelines: list[PipelineStatus] = []
        self._problems: list[str] = []
        self._collected_at = -CACHE_S

    async def get(self) -> Status:
        """What is served; per pipeline its stages, their steps, KV blocks in use, sequences and counters."""
        async with self._lock:
            if time.monotonic() - self._collected_at >= CACHE_S:
                pipelines, self._problems = await self._service.engine.status()
                self._pipelines = cast(list[PipelineStatus], pipelines)
                self._collected_at = time.monotonic()
        service = self._service
        return {
            "model": service.config.served_name,
            "version": __version__,
            "uptime_s": time.monotonic() - self._started_at,
            "tasks": service.tasks,
            "heads": {name: info.kind.value for name, info in service.named_heads.items()},
            "max_model_len": service.model.n_positions,
            "ingress": {
                "num_requests": self._request_log.num_requests,
                "max_requests": service.config.ingress.max_ongoing_requests,
            },
            "pipelines": self._pipelines,
            "problems": self._problems,
        }
