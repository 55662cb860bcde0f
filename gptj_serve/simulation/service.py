"""`SimulatedService`: pipelines, a router and, if the number of pipelines is not fixed, the scaling policy."""

from dataclasses import dataclass, field, replace

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.scheduler import SchedulerLimits
from gptj_serve.errors import OverloadedError
from gptj_serve.scaling.policy import ScalingLimits, ScalingPolicy
from gptj_serve.simulation.load import SimulatedLoad
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.pipeline import SimulatedPipeline, StepCosts
from gptj_serve.simulation.router import TELL_PERIOD_S, SimulatedRouter
from gptj_serve.simulation.simulated_job import simulated_request
from gptj_serve.simulation.steady_rows import SteadyRows
from gptj_serve.types import EngineRequest

QUEUE_WAIT_TOLERANCE = 1.25
"""As in `serving.pipeline_deployment`."""

TICKS_PER_DECISION = 4
"""The policy is asked every second, though it is told ten times a second in the service: its delays are longer."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is simulated. `num_pipelines` is the number at the beginning; it stays where there is no `scaling`."""

    limits: SchedulerLimits  # of the service; a pipeline takes `QUEUE_WAIT_TOLERANCE` of its max_queue_wait_s
    num_kv_blocks: int
    block_size: int
    reuse_prefixes: bool
    costs: StepCosts
    num_pipelines: int
    scaling: ScalingLimits | None = None
    startup_s: float = 60.0

    @property
    def num_kv_tokens(self) -> int:
        """Of a pipeline's pool, in whole blocks."""
        return self.num_kv_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Moment:
    """How things stand at a time."""

    at_s: float
    num_running: int
    num_starting: int
    num_ending: int  # they take no more requests
    num_waiting: int  # requests
    num_generating: int


@dataclass(slots=True)
class Result:
    duration_s: float  # from the first arrival until the last request has ended
    pipeline_s: float  # of all pipelines, from the beginning of their start to their end
    most_pipelines: int
    num_preemptions: int
    moments: list[Moment] = field(default_factory=list)


class SimulatedService:
    """Serves one load."""

    def __init__(self, deployment: Deployment, outcomes: Outcomes, num_moments: int = 200, seed: int = 0) -> None:
        self._deployment = deployment
        self._outcomes = outcomes
        self._num_moments = num_moments
        self._router: SimulatedRouter[_Replica] = SimulatedRouter(seed)
        self._policy = None if deployment.scaling is None else ScalingPolicy(deployment.scaling)
        self._starting: list[_Replica] = []
        self._running: list[_Replica] = []
        self._ending: list[_Replica] = []
        self._num_target = deployment.num_pipelines
        self._homeless: list[EngineRequest] = []  # that came while no pipeline ran
        self._result = Result(0.0, 0.0, 0, 0)
        self._num_ticks = 0

    def run(self, load: SimulatedLoad) -> Result:
        self._running = [_Replica(self._deployment, self._outcomes, 0.0, 0.0) for _ in range(self._num_target)]
        self._router.set_running(self._running)
        self._result.most_pipelines = self._num_target
        arrivals = zip(
            load.arrival_s.tolist(), load.num_prompt_tokens.tolist(), load.num_new_tokens.tolist(), strict=True
        )
        moment_period_s = float(load.arrival_s[-1]) / self._num_moments
        next_tick_s = next_moment_s = 0.0
        for index, (arrival_s, num_prompt, num_new) in enumerate(arrivals):
            while next_tick_s <= arrival_s:
                self._tick(next_tick_s)
                if next_tick_s >= next_moment_s:
                    self._note_moment(next_tick_s)
                    next_moment_s = next_tick_s + moment_period_s
                next_tick_s += TELL_PERIOD_S
            self._outcomes.arrived_s[index] = arrival_s
            self._route(simulated_request(index, num_prompt, num_new), arrival_s)
        self._run_down(next_tick_s, moment_period_s)
        return self._result

    def _run_down(self, next_tick_s: float, moment_period_s: float) -> None:
        """Until all that was begun has ended."""
        next_moment_s = next_tick_s
        while True:
            for replica in self._alive:
                replica.pipeline.advance(next_tick_s)
            if not self._homeless and not any(replica.rows.has_work for replica in self._alive):
                break
            self._tick(next_tick_s)
            if next_tick_s >= next_moment_s:
                self._note_moment(next_tick_s)
                next_moment_s = next_tick_s + moment_period_s
            next_tick_s += TELL_PERIOD_S
        end_s = self._outcomes.end_s
        for replica in [*self._starting, *self._alive]:
            self._end(replica, end_s)
        self._note_moment(end_s)
        self._result.duration_s = end_s

    @property
    def _alive(self) -> list["_Replica"]:
        return [*self._running, *self._ending]

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────

    def _route(self, request: EngineRequest, now: float) -> None:
        """As an ingress does, until a pipeline takes it or it is refused."""
        while True:
            if self._router.shortest_wait_s() > self._deployment.limits.max_queue_wait_s:
                return self._outcomes.on_refused(int(request.request_id))
            pair = self._router.pair()
            if not pair:
                return self._homeless.append(request)
            for replica in pair:
                replica.pipeline.advance(now)
            chosen = min(pair, key=_num_ongoing)
            try:
                chosen.pipeline.add(request)
            except OverloadedError:
                self._router.refused(chosen)
                continue
            if chosen.rows.num_waiting > 1:  # one is this request, which is not scheduled yet
                self._router.has_queue(chosen)
            return None

    # ── what happens from time to time ───────────────────────────────────────────────────────────────────

    def _tick(self, now: float) -> None:
        for replica in self._router.queued:
            replica.pipeline.advance(now)
        self._router.tell()
        self._share(now)
        if self._policy is not None and self._num_ticks % TICKS_PER_DECISION == 0:
            self._scale(self._policy, now)
        self._num_ticks += 1

    def _share(self, now: float) -> None:
        """Where nothing waits, a part of what waits elsewhere goes, as `serving.event_streams` has it."""
        slow = self._router.slow
        if not slow:
            return
        for replica in self._running:
            if replica.rows.num_waiting == 0:
                for other in slow:
                    for request in other.rows.give_away(len(slow) + 1):
                        replica.pipeline.advance(now)
                        replica.pipeline.add(request)

    def _scale(self, policy: ScalingPolicy, now: float) -> None:
        ready = [replica for replica in self._starting if replica.ready_s <= now]
        if ready:
            self._starting = [replica for replica in self._starting if replica.ready_s > now]
            self._running += ready
            self._router.set_running(self._running)
            homeless, self._homeless = self._homeless, []
            for request in homeless:
                self._route(request, now)
        for replica in self._alive:
            replica.pipeline.advance(now)
        for replica in [replica for replica in self._ending if not replica.rows.has_work]:
            self._ending.remove(replica)
            self._end(replica, now)
        loads = [replica.rows.load() for replica in self._running]
        self._num_target = policy.decide(now, loads, self._num_target, len(self._homeless))
        num_missing = self._num_target - len(self._starting) - len(self._running)
        for _ in range(num_missing):
            self._starting.append(_Replica(self._deployment, self._outcomes, now, now + self._deployment.startup_s))
        if num_missing < 0:
            self._stop(-num_missing, now)
        num_alive = len(self._starting) + len(self._running) + len(self._ending)
        self._result.most_pipelines = max(self._result.most_pipelines, num_alive)

    def _stop(self, count: int, now: float) -> None:
        """Those that start, then those with the fewest requests, which they finish first."""
        for _ in range(min(count, len(self._starting))):
            self._end(self._starting.pop(), now)
            count -= 1
        if count:
            self._running.sort(key=_num_ongoing, reverse=True)
            self._ending += self._running[-count:]
            del self._running[-count:]
            self._router.set_running(self._running)

    def _end(self, replica: "_Replica", now: float) -> None:
        self._result.pipeline_s += now - replica.began_s
        self._result.num_preemptions += replica.rows.num_preemptions

    def _note_moment(self, now: float) -> None:
        for replica in self._alive:
            replica.pipeline.advance(now)
        num_waiting = sum(replica.rows.num_waiting for replica in self._alive)
        num_running = sum(replica.rows.num_running for replica in self._alive)
        sizes = len(self._running), len(self._starting), len(self._ending)
        self._result.moments.append(Moment(now, *sizes, num_waiting + len(self._homeless), num_running))


class _Replica:
    """A pipeline of the service."""

    def __init__(self, deployment: Deployment, outcomes: Outcomes, began_s: float, ready_s: float) -> None:
        wait_s = deployment.limits.max_queue_wait_s * QUEUE_WAIT_TOLERANCE
        limits = replace(deployment.limits, max_queue_wait_s=wait_s)
        blocks = KVBlocks(deployment.num_kv_blocks, deployment.block_size, reuse_prefixes=deployment.reuse_prefixes)
        self.pipeline = SimulatedPipeline(
            lambda clock: SteadyRows(limits, blocks, outcomes, clock), deployment.costs, limits.num_stages
        )
        self.rows = self.pipeline.source
        self.began_s, self.ready_s = began_s, ready_s

    @property
    def num_waiting(self) -> int:
        return self.rows.num_waiting

    def queue_wait_s(self) -> float:
        return self.rows.queue_wait_s()


def _num_ongoing(replica: _Replica) -> int:
    return replica.rows.num_ongoing
