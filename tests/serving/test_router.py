"""`PipelineRouter` by itself; it needs no cluster."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from gptj_serve.serving import replicas as replicas_module
from gptj_serve.serving.replicas import Replicas
from gptj_serve.serving.router import PipelineRouter

REPLICAS = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"]


async def choose(**kwargs: Any) -> tuple[list[str], bool]:
    """The chosen replicas' ids, and whether Serve will pause before it asks again."""
    router = PipelineRouter.__new__(PipelineRouter)  # its constructor wants a running Serve
    pending = SimpleNamespace(kwargs=kwargs, routing_context=SimpleNamespace(should_backoff=False))
    (chosen,) = await router.choose_replicas(REPLICAS, pending)
    return [replica.replica_id.unique_id for replica in chosen], pending.routing_context.should_backoff


async def test_named_replica_alone_is_chosen() -> None:
    assert await choose(replica_id="b") == (["b"], True)


async def test_absent_replica_is_waited_for_with_pauses() -> None:
    assert await choose(replica_id="gone") == ([], True)


async def ranks(prefer: str, **kwargs: Any) -> list[list[str]]:
    """The chosen replicas' ids, those that are tried first before the others."""
    router = PipelineRouter.__new__(PipelineRouter)
    routing_context = SimpleNamespace(should_backoff=False)
    pending = SimpleNamespace(kwargs={"prefer": prefer, **kwargs}, routing_context=routing_context)
    chosen = await router.choose_replicas(REPLICAS, pending)
    return [[replica.replica_id.unique_id for replica in rank] for rank in chosen]


async def test_a_preferred_replica_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have as many requests as it takes: then any other two are asked. It may have gone, or be busy."""
    monkeypatch.setattr(replicas_module, "REPLICAS", replicas := Replicas())
    first, others = await ranks("b")
    assert (first, len(set(others))) == (["b"], 2)
    for prefer, kwargs in (("gone", {}), ("b", {"avoid": {"b"}})):
        assert [len(set(rank)) for rank in await ranks(prefer, **kwargs)] == [2]
    assert await ranks("b", replica_id="c") == [["c"]]
    replicas.set_running("abc")
    replicas.set_load("b", is_ready=False, queue_wait_s=0.0)
    assert [set(rank) for rank in await ranks("b")] == [{"a", "c"}]
    replicas.set_load("b", is_ready=True, queue_wait_s=5.0)
    assert [set(rank) for rank in await ranks("b")] == [{"a", "c"}]
    replicas.set_load("b", is_ready=True, queue_wait_s=0.5)
    assert (await ranks("b"))[0] == ["b"]


@pytest.mark.parametrize("_", range(20))
async def test_otherwise_two_different_ones(_: int) -> None:
    chosen, _ = await choose()
    assert len(set(chosen)) == 2


async def test_a_replica_that_brings_a_stage_back_is_chosen_only_if_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas_module, "REPLICAS", replicas := Replicas())
    replicas.set_running("abc")
    for recovering, wanted in (("a", {"b", "c"}), ("ab", {"c"})):
        for replica_id in recovering:
            replicas.set_load(replica_id, is_ready=False, queue_wait_s=0.0)
        for _ in range(20):
            assert set((await choose())[0]) == wanted
    replicas.set_load("c", is_ready=False, queue_wait_s=0.0)
    assert len((await choose())[0]) == 2
    assert (await choose(replica_id="a"))[0] == ["a"]


async def test_where_the_queues_are_longer_only_if_they_are_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "REPLICAS", replicas := Replicas())
    replicas.set_running("abc")
    assert replicas.shortest_wait_s() == 0
    for waits_s, wanted in (({"a": 20.0}, {"b", "c"}), ({"b": 10.0, "c": 9.5}, {"b", "c"}), ({"b": 12.0}, {"c"})):
        for replica_id, wait_s in waits_s.items():
            replicas.set_load(replica_id, is_ready=True, queue_wait_s=wait_s)
        for _ in range(20):
            assert set((await choose())[0]) == wanted
    assert replicas.shortest_wait_s() == 9.5
    replicas.set_load("c", is_ready=False, queue_wait_s=0.0)
    assert replicas.shortest_wait_s() == 12
    replicas.set_running("ab")
    replicas.set_running("abc")
    assert replicas.shortest_wait_s() == 0  # the new one is not the former


def test_what_a_refusal_told_counts_for_a_while() -> None:
    """Else one that nobody hears from any more would be kept from all requests; or, told nothing, get all of them."""
    now = 100.0
    replicas = Replicas(lambda: now)
    replicas.set_running("ab")
    replicas.set_load("b", is_ready=True, queue_wait_s=20.0)
    assert replicas.best("ab") == {"a"}
    replicas.refused("a", 90.0)
    replicas.refused("gone", 5.0)
    assert (replicas.best("ab"), replicas.best(["gone"]), replicas.shortest_wait_s()) == ({"b"}, {"gone"}, 20.0)
    now += replicas_module.REFUSAL_COUNTS_S
    assert (replicas.best("ab"), replicas.shortest_wait_s()) == ({"a"}, 0.0)
    replicas.refused("a", 90.0)
    replicas.set_load("a", is_ready=True, queue_wait_s=3.0)  # its event stream goes on telling
    now += replicas_module.REFUSAL_COUNTS_S
    assert (replicas.best("ab"), replicas.shortest_wait_s()) == ({"a"}, 3.0)


def test_requests_of_other_ingresses_are_known_while_they_are_told() -> None:
    replicas = Replicas()
    replicas.set_running("abc")
    for replica_id, number in (("a", 3), ("b", 5), ("c", 7), ("a", 4)):
        replicas.set_load(replica_id, is_ready=True, queue_wait_s=0.0, num_others=number)
    assert replicas.num_others == {"a": 4, "b": 5, "c": 7}
    replicas.forget("a")
    replicas.set_running("ab")
    assert replicas.num_others == {"b": 5}


def test_who_left_is_told() -> None:
    replicas, told = Replicas(), []
    replicas.subscribe(told.append)
    for running in ("a", "ab", "b", "b", ""):
        replicas.set_running(running)
    assert told == [{"a"}, {"b"}]
    replicas.set_running("cd")
    replicas.set_load("c", is_ready=False, queue_wait_s=0.0)
    assert (replicas.others("d"), replicas.others("c")) == (set(), {"d"})
    replicas.set_running("d")
    assert replicas.recovering == set()


def test_serve_can_send_the_router_to_other_processes() -> None:
    """By value, even: what it refers to in its module goes along."""
    router_module = sys.modules[PipelineRouter.__module__]
    cloudpickle.register_pickle_by_value(router_module)
    try:
        cloudpickle.dumps(PipelineRouter)
    finally:
        cloudpickle.unregister_pickle_by_value(router_module)
