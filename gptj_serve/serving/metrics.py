"""Engine figures as Ray metrics, which Prometheus reads from Ray's own endpoint (with the prefix `ray_`)."""

import asyncio
from collections.abc import Callable

from ray.util.metrics import Gauge

from gptj_serve.types import EngineStats

PERIOD_S = 1.0


class EngineMetrics:
    """One gauge `gptj_<field>` per field of `EngineStats`, refreshed every second."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self._gauges = {
            name: Gauge(f"gptj_{name}", f"EngineStats.{name} of a pipeline replica")
            for name in EngineStats.__struct_fields__
        }

    async def run(self) -> None:
        while True:
            for name, value in self._stats().as_dict().items():
                self._gauges[name].set(value)
            await asyncio.sleep(PERIOD_S)
