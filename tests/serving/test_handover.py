"""New ingresses and new pipelines take over together; no cluster: a notice board and a clock of our own."""

from collections.abc import Callable

import pytest

from gptj_serve.errors import PipelineError
from gptj_serve.serving.handover import INGRESS_TIMEOUT_S, POLL_PERIOD_S, TAKEOVER_S, Handover

TIMEOUT_S = 1800.0


class Cluster:
    """What replicas share, and time: it passes only while somebody waits, and `events` happen in it."""

    def __init__(self) -> None:
        self.notices: dict[str, str] = {}
        self.alive: set[str] = set()
        self.events: dict[float, Callable[[], None]] = {}
        self.now = 1000.0

    def handover(self, name: str, text_version: str, application: str = "gptj") -> Handover:
        self.alive.add(name)
        return Handover(application, name, text_version, board=self, clock=self)

    def put(self, key: str, value: str) -> None:
        self.notices[key] = value

    def remove(self, key: str) -> None:
        del self.notices[key]

    def read(self, prefix: str) -> dict[str, str]:
        return {key: value for key, value in self.notices.items() if key.startswith(prefix)}

    def actor_names(self) -> set[str]:
        return self.alive

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for time in sorted(time for time in self.events if time <= self.now):
            self.events.pop(time)()

    def waited_s(self) -> float:
        return self.now - 1000.0


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_the_ingresses_of_a_fresh_start_wait_for_nothing(cluster: Cluster) -> None:
    cluster.handover("first", "new").ingress_is_built(TIMEOUT_S)
    cluster.handover("second", "new").ingress_is_built(TIMEOUT_S)
    assert cluster.waited_s() == 0
    assert cluster.notices == {"gptj/ingress/first": "new", "gptj/ingress/second": "new"}


def test_an_ingress_that_starts_again_does_not_wait_for_the_pipeline_of_its_version(cluster: Cluster) -> None:
    cluster.handover("other", "same").ingress_is_built(TIMEOUT_S)
    cluster.handover("again", "same").ingress_is_built(TIMEOUT_S)
    assert cluster.waited_s() == 0


def test_a_new_ingress_waits_for_a_pipeline_of_its_version(cluster: Cluster) -> None:
    cluster.handover("old", "old").ingress_is_built(TIMEOUT_S)
    cluster.handover("old pipeline", "old").pipeline_is_loaded()
    cluster.events[1100.0] = lambda: cluster.put("gptj/pipeline/dead pipeline", "new")
    cluster.events[1200.0] = lambda: cluster.put("gptj/pipeline/new pipeline", "new")
    cluster.alive.add("new pipeline")
    cluster.handover("new", "new").ingress_is_built(TIMEOUT_S)
    assert 200 <= cluster.waited_s() < 200 + 2 * POLL_PERIOD_S
    assert cluster.notices["gptj/ingress/new"] == "new"
    assert "gptj/pipeline/dead pipeline" not in cluster.notices


def test_a_new_ingress_goes_on_when_the_last_old_one_is_gone(cluster: Cluster) -> None:
    cluster.handover("old", "old").ingress_is_built(TIMEOUT_S)
    cluster.events[1007.0] = lambda: cluster.alive.remove("old")
    cluster.handover("new", "new").ingress_is_built(TIMEOUT_S)
    assert 7 <= cluster.waited_s() < 7 + 2 * POLL_PERIOD_S
    assert cluster.notices == {"gptj/ingress/new": "new"}


def test_a_new_ingress_whose_pipelines_never_come_fails_and_is_not_announced(cluster: Cluster) -> None:
    """The old one is then not stopped."""
    cluster.handover("old", "old").ingress_is_built(TIMEOUT_S)
    with pytest.raises(PipelineError, match=r"no pipeline of this version has loaded within 1800 s"):
        cluster.handover("new", "new").ingress_is_built(TIMEOUT_S)
    assert TIMEOUT_S <= cluster.waited_s() < TIMEOUT_S + 2 * POLL_PERIOD_S
    assert cluster.notices == {"gptj/ingress/old": "old"}


def test_other_applications_are_none_of_its_business(cluster: Cluster) -> None:
    cluster.handover("old", "old", application="another").ingress_is_built(TIMEOUT_S)
    cluster.handover("new", "new").ingress_is_built(TIMEOUT_S)
    cluster.handover("new pipeline", "new").pipeline_is_loaded()
    assert cluster.waited_s() == 0


def test_a_pipeline_without_an_ingress_of_another_version_waits_for_nothing(cluster: Cluster) -> None:
    cluster.handover("first", "new").pipeline_is_loaded()
    cluster.handover("ingress", "new").ingress_is_built(TIMEOUT_S)
    cluster.handover("second", "new").pipeline_is_loaded()
    assert cluster.waited_s() == 0
    assert cluster.notices.keys() == {"gptj/pipeline/first", "gptj/ingress/ingress", "gptj/pipeline/second"}


def test_a_pipeline_waits_for_an_ingress_that_understands_it(cluster: Cluster) -> None:
    """It has told of itself before, so that the ingress need not wait for it."""
    cluster.handover("old", "old").ingress_is_built(TIMEOUT_S)
    new = cluster.handover("new", "new")
    cluster.events[1003.0] = lambda: new.ingress_is_built(TIMEOUT_S)
    cluster.handover("new pipeline", "new").pipeline_is_loaded()
    assert 3 <= cluster.waited_s() - TAKEOVER_S < 3 + 2 * POLL_PERIOD_S


def test_a_pipeline_waits_for_a_limited_time(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.handover("old", "old").ingress_is_built(TIMEOUT_S)
    cluster.handover("new pipeline", "new").pipeline_is_loaded()
    assert INGRESS_TIMEOUT_S <= cluster.waited_s() < INGRESS_TIMEOUT_S + 2 * POLL_PERIOD_S
    assert "no ingress of the new version came within 30 s" in caplog.text
