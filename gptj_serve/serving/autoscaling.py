"""`PipelineScaling`: lets `ScalingPolicy` decide for Ray Serve, within what the cluster has room for.

Serve's controller makes one for the `Pipeline` deployment and asks it ten times a second. The numbers come from the
replicas (`Pipeline.record_autoscaling_stats`); all smoothing is the policy's own. The controller unpickles this class,
so `gptj_serve` must be installed where the head node's processes run, not only in a job's runtime environment.
"""

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import ray._private.state
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from gptj_serve.config import ServiceConfig
from gptj_serve.scaling.policy import PipelineLoad, ScalingLimits, ScalingPolicy
from gptj_serve.serving.capacity import Resources, num_that_fit

METRICS_PERIOD_S = 1.0
"""How often replicas and handles tell the controller how things are. Serve's default is 10 s."""

LOOK_BACK_S = 2.0
"""Over which Serve averages what waits in the handles; a fifth of it is how often replicas look at their load."""

DECISION_PERIOD_S = 0.25

SETTLING_S = 2.0
"""After more were asked for, what is free in the cluster may still count what they will take."""


def free_resources() -> list[dict[str, float]]:
    """Of each node."""
    return [dict(node) for node in ray._private.state.available_resources_per_node().values()]


class PipelineScaling:
    """A callable as Serve wants it: the deployment's context → (how many replicas, state that Serve keeps)."""

    def __init__(
        self,
        limits: Mapping[str, Any],
        bundles: Sequence[Resources],
        strategy: str,
        may_add_nodes: bool,
        free: Callable[[], Sequence[Resources]] = free_resources,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limits` are those of `ScalingLimits`, `bundles` what one pipeline reserves, placed by `strategy`."""
        self._policy = ScalingPolicy(ScalingLimits(**limits))
        self._bundles = bundles
        self._strategy = strategy
        self._may_add_nodes = may_add_nodes
        self._free = free
        self._clock = clock
        self._decided_at = self._raised_at = float("-inf")
        self._num_told = 0  # the largest number for which there was no room, since there was
        self._logger = logging.getLogger("ray.serve")  # the controller's own

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        now, num_target = self._clock(), int(context.target_num_replicas)
        if now - self._decided_at < DECISION_PERIOD_S:
            return num_target, {}
        self._decided_at = now
        num_wanted = self._policy.decide(now, _loads(context), num_target, ceil(context.total_queued_requests))
        if num_wanted > num_target and not self._may_add_nodes:
            # One that requests wait for, and the fewest there shall be, wait for their room.
            num_least = max(1, context.capacity_adjusted_min_replicas)
            num_wanted = max(self._num_possible(num_wanted, num_target, now), num_least)
        if num_wanted > num_target:
            self._raised_at = now
        return num_wanted, {}

    def _num_possible(self, num_wanted: int, num_target: int, now: float) -> int:
        """No more than the cluster has room for: those there should be so far have theirs."""
        if now - self._raised_at < SETTLING_S:
            return num_target
        num_more = num_that_fit(self._bundles, self._strategy, self._free(), num_wanted - num_target)
        num_possible = num_target + num_more
        if num_possible == num_wanted:
            self._num_told = 0
        elif num_wanted > self._num_told:
            self._num_told = num_wanted
            self._logger.warning(
                "the load asks for %d pipelines; the cluster has room for %d", num_wanted, num_possible
            )
        return num_possible


def _loads(context: AutoscalingContext) -> list[PipelineLoad]:
    """Of the running replicas that have told theirs: the newest of what each has told."""
    metrics = context.raw_metrics or {}
    told = [metrics.get(field, {}) for field in PipelineLoad._fields]
    replicas = [replica for replica in context.running_replicas if all(series.get(replica) for series in told)]
    return [PipelineLoad(*(series[replica][-1].value for series in told)) for replica in replicas]


def serve_autoscaling(
    config: ServiceConfig, bundles: Sequence[Resources], num_initial: int
) -> AutoscalingConfig | None:
    """What Serve is told; None where the number of pipelines is fixed."""
    scaling = config.autoscaling
    if scaling is None:
        return None
    policy = AutoscalingPolicy(
        policy_function="gptj_serve.serving.autoscaling:PipelineScaling",
        policy_kwargs={
            "limits": scaling.limits._asdict(),
            "bundles": [dict(bundle) for bundle in bundles],
            "strategy": config.pipeline.placement_strategy,
            "may_add_nodes": scaling.may_add_nodes,
        },
    )
    with warnings.catch_warnings():  # the interval is to become an environment variable, of each node's processes
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=scaling.min_pipelines,
            initial_replicas=num_initial,
            max_replicas=scaling.max_pipelines,
            metrics_interval_s=METRICS_PERIOD_S,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=policy,
        )
