"""The `Pipeline` deployment: one replica is one engine with its stages, in one placement group."""

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve

from gptj_serve.config import PipelineConfig, ServiceConfig
from gptj_serve.engine.engine import Engine
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import RequestFailedError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.serving.logs import use_serve_logging
from gptj_serve.serving.metrics import EngineMetrics
from gptj_serve.serving.ray_pipeline import RayPipeline
from gptj_serve.serving.stage_actor import StageSettings
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import EngineRequest, Event, is_terminal

logger = logging.getLogger(__name__)

DEFAULT_KV_SEQUENCES = 8
"""The KV pool's default capacity, in sequences of full length."""

IDLE_STREAM_S = 1.0
"""An event stream without requests ends after this time, so that it never delays a replica's shutdown."""


@dataclass(slots=True)
class _Outbox:
    """Events on their way to one ingress: whatever has gathered by the time it is read travels as one item."""

    events: list[Event] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    num_requests: int = 0


class Pipeline:
    """Takes requests from ingresses, each over its own stream of calls.

    `run` is one request: it stays open as long as the request does, so that Serve counts it, cancels it when its
    client leaves and reports it when this replica dies. Its tokens come through `events`, of which each ingress
    keeps one open here: a step's tokens for all requests of an ingress cross the handle as one item.
    """

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        use_serve_logging()
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        checkpoint = Checkpoint.open(config.checkpoint_dir)
        tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
        self._outboxes: dict[str, _Outbox] = {}
        self._outbox_of: dict[str, _Outbox] = {}  # by request id
        self._finished: dict[str, asyncio.Event] = {}  # by request id
        group = ray.util.get_current_placement_group()
        self._pipeline = RayPipeline(f"{config.served_name}/{self._replica_id}", config.pipeline, group)
        heads = {name: str(path.resolve()) for name, path in config.head_dirs.items()}
        await self._pipeline.start(stage_settings(config.pipeline, checkpoint, tokenizer.num_token_ids, heads))
        blocks = KVBlocks(_num_kv_blocks(config.pipeline, checkpoint), config.pipeline.kv_cache.block_size)
        limits = SchedulerLimits(
            num_stages=config.pipeline.num_stages,
            max_num_sequences=config.pipeline.scheduler.max_num_sequences,
            max_microbatch_tokens=config.pipeline.scheduler.max_microbatch_tokens,
            max_sequence_tokens=checkpoint.config.n_positions,
        )
        self._engine = Engine(
            Scheduler(limits, blocks, checkpoint.config.eos_token_ids), self._pipeline, self._distribute
        )
        self._metrics = EngineMetrics(self._engine.stats)
        background = contextvars.Context()  # outside any request: Serve cancels what is born inside one
        self._engine_task = asyncio.get_running_loop().create_task(self._engine.run(), context=background)
        self._metrics_task = asyncio.get_running_loop().create_task(self._metrics.run(), context=background)
        for index, stage in enumerate(self._pipeline.descriptions):
            logger.info(
                "stage %d of %d ready: layers %s, %s, %s, %d thread(s), %.1f MB weights, %.1f MB KV cache",
                index, len(self._pipeline.descriptions), stage["layers"], stage["device"], stage["dtype"],
                stage["num_threads"], stage["weight_bytes"] / 1e6, stage["kv_cache_bytes"] / 1e6,
            )  # fmt: skip

    async def run(self, ingress_id: str, encoded_request: bytes) -> AsyncGenerator[str]:
        """Serve one request: yields this replica's id once it is taken, and ends when it has ended."""
        if self._engine_task.done():
            raise RequestFailedError("this pipeline has stopped")
        request = msgspec.msgpack.decode(encoded_request, type=EngineRequest)
        outbox = self._outboxes.setdefault(ingress_id, _Outbox())
        self._engine.add(request)
        self._outbox_of[request.request_id] = outbox
        finished = self._finished[request.request_id] = asyncio.Event()
        outbox.num_requests += 1
        try:
            yield self._replica_id
            await finished.wait()
        finally:
            outbox.num_requests -= 1
            del self._outbox_of[request.request_id], self._finished[request.request_id]
            self._engine.abort(request.request_id)

    async def events(self, ingress_id: str, *, replica_id: str) -> AsyncGenerator[bytes]:
        """All events for one ingress, batched; `replica_id` is for the router, which brings the call here."""
        assert replica_id == self._replica_id, "the router sent an event stream to the wrong replica"
        outbox = self._outboxes.setdefault(ingress_id, _Outbox())
        while True:
            try:
                await asyncio.wait_for(outbox.arrived.wait(), IDLE_STREAM_S)
            except TimeoutError:
                if outbox.num_requests == 0:
                    self._outboxes.pop(ingress_id, None)
                    return
                continue
            outbox.arrived.clear()
            events, outbox.events = outbox.events, []
            if events:
                yield msgspec.msgpack.encode(events)

    async def status(self) -> dict[str, Any]:
        return {
            "replica_id": self._replica_id,
            "stages": self._pipeline.descriptions,
            "engine": self._engine.stats().as_dict(),
        }

    async def check_health(self) -> None:
        """Serve replaces this replica when its engine has stopped."""
        if self._engine_task.done():
            raise RuntimeError("the engine has stopped") from self._engine_task.exception()

    def __del__(self) -> None:
        if hasattr(self, "_pipeline"):
            self._pipeline.close()

    def _distribute(self, events: list[Event]) -> None:
        for event in events:
            outbox = self._outbox_of.get(event.request_id)
            if outbox is None:
                continue
            outbox.events.append(event)
            outbox.arrived.set()
            if is_terminal(event):
                self._finished[event.request_id].set()


def _num_kv_blocks(config: PipelineConfig, checkpoint: Checkpoint) -> int:
    num_tokens = config.kv_cache.num_tokens or DEFAULT_KV_SEQUENCES * checkpoint.config.n_positions
    return -(-num_tokens // config.kv_cache.block_size)


def stage_settings(
    config: PipelineConfig, checkpoint: Checkpoint, num_token_ids: int, heads: dict[str, str] | None = None
) -> list[StageSettings]:
    spans = partition(checkpoint.config.n_layer, config.num_stages, head_cost(checkpoint.config))
    uses_gpu = config.stage.num_gpus > 0
    return [
        StageSettings(
            checkpoint_dir=str(Path(checkpoint.directory).resolve()),
            layers=(span.start, span.stop),
            num_kv_blocks=_num_kv_blocks(config, checkpoint),
            block_size=config.kv_cache.block_size,
            dtype=_dtype(config, checkpoint, uses_gpu),
            num_token_ids=min(num_token_ids, checkpoint.config.vocab_size),
            num_stages=config.num_stages,
            num_threads=config.stage.num_threads,
            uses_gpu=uses_gpu,
            heads=heads or {},
        )
        for span in spans
    ]


def _dtype(config: PipelineConfig, checkpoint: Checkpoint, uses_gpu: bool) -> str:
    """`auto` is float32 on CPUs, where half precision gains little and may lack kernels; on GPUs as stored."""
    if config.dtype != "auto":
        return config.dtype
    stored = {"BF16": "bfloat16", "F16": "float16"}.get(checkpoint.stored_dtype, "float32")
    return stored if uses_gpu else "float32"
