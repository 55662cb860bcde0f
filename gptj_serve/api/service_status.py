"""`GET /status`: what is served, by what, and what it is doing."""

import asyncio
import time
from typing import cast

from gptj_serve import __version__
from gptj_serve.api.door.ongoing import OngoingRequests
from gptj_serve.api.service import Service
from gptj_serve.api.status import PipelineStatus, ScalingStatus, Status

CACHE_S = 0.5
"""The pipelines are asked at most so often, however many ask for the status."""


class ServiceStatus:
    def __init__(self, service: Service, ongoing: OngoingRequests) -> None:
        self._service = service
        self._ongoing = ongoing
        self.started_at = time.time()
        self._lock = asyncio.Lock()
        self._pipelines: list[PipelineStatus] = []
        self._problems: list[str] = []
        self._scaling: ScalingStatus | None = None
        self._collected_at = -CACHE_S

    async def get(self) -> Status:
        """What is served; per pipeline its stages, their steps, KV blocks in use, sequences and counters."""
        async with self._lock:
            if time.monotonic() - self._collected_at >= CACHE_S:
                (pipelines, self._problems), self._scaling = await asyncio.gather(
                    self._service.engine.status(), self._get_scaling()
                )
                self._pipelines = cast(list[PipelineStatus], pipelines)
                self._collected_at = time.monotonic()
        service = self._service
        return {
            "model": service.config.served_name,
            "version": __version__,
            "uptime_s": max(0.0, time.time() - self.started_at),
            "tasks": service.tasks,
            "heads": {name: info.kind.value for name, info in service.named_heads.items()},
            "max_model_len": service.model.n_positions,
            "ingress": {
                "num_requests": self._ongoing.num_requests,
                "max_requests": self._ongoing.max_requests,
            },
            "pipelines": self._pipelines,
            "scaling": self._scaling,
            "problems": self._problems,
        }

    async def _get_scaling(self) -> ScalingStatus | None:
        scaling = self._service.config.autoscaling
        if scaling is None:
            return None
        return {
            "min_pipelines": scaling.min_pipelines,
            "max_pipelines": scaling.max_pipelines,
            "changes": await self._service.engine.pipeline_changes(),
        }
