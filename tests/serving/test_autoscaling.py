"""`PipelineScaling` as Serve's controller calls it; no cluster."""

from collections.abc import Sequence
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingContext

from gptj_serve.config import AutoscalingConfig, ServiceConfig
from gptj_serve.scaling.policy import PipelineLoad
from gptj_serve.serving import app
from gptj_serve.serving.autoscaling import DECISION_PERIOD_S, SETTLING_S, PipelineScaling, serve_autoscaling

DEPLOYMENT = DeploymentID(name="Pipeline", app_name="gptj")
BUNDLES = [{"CPU": 0.5}, {"GPU": 1.0}, {"GPU": 1.0}]
CONFIG = AutoscalingConfig(min_pipelines=0, max_pipelines=9, upscale_delay_s=0, downscale_delay_s=60)


def busy(num_tokens: int) -> PipelineLoad:
    """1,000 tokens are one pipeline's work, at the default target of 10 s."""
    return PipelineLoad(num_tokens, 100.0, 0.5, 50, 4)


class Controller:
    """Calls the policy each second, and follows it at once."""

    def __init__(self, num_target: int = 1, may_add_nodes: bool = False, **limits: Any) -> None:
        self.now_s = 1000.0
        self.nodes: list[dict[str, float]] = []
        self.num_target = num_target
        config = ServiceConfig(autoscaling=CONFIG.model_copy(update={"may_add_nodes": may_add_nodes} | limits))
        told = serve_autoscaling(config, BUNDLES, max(1, limits.get("min_pipelines", 0)))
        assert told is not None
        self.min_replicas = told.min_replicas
        self.scaling = PipelineScaling(**told.policy.policy_kwargs, free=lambda: self.nodes, clock=lambda: self.now_s)

    def tick(self, *loads: PipelineLoad | None, queued: float = 0.0, elapsed_s: float = 1.0) -> int:
        """`loads` are of the running replicas; None has not told its load yet."""
        replicas = [ReplicaID(unique_id=f"r{index}", deployment_id=DEPLOYMENT) for index in range(len(loads))]
        self.num_target, state = self.scaling(context(self.num_target, replicas, loads, queued, self.min_replicas))
        assert state == {}
        self.now_s += elapsed_s
        return self.num_target


def context(
    num_target: int, replicas: list[ReplicaID], loads: Sequence[PipelineLoad | None], queued: float, min_replicas: int
) -> AutoscalingContext:
    def series(load: PipelineLoad, field: str) -> list[TimeStampedValue]:
        return [TimeStampedValue(1.0, 1e9), TimeStampedValue(2.0, getattr(load, field))]

    metrics = {
        field: {replica: series(load, field) for replica, load in zip(replicas, loads, strict=True) if load is not None}
        for field in PipelineLoad._fields
    }
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Pipeline",
        app_name="gptj",
        current_num_replicas=len(replicas),
        target_num_replicas=num_target,
        running_replicas=replicas,
        total_num_requests=0.0,
        total_queued_requests=queued,
        aggregated_metrics={},
        raw_metrics=lambda: metrics,
        capacity_adjusted_min_replicas=min_replicas,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )


def test_it_follows_the_newest_of_what_each_replica_tells() -> None:
    controller = Controller(num_target=2)
    controller.nodes = [{"CPU": 8.0, "GPU": 8.0}]
    assert controller.tick(busy(1900), busy(1900)) == 4
    assert controller.tick(busy(1900), busy(1900), None, None) == 4


def test_requests_that_wait_for_a_pipeline_count() -> None:
    controller = Controller(num_target=0)
    assert controller.tick() == 0
    assert controller.tick(queued=0.05) == 1


def test_it_asks_for_no_more_than_the_cluster_has_room_for() -> None:
    controller = Controller()
    controller.nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0}]
    assert controller.tick(busy(9000)) == 3
    controller.nodes = [{"CPU": 7.0, "GPU": 1.0}]
    controller.tick(busy(9000), elapsed_s=SETTLING_S)
    assert controller.tick(busy(9000), busy(0), busy(0)) == 3
    controller.nodes = [{"CPU": 7.0, "GPU": 2.0}]
    assert controller.tick(busy(9000), busy(0), busy(0)) == 4


def test_a_need_that_swings_without_room_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller()
    for num_tokens in (5000, 4000, 5000, 1000, 5000, 1000, 6000):
        assert controller.tick(busy(num_tokens)) == 1
    controller.nodes = [{"CPU": 8.0, "GPU": 16.0}]
    assert controller.tick(busy(6000), elapsed_s=SETTLING_S) == 6
    controller.nodes = []
    assert controller.tick(busy(7000)) == 6
    assert [record.getMessage() for record in caplog.records] == [
        "the load asks for 5 pipelines; the cluster has room for 1",
        "the load asks for 6 pipelines; the cluster has room for 1",
        "the load asks for 7 pipelines; the cluster has room for 6",
    ]


def test_what_was_just_asked_for_is_not_taken_for_free() -> None:
    controller = Controller()
    controller.nodes = [{"CPU": 8.0, "GPU": 4.0}]
    assert controller.tick(busy(2000)) == 2
    assert controller.tick(busy(9000), elapsed_s=SETTLING_S) == 2
    controller.nodes = [{"CPU": 7.5, "GPU": 2.0}]
    assert controller.tick(busy(9000)) == 3


def test_the_least_is_asked_for_though_there_is_no_room() -> None:
    assert Controller(num_target=0).tick(queued=1.0) == 1
    assert Controller(num_target=1, min_pipelines=4).tick(busy(0)) == 4


def test_more_than_there_is_room_for_is_asked_for_where_nodes_can_be_added() -> None:
    controller = Controller(num_target=1, may_add_nodes=True)
    assert controller.tick(busy(9000)) == 9


def test_serve_asks_more_often_than_it_decides() -> None:
    controller = Controller()
    controller.nodes = [{"CPU": 8.0, "GPU": 8.0}]
    assert controller.tick(busy(0), elapsed_s=DECISION_PERIOD_S / 2) == 1
    assert controller.tick(busy(3000), elapsed_s=DECISION_PERIOD_S / 2) == 1
    assert controller.tick(busy(3000)) == 3


def test_serve_itself_neither_waits_nor_smoothes() -> None:
    config = ServiceConfig(autoscaling=CONFIG)
    told = serve_autoscaling(config, BUNDLES, 4)
    assert told is not None
    assert (told.min_replicas, told.initial_replicas, told.max_replicas) == (0, 4, 9)
    assert (told.upscale_delay_s, told.downscale_delay_s, told.downscale_to_zero_delay_s) == (0, 0, 0)
    assert told.policy.get_policy().__name__ == "PipelineScaling"
    assert serve_autoscaling(ServiceConfig(), BUNDLES, 4) is None


@pytest.mark.parametrize(("scaling", "number"), [({"min_pipelines": 2}, 2), ({"initial_pipelines": 5}, 5), ({}, 1)])
def test_a_deployment_begins_with_the_initial_number(scaling: dict[str, int], number: int) -> None:
    autoscaling = AutoscalingConfig.model_validate({"max_pipelines": 9} | scaling)
    deployment = app._pipeline(ServiceConfig(autoscaling=autoscaling), 100)
    told = deployment._deployment_config.autoscaling_config
    assert (told.min_replicas, told.initial_replicas) == (scaling.get("min_pipelines", 1), number)
    assert app._pipeline(ServiceConfig(num_pipelines=3), 100).num_replicas == 3


@pytest.mark.parametrize(("num_alive", "number"), [(0, 2), (4, 4), (30, 9)])
def test_a_rollout_begins_with_no_fewer_than_run(monkeypatch: pytest.MonkeyPatch, num_alive: int, number: int) -> None:
    monkeypatch.setattr(app, "num_alive", lambda *_: num_alive)
    autoscaling = AutoscalingConfig(min_pipelines=2, max_pipelines=9)
    deployment = app._pipeline(ServiceConfig(autoscaling=autoscaling), 100)
    assert deployment._deployment_config.autoscaling_config.initial_replicas == number
