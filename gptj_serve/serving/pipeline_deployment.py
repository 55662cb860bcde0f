"""The `Pipeline` deployment: one replica is one engine with its stages, in one placement group."""

import asyncio
import contextvars
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import ray
import ray.serve.context
from ray import serve

from gptj_serve.config import PipelineConfig, ServiceConfig
from gptj_serve.engine.engine import Engine
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.milestones import Milestone
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import InvalidRequestError, OverloadedError
from gptj_serve.grammar import GrammarCompiler
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, open_heads
from gptj_serve.model.version import model_version, text_digest, weights_digest
from gptj_serve.pipeline.kv_room import Knobs
from gptj_serve.planner import plan_service
from gptj_serve.serving.handover import own_handover
from gptj_serve.serving.logs import NoAccessLines, serve_logs_json, use_serve_logging
from gptj_serve.serving.metrics import PipelineMetrics
from gptj_serve.serving.ray_pipeline import RayPipeline
from gptj_serve.serving.stage_actor import StageSettings
from gptj_serve.serving.startup import startup_lines
from gptj_serve.serving.tracing import EngineTracing, tracer
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import (
    EngineRequest,
    Event,
    LoadEvent,
    ModelVersion,
    OtherVersion,
    Overload,
    Refusal,
    is_terminal,
)
from gptj_serve.wire import WireDecoder

logger = logging.getLogger(__name__)

OBSERVATION_PERIOD_S = 1.0
"""How often the stages are asked what they do, and metrics and traces taken over from them."""

LOAD_PERIOD_S = 0.25
"""How often an ingress hears with its events how long the queue is."""

QUEUE_WAIT_TOLERANCE = 1.25
"""Of the longest wait that is allowed, a pipeline takes that much: what the ingresses go by is some moments old, and to
refuse a request here costs the service twice what it costs at their doors."""

IDLE_STREAM_S = 1.0
"""An event stream without requests ends after this time, so that it never delays a replica's shutdown: its ingress may
have died. One that keeps requests away from a pipeline without all its stages stays until they are back."""


_REQUESTS = WireDecoder[EngineRequest](EngineRequest)


@dataclass(slots=True)
class _Outbox:
    """Events on their way to one ingress: whatever has gathered by the time it is read travels as one item."""

    events: list[Event | LoadEvent] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    num_requests: int = 0
    num_streams: int = 0  # that read it; more than one only while an ingress opens its next

    def put(self, event: Event | LoadEvent) -> None:
        """Of the load only the newest counts."""
        if isinstance(event, LoadEvent):
            self.events = [other for other in self.events if not isinstance(other, LoadEvent)]
        self.events.append(event)
        self.arrived.set()

    @property
    def is_needed(self) -> bool:
        """Events of a request that is over may still wait: it can end before its ingress has opened a stream."""
        has_events = any(not isinstance(event, LoadEvent) for event in self.events)
        return self.num_requests > 0 or self.num_streams > 0 or has_events


class Pipeline:
    """Takes requests from ingresses, each over its own stream of calls.

    `run` is one request: it stays open as long as the request does, so that Serve counts it, cancels it when its
    client leaves and reports it when this replica dies. Its tokens come through `events`, of which each ingress
    keeps one open here: a step's tokens for all requests of an ingress cross the handle as one item.
    """

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        use_serve_logging(NoAccessLines())
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        checkpoint = Checkpoint.open(config.checkpoint_dir)
        tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
        self._outboxes: dict[str, _Outbox] = {}
        self._outbox_of: dict[str, _Outbox] = {}  # by request id
        self._finished: dict[str, asyncio.Event] = {}  # by request id
        group = ray.util.get_current_placement_group()
        self._pipeline = RayPipeline(f"{config.served_name}/{self._replica_id}", config.pipeline, group)
        heads = open_heads(config.head_dirs, checkpoint)
        settings = stage_settings(config.pipeline, checkpoint, tokenizer.num_token_ids, heads, serve_logs_json())
        named_heads = {name: head.info for name, head in heads.items()}
        text = text_digest(checkpoint, heads)  # as of now: whatever is put there while stages load isn't served
        await self._pipeline.start(settings)
        agreed = self._pipeline.settings[0]
        arithmetic = [agreed.dtype, agreed.quantization, agreed.kernels, agreed.deterministic]
        self._version = model_version(text, agreed.weights_digest, " ".join(map(str, arithmetic)))
        assert agreed.num_kv_blocks is not None, "stages start with a KV pool"
        self._num_kv_blocks = agreed.num_kv_blocks
        blocks = KVBlocks(
            self._num_kv_blocks,
            agreed.block_size,
            reuse_prefixes=config.pipeline.kv_cache.reuse_prefixes,
        )
        self._grammars = GrammarCompiler(tokenizer, checkpoint.config.eos_token_ids)
        max_queue_wait_s = config.pipeline.scheduler.max_queue_wait_s
        limits = SchedulerLimits(
            num_stages=config.pipeline.num_stages,
            max_num_sequences=config.pipeline.scheduler.max_num_sequences,
            max_microbatch_tokens=config.pipeline.scheduler.max_microbatch_tokens,
            max_sequence_tokens=checkpoint.config.n_positions,
            max_queue_wait_s=math.inf if max_queue_wait_s is None else QUEUE_WAIT_TOLERANCE * max_queue_wait_s,
            schedules_ahead=config.pipeline.schedules_ahead,
        )
        self._metrics = PipelineMetrics(config.served_name)
        own_tracer = tracer()
        self._tracing = None if own_tracer is None else EngineTracing(own_tracer)
        scheduler = Scheduler(limits, blocks, checkpoint.config.eos_token_ids, on_milestone=self._on_milestone)
        self._engine = Engine(scheduler, self._pipeline, self._distribute, self._tell_readiness)
        self._closing = False
        background = contextvars.Context()  # outside any request: Serve cancels what is born inside one
        self._engine_task = asyncio.get_running_loop().create_task(self._engine.run(), context=background)
        self._engine_task.add_done_callback(self._end_process)
        self._observer_task = asyncio.get_running_loop().create_task(self._observe(), context=background)
        url = await asyncio.to_thread(_service_url)
        for line in startup_lines(config, checkpoint, named_heads, self._pipeline.descriptions, blocks, url):
            logger.info("%s", line)
        await asyncio.to_thread(own_handover(self._version.text).pipeline_is_loaded)

    async def run(
        self, ingress_id: str, encoded_request: bytes, *, avoid: frozenset[str] = frozenset(), prefer: str = ""
    ) -> AsyncGenerator[str | bytes]:
        """Serve one request: yields this replica's id once it is taken, and ends when it has ended.

        A request that can't be taken gets a `Refusal`, an `Overload` or an `OtherVersion` instead: of what is raised
        here, Serve logs the traceback. `avoid` and `prefer` are for the router, which brings the call to a replica
        not in there, and to the preferred one if it can.
        When the engine stops, so does this process. Raises `WireError` for what is no request: an ingress of another
        version.
        """
        assert self._replica_id not in avoid, "the router sent a request to a replica to be avoided"
        request = _REQUESTS.decode(encoded_request)
        version = self._version
        is_understood = request.text_version in ("", version.text)
        if not is_understood or request.numbers_version not in ("", version.numbers):
            yield msgspec.msgpack.encode(OtherVersion(self._replica_id, version))
            return
        grammar = request.sampling.grammar if request.sampling is not None else None
        try:
            matcher = None if grammar is None else await self._grammars.compile_async(grammar)
            if self._tracing is not None:
                request = self._tracing.begin(request)
            self._engine.add(request, matcher)
        except (InvalidRequestError, OverloadedError) as error:
            if self._tracing is not None:
                self._tracing.end(request.request_id)
            if isinstance(error, OverloadedError):
                wait_s = self._engine.queue_wait_s()
                yield msgspec.msgpack.encode(Overload(str(error), error.retry_after_s, self._replica_id, wait_s))
            else:
                yield msgspec.msgpack.encode(Refusal(error.field, error.value, error.reason), enc_hook=repr)
            return
        # No await since it was added, so no event was lost, and none until the outbox counts it: else that is dropped.
        outbox = self._outbox_of[request.request_id] = self._outboxes.setdefault(ingress_id, _Outbox())
        finished = self._finished[request.request_id] = asyncio.Event()
        outbox.num_requests += 1
        try:
            yield self._replica_id
            await finished.wait()
        finally:
            outbox.num_requests -= 1
            del self._outbox_of[request.request_id], self._finished[request.request_id]
            self._engine.abort(request.request_id)
            if self._tracing is not None:
                self._tracing.end(request.request_id)
            self._drop_if_not_needed(ingress_id, outbox)

    async def events(self, ingress_id: str, *, replica_id: str) -> AsyncGenerator[bytes]:
        """All events for one ingress, batched; `replica_id` is for the router, which brings the call here."""
        assert replica_id == self._replica_id, "the router sent an event stream to the wrong replica"
        outbox = self._outboxes.setdefault(ingress_id, _Outbox())
        outbox.num_streams += 1
        try:
            # First of all "here": the ingress waits for it for a limited time.
            load_told_at = time.monotonic()
            yield msgspec.msgpack.encode([self._load(outbox, self._version)])
            while True:
                try:
                    await asyncio.wait_for(outbox.arrived.wait(), IDLE_STREAM_S)
                except TimeoutError:
                    if outbox.num_requests == 0 and self._engine.is_ready:
                        return
                outbox.arrived.clear()
                events, outbox.events = outbox.events, []
                if time.monotonic() - load_told_at > LOAD_PERIOD_S:
                    events.append(self._load(outbox))
                    load_told_at = time.monotonic()
                if events:
                    yield msgspec.msgpack.encode(events)
        finally:
            outbox.num_streams -= 1
            self._drop_if_not_needed(ingress_id, outbox)

    def _drop_if_not_needed(self, ingress_id: str, outbox: _Outbox) -> None:
        if not outbox.is_needed and self._outboxes.get(ingress_id) is outbox:
            del self._outboxes[ingress_id]

    async def status(self) -> dict[str, Any]:
        """As `api.status.PipelineStatus`; of the stages what they told last, so it never waits for one."""
        return {"replica_id": self._replica_id, **self._engine.status()}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for it, where the number of pipelines is not fixed, and gives it to `PipelineScaling`."""
        return self._engine.load()._asdict()

    def __del__(self) -> None:
        self._closing = True
        for task in ("_engine_task", "_observer_task"):
            if hasattr(self, task):
                getattr(self, task).cancel()
        if hasattr(self, "_pipeline"):
            self._pipeline.close()

    async def _observe(self) -> None:
        while True:
            try:
                stats = self._engine.stats()  # before the stages', which so are never behind it
                reports = await self._pipeline.collect_reports()
                stages = self._pipeline.stage_statuses()
                self._metrics.report(stats, stages, reports)
                if self._tracing is not None:
                    self._tracing.on_reports(stages, reports)
            except Exception:
                logger.exception("what the stages do could not be told this time")
            await asyncio.sleep(OBSERVATION_PERIOD_S)

    def _on_milestone(self, milestone: Milestone, request: EngineRequest, elapsed_s: float) -> None:
        self._metrics.on_milestone(milestone, request, elapsed_s)
        if self._tracing is not None:
            self._tracing.on_milestone(milestone, request, elapsed_s)

    def _end_process(self, engine_task: asyncio.Task[None]) -> None:
        """A replica without an engine must not look idle to the router until Serve's health check finds out."""
        if not self._closing and not engine_task.cancelled():
            logger.critical("the engine has stopped, ending this process: %r", engine_task.exception())
            logging.shutdown()
            os._exit(1)

    def _load(self, outbox: _Outbox, version: ModelVersion | None = None) -> LoadEvent:
        engine = self._engine
        num_others = len(self._outbox_of) - outbox.num_requests
        waiting = tuple(id_ for id_ in engine.waiting_request_ids() if self._outbox_of.get(id_) is outbox)
        num_kv_blocks = 0 if version is None else self._num_kv_blocks
        wait_s, num_waiting = engine.queue_wait_s(), engine.num_waiting
        return LoadEvent(engine.is_ready, wait_s, version, num_others, num_waiting, waiting, num_kv_blocks)

    def _tell_readiness(self, _: bool) -> None:
        for outbox in self._outboxes.values():
            outbox.put(self._load(outbox))

    def _distribute(self, events: list[Event]) -> None:
        if self._tracing is not None:
            self._tracing.on_events(events)
        for event in events:
            outbox = self._outbox_of.get(event.request_id)
            if outbox is None:
                continue
            outbox.put(event)
            if is_terminal(event):
                self._finished[event.request_id].set()


def _service_url() -> str:
    """Of this application, which may have a route prefix."""
    client = ray.serve.context._get_global_client()
    application = client.get_serve_details()["applications"].get(serve.get_replica_context().app_name, {})
    return f"{client.root_url}{application.get('route_prefix') or ''}".rstrip("/")


def stage_settings(
    config: PipelineConfig,
    checkpoint: Checkpoint,
    num_token_ids: int,
    heads: Mapping[str, HeadCheckpoint] | None = None,
    logs_json: bool = False,
) -> list[StageSettings]:
    heads = heads or {}
    plan, digest = plan_service(config, checkpoint), weights_digest(checkpoint, heads)
    uses_gpu = config.stage.num_gpus > 0
    knobs = Knobs(
        num_stages=config.num_stages,
        dtype=config.dtype,
        quantization=config.quantization,
        max_microbatch_tokens=config.scheduler.max_microbatch_tokens,
        max_num_sequences=config.scheduler.max_num_sequences,
        num_kv_tokens=config.kv_cache.num_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    return [
        StageSettings(
            checkpoint_dir=str(Path(checkpoint.directory).resolve()),
            layers=(stage.layers.start, stage.layers.stop),
            num_kv_blocks=None if config.sizes_kv_pool_from_memory else plan.num_kv_blocks,
            block_size=plan.resources.block_size,
            dtype="auto" if config.dtype == "auto" and uses_gpu else plan.resources.dtype,
            weight_bytes=stage.weight_bytes,
            num_token_ids=min(num_token_ids, checkpoint.config.vocab_size),
            num_stages=config.num_stages,
            num_threads=config.stage.num_threads,
            pin_cores=config.stage.pin_cores,
            uses_gpu=uses_gpu,
            gpu_share=config.stage.num_gpus,
            max_sequence_tokens=checkpoint.config.n_positions,
            knobs=knobs,
            heads={name: str(head.directory.resolve()) for name, head in heads.items()},
            deterministic=config.deterministic,
            quantization=config.quantization,
            kernels=config.kernels,
            logs_json=logs_json,
            weights_digest=digest,
        )
        for stage in plan.stages
    ]
