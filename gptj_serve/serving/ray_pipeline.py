"""`RayPipeline`: stages as Ray actors in the replica's placement group, linked over ZeroMQ."""

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
import zmq
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gptj_serve.config import HandoffKind, PipelineConfig
from gptj_serve.errors import PipelineError
from gptj_serve.pipeline.handoff_choice import StagePlace, choose_handoff
from gptj_serve.pipeline.sockets import CurveKeys
from gptj_serve.pipeline.step_links import StepLinks
from gptj_serve.serving.bring_up import StartingStage, bring_up
from gptj_serve.serving.stage_actor import GPTJStage, StageReport, StageSettings
from gptj_serve.steps import MicroBatch, StepOutput

logger = logging.getLogger(__name__)

HUNG_STOP_TIMEOUT_S = 1.0
"""After a step that timed out, a stage whose loop does not stop within this time, and that of a long step, hangs."""

REPORT_TIMEOUT_S = 1.0

DIRECTORY_PREFIX = "gptj_serve-"


@dataclass(slots=True)
class _Stage:
    settings: StageSettings
    actor: ActorHandle
    description: dict[str, Any] = field(default_factory=dict)
    handoff: HandoffKind | None = None  # by which hidden states come from the stage before
    is_loaded: bool = False  # the actor's start was seen through to its end
    num_restarts: int = 0
    measured: dict[str, Any] = field(default_factory=lambda: dict(NOT_MEASURED))
    report: asyncio.Task[StageReport] | None = None  # asked for


NOT_MEASURED: dict[str, Any] = {"memory_bytes": 0, "busy_ratio": 0.0, "handoff_s": None, "steps": []}
"""Of a stage that has not reported yet."""


class RayPipeline:
    """Implements the engine's `Pipeline` over stage actors, one in each bundle of the group but the first.

    The first bundle is the replica's own. A lost stage is replaced in its bundle; the others keep their weights.
    """

    def __init__(self, name: str, config: PipelineConfig, group: PlacementGroup) -> None:
        self._name = name
        self._config = config
        self._group = group
        self._stages: list[_Stage] = []
        self._links: StepLinks | None = None
        self._directory: str | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._num_started = 0

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """Per stage: layers, device, dtype, memory, process."""
        return [stage.description for stage in self._stages]

    def stage_statuses(self) -> list[dict[str, Any]]:
        """As `api.status.StageStatus`, with what `collect_reports` last brought."""
        return [
            {
                "stage_index": index,
                **{key: value for key, value in stage.description.items() if key not in ("node_id", "gpu_uuid")},
                "handoff": stage.handoff,
                "num_restarts": stage.num_restarts,
                **stage.measured,
            }
            for index, stage in enumerate(self._stages)
        ]

    async def collect_reports(self) -> list[StageReport | None]:
        """Ask every stage for its report; None for one that does not answer in `REPORT_TIMEOUT_S`.

        A stage that owes a report is not asked for another one.
        """
        stages = list(self._stages)
        for stage in stages:
            if stage.report is None:
                stage.report = asyncio.create_task(_report_of(stage.actor))
        await asyncio.wait([stage.report for stage in stages if stage.report is not None], timeout=REPORT_TIMEOUT_S)
        reports: list[StageReport | None] = []
        for stage in stages:
            reports.append(None)
            if stage.report is not None and stage.report.done():
                if stage.report.exception() is None:
                    reports[-1] = stage.report.result()
                    stage.measured = stage.report.result().measured
                stage.report = None
        return reports

    @property
    def settings(self) -> list[StageSettings]:
        """Of the stages, with what was only known when they had started: dtype, size of the KV pool."""
        return [stage.settings for stage in self._stages]

    async def start(self, settings: Sequence[StageSettings]) -> None:
        """Start all stages, load them and link them. Raises what a stage's loading raised."""
        self._stages = [_Stage(stage, self._create_actor(index, stage)) for index, stage in enumerate(settings)]
        await self._load(self._stages)
        await self._link()

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        assert self._links is not None
        return await self._links.run(microbatch)

    async def watch(self) -> None:
        assert self._links is not None
        await self._links.watch()

    async def recover(self) -> None:
        """Close all links, replace the stages that are dead, hang, have a device that does no more work for them or
        never came to be, and link anew."""
        step_hangs = self._links is not None and self._links.timed_out
        step_timeout_s = self._config.step_timeout_s
        measured = [stage.measured for stage in self._stages]
        timeout_s = hung_stop_timeout_s(measured, step_timeout_s) if step_hangs else step_timeout_s
        self._close_links()
        stopped = await asyncio.gather(*[self._has_stopped(stage, timeout_s) for stage in self._stages])
        sound = [alive and stage.is_loaded for stage, alive in zip(self._stages, stopped, strict=True)]
        for index, (stage, is_sound) in enumerate(zip(self._stages, sound, strict=True)):
            if not is_sound:
                logger.warning("replacing stage %d (%s)", index, _layers(stage.settings))
                ray.kill(stage.actor)
                stage.actor = self._create_actor(index, stage.settings)
                stage.is_loaded = False
                stage.num_restarts += 1
                stage.measured = dict(NOT_MEASURED)
        try:
            await self._load([stage for stage in self._stages if not stage.is_loaded])
            await self._link()
        except (RayError, zmq.ZMQError, OSError) as error:
            raise PipelineError(f"the pipeline could not be brought back: {error}") from error

    def close(self) -> None:
        """Close the links and end the stages."""
        self._close_links()
        for stage in self._stages:
            if stage.report is not None:
                stage.report.cancel()
            ray.kill(stage.actor)

    async def _load(self, stages: Sequence[_Stage]) -> None:
        """Load the stages' weights in parallel. Raises what a stage raised, or `PipelineError` after the time-out."""
        limit = self._config.startup_timeout_s
        try:
            async with asyncio.timeout(limit):
                starting = [StartingStage(stage.actor, stage.settings) for stage in stages]
                descriptions = await bring_up(starting)
        except TimeoutError:
            raise PipelineError(f"the stages were not loaded within startup_timeout_s={limit}") from None
        for stage, started, description in zip(stages, starting, descriptions, strict=True):
            stage.settings, stage.description, stage.is_loaded = started.settings, description, True

    async def _has_stopped(self, stage: _Stage, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(stage.actor.stop.remote(), timeout_s)
        except (RayError, TimeoutError):
            return False
        return True

    async def _link(self) -> None:
        """Bind every receiver, then connect every sender, then watch for the end of any stage's loop.

        Raises `ConfigError` if two neighbours can't use the handoff that is asked for.
        """
        self._choose_handoffs()
        on_one_node = len({stage.description["node_id"] for stage in self._stages} | {_own_node_id()}) == 1
        if on_one_node:
            keys = None
            _remove_abandoned_directories()
            self._directory = tempfile.mkdtemp(prefix=f"{DIRECTORY_PREFIX}{os.getpid()}-")  # private: mode 0700
            binds = [
                stage.actor.bind.remote(f"ipc://{self._directory}/{index}", keys, stage.handoff or "zmq")
                for index, stage in enumerate(self._stages)
            ]
            results_address = f"ipc://{self._directory}/results"
        else:
            keys = CurveKeys.generate()
            binds = [stage.actor.bind.remote(None, keys, stage.handoff or "zmq") for stage in self._stages]
            results_address = f"tcp://{ray.util.get_node_ip_address()}"
        self._links = links = StepLinks(keys, self._config.step_timeout_s)
        addresses = await asyncio.gather(*binds)
        nexts = [
            (address.hidden, stage.handoff, address.tensors)
            for stage, address in zip(self._stages[1:], addresses[1:], strict=True)
        ]
        nexts.append((links.bind(results_address), "zmq", ""))
        await asyncio.gather(
            *[stage.actor.start.remote(*following) for stage, following in zip(self._stages, nexts, strict=True)]
        )
        links.connect([address.steps for address in addresses])
        await links.wait_until_linked()
        self._watchers = [
            asyncio.create_task(self._watch(index, stage, links)) for index, stage in enumerate(self._stages)
        ]

    def _choose_handoffs(self) -> None:
        places = [StagePlace(stage.description["node_id"], stage.description["gpu_uuid"]) for stage in self._stages]
        for stage, (sender, receiver) in zip(self._stages[1:], pairwise(places), strict=True):
            stage.handoff = choose_handoff(sender, receiver, self._config.handoff)

    async def _watch(self, index: int, stage: _Stage, links: StepLinks) -> None:
        name = f"stage {index} ({_layers(stage.settings)})"
        try:
            reason = await stage.actor.watch.remote()
            if reason is not None:
                links.fail(PipelineError(f"{name} stopped: {reason}"))
        except RayError as error:
            links.fail(PipelineError(f"{name} was lost: {str(error).strip().splitlines()[0]}"))

    def _close_links(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        self._watchers = []
        if self._links is not None:
            self._links.close()
            self._links = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _create_actor(self, index: int, settings: StageSettings) -> ActorHandle:
        first, end = settings.layers
        self._num_started += 1  # a replacement's name must differ from its predecessor's, which Ray still remembers
        name = f"{self._name}/stage-{index}-of-{settings.num_stages}/layers-{first}-to-{end - 1}/{self._num_started}"
        options = {
            "name": name,
            "num_cpus": self._config.stage.num_cpus,
            "num_gpus": self._config.stage.num_gpus,
            "max_concurrency": 4,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index + 1
            ),
        }
        actor: ActorHandle = ray.remote(GPTJStage).options(**options).remote(settings)
        return actor


def hung_stop_timeout_s(measured: Sequence[dict[str, Any]], step_timeout_s: float) -> float:
    """How long a healthy stage may take to stop after another's step has timed out.

    Mostly it is idle by then: the steps in flight are few, and it has long done with them. But one that was sent last,
    for a request that came while the other stage hung, may have just begun: so the longest step of late goes on top.
    """
    longest_s = max((step["duration_s"] for stage in measured for step in stage["steps"]), default=0.0)
    return min(HUNG_STOP_TIMEOUT_S + float(longest_s), step_timeout_s)


async def _report_of(actor: ActorHandle) -> StageReport:
    report: StageReport = await actor.report.remote()
    return report


def _remove_abandoned_directories() -> None:
    """Remove what killed replicas left behind: the name holds the pid of the process that made it."""
    for directory in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*-*"):
        pid = directory.name.removeprefix(DIRECTORY_PREFIX).split("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(directory, ignore_errors=True)


def _own_node_id() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def _layers(settings: StageSettings) -> str:
    first, end = settings.layers
    return f"layers {first} to {end - 1}"
