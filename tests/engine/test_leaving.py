"""A request whose client leaves is gone at once, in whatever phase it is: its blocks, its entry, its stream."""

import asyncio
from collections.abc import Callable

import pytest
from fake_stages import FakeStages, expected_events, generate_request, head_request, make_scheduler

from gptj_serve.engine.engine import Engine
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler
from gptj_serve.engine.step import MAX_LOSSES_TOGETHER
from gptj_serve.errors import PipelineError
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.types import BeamParams, EngineRequest, Event, Grammar, GrammarKind, Task, is_terminal

Phase = Callable[["Stepped"], EngineRequest]
"""Brings a scheduler to where the request that it returns is in that phase."""

LONG = {"max_new_tokens": 40, "ignore_eos": True}


class Stepped:
    """A scheduler over fake stages, step by step; `flying` are microbatches whose results are not taken yet."""

    def __init__(self, **options: int) -> None:
        self.scheduler = make_scheduler(**{"block_size": 2, "num_blocks": 40, "num_stages": 2, **options})
        self.stages = FakeStages(2)
        self.flying: list[MicroBatch] = []
        self.events: list[Event] = []

    def add(self, request: EngineRequest) -> EngineRequest:
        self.scheduler.add(request)
        return request

    def send(self) -> None:
        microbatch = self.scheduler.schedule()
        assert microbatch is not None
        self.flying.append(microbatch)

    def land(self) -> None:
        self.events += self.scheduler.update(self.stages.run(self.flying.pop(0)))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.send()
            self.land()

    def lose(self) -> None:
        self.flying.clear()
        self.stages.restart()
        self.events += self.scheduler.reset()

    def finish(self) -> None:
        while self.flying:
            self.land()
        while (microbatch := self.scheduler.schedule()) is not None:
            self.flying.append(microbatch)
            self.land()


def queued(engine: Stepped) -> EngineRequest:
    engine.add(generate_request("first", range(1, 60), max_new_tokens=2))
    engine.steps(1)
    request = engine.add(generate_request("a", range(60, 1, -1), max_new_tokens=2))
    engine.send()
    assert engine.scheduler.num_waiting == 1
    return request


def half_prefilled(engine: Stepped) -> EngineRequest:
    request = engine.add(generate_request("a", range(1, 30)))
    engine.steps(1)
    assert 0 < engine.scheduler.num_tokens_waiting < 29
    return request


def prefill_in_flight(engine: Stepped) -> EngineRequest:
    request = engine.add(generate_request("a", range(1, 30)))
    engine.send()
    engine.send()
    return request


def decoding(engine: Stepped) -> EngineRequest:
    request = engine.add(generate_request("a", [1, 2, 3], **LONG))
    engine.steps(5)
    assert len(engine.events) == 5
    return request


def decode_in_flight(engine: Stepped) -> EngineRequest:
    request = decoding(engine)
    engine.send()
    return request


def searching_beams(engine: Stepped) -> EngineRequest:
    request = engine.add(generate_request("a", [1, 2, 3], beams=BeamParams(num_beams=4), max_new_tokens=12))
    engine.steps(3)
    engine.send()
    assert engine.scheduler.num_running == 4
    return request


def guided(engine: Stepped) -> EngineRequest:
    request = engine.add(
        generate_request("a", [1, 2, 3], guidance_scale=2.0, negative_prompt_token_ids=[4, 5, 6], max_new_tokens=20)
    )
    engine.steps(3)
    engine.send()
    return request


def drafted(engine: Stepped) -> EngineRequest:
    request = engine.add(generate_request("a", [1, 2, 1, 2, 1, 2], prompt_lookup_num_tokens=4, seed=1, **LONG))
    engine.steps(2)
    engine.send()
    return request


def replayed(engine: Stepped) -> EngineRequest:
    """It comes from another pipeline with tokens."""
    request = engine.add(generate_request("a", [1, 2, 3], output=[4, 5, 6, 7], **LONG))
    engine.send()
    return request


def preempted(engine: Stepped) -> EngineRequest:
    """Its blocks are gone, to be computed again."""
    engine.add(generate_request("first", range(1, 9), max_new_tokens=40, ignore_eos=True))
    request = engine.add(generate_request("a", range(10, 0, -1), max_new_tokens=40, ignore_eos=True))
    while engine.scheduler.num_preemptions == 0:
        microbatch = engine.scheduler.schedule()
        if microbatch is None:
            engine.land()
        else:
            engine.flying.append(microbatch)
    assert engine.scheduler.num_waiting == 1
    return request


def resumed(engine: Stepped) -> EngineRequest:
    """It was preempted and computes its tokens again."""
    request = preempted(engine)
    engine.scheduler.abort("first")
    while engine.flying:
        engine.land()
    engine.send()
    assert engine.scheduler.num_waiting == 0
    return request


def lost(engine: Stepped) -> EngineRequest:
    """The pipeline is being brought back."""
    request = decode_in_flight(engine)
    engine.lose()
    assert (engine.scheduler.num_waiting, engine.scheduler.num_running) == (1, 0)
    return request


def suspected(engine: Stepped) -> EngineRequest:
    """It is computed alone, since the pipeline was lost with it more than once."""
    request = engine.add(generate_request("a", [1, 2, 3], **LONG))
    for _ in range(MAX_LOSSES_TOGETHER):
        engine.send()
        engine.lose()
    engine.send()
    return request


def answering_a_head(engine: Stepped) -> EngineRequest:
    request = engine.add(head_request("a", Task.QA, range(1, 30)))
    engine.steps(1)
    engine.send()
    return request


PHASES: list[Phase] = [
    queued, half_prefilled, prefill_in_flight, decoding, decode_in_flight, searching_beams, guided, drafted, replayed,
    preempted, resumed, lost, suspected, answering_a_head,
]  # fmt: skip


def is_forgotten(scheduler: Scheduler, request_id: str) -> bool:
    everywhere = [*scheduler._entries.values(), *scheduler._waiting, *scheduler._running, *scheduler._suspects]
    return request_id not in scheduler._entries and all(e.job.request.request_id != request_id for e in everywhere)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_what_it_held_is_free_before_the_next_step(phase: Phase) -> None:
    engine = Stepped(max_microbatch_tokens=16)
    request = phase(engine)
    num_before = len(engine.events)
    assert engine.scheduler.abort(request.request_id)
    engine.scheduler.check_integrity()
    assert is_forgotten(engine.scheduler, request.request_id)
    others = engine.scheduler._entries
    assert engine.scheduler.blocks.num_used == len(
        {block for entry in others.values() for sequence in entry.job.sequences for block in sequence.block_table}
    )
    assert not engine.scheduler.abort(request.request_id)  # nothing is left to abort
    engine.finish()
    assert all(event.request_id != request.request_id for event in engine.events[num_before:])
    engine.scheduler.check_integrity()
    assert (engine.scheduler.blocks.num_used, engine.scheduler.num_in_flight) == (0, 0)
    assert not engine.scheduler.has_work
    again = engine.add(generate_request(request.request_id, [3, 2, 1]))  # its id is free, and so is its place
    engine.events.clear()
    engine.finish()
    assert engine.events == expected_events(again)


class SlowToRecover:
    """A pipeline that is lost at once, and comes back when it is let."""

    def __init__(self) -> None:
        self._stages = FakeStages(4)
        self.is_lost = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        if not self.is_lost.is_set():
            self.is_lost.set()
            raise PipelineError("stage 1 was lost")
        return self._stages.run(microbatch)

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def recover(self) -> None:
        await self.goes_on.wait()
        self._stages.restart()

    def stage_statuses(self) -> list[dict[str, object]]:
        return []


async def test_a_client_that_leaves_while_the_pipeline_is_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_serve.engine.engine.RECOVERY_DELAY_S", 0.0)
    pipeline = SlowToRecover()
    scheduler = make_scheduler()
    emitted: list[Event] = []
    engine = Engine(scheduler, pipeline, emitted.extend)
    engine.add(generate_request("leaves", [1, 2], **LONG))
    stays = generate_request("stays", [3, 4])
    engine.add(stays)
    task = asyncio.create_task(engine.run())
    await pipeline.is_lost.wait()
    while engine.is_ready:
        await asyncio.sleep(0)
    engine.abort("leaves")
    assert is_forgotten(scheduler, "leaves")
    late = generate_request("late", [5])
    engine.add(late)  # and one that comes and goes while nothing can be computed
    engine.abort("late")
    pipeline.goes_on.set()
    async with asyncio.timeout(5):
        while not (emitted and is_terminal(emitted[-1])):
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert emitted == expected_events(stays)
    assert (engine.stats().num_requests_aborted, engine.stats().num_kv_blocks_used) == (2, 0)


async def test_a_client_that_leaves_while_its_grammar_is_compiled_is_never_added() -> None:
    compiling, compiled = asyncio.Event(), asyncio.Event()

    async def compile_slowly(grammar: Grammar) -> None:
        compiling.set()
        await compiled.wait()

    scheduler = make_scheduler()
    async with LocalEngine(scheduler, SlowToRecover(), compile_slowly) as engine:
        request = generate_request("a", [1], grammar=Grammar(GrammarKind.REGEX, "a"))

        async def read() -> list[Event]:
            return [event async for event in engine.submit(request)]

        client = asyncio.create_task(read())
        await compiling.wait()
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        compiled.set()
        for _ in range(20):
            await asyncio.sleep(0)
        stats = engine.stats()
        assert (stats.num_prompt_tokens, stats.num_requests_aborted, engine._streams) == (0, 0, {})
