"""The engine loop over a pipeline that fails, and `LocalEngine`'s streams."""

import asyncio
import gc
import logging
import random
from collections.abc import Callable
from contextlib import aclosing

import pytest
from fake_stages import HEAD_TASKS, FakeStages, expected_events, generate_request, head_request, make_scheduler

from gptj_serve.engine.engine import MAX_FUTILE_RECOVERIES, Engine
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import MAX_LOSSES
from gptj_serve.errors import InvalidRequestError, PipelineError
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.types import EngineRequest, Event, FailureEvent, Grammar, GrammarKind, Task, is_terminal


class FakePipeline:
    """Runs microbatches in order, takes some turns of the event loop for each, and is lost when `fails` says so.

    Once lost, it loses all that is in flight and refuses everything until `recover`.
    """

    def __init__(self, block_size: int = 4, fails: Callable[[MicroBatch], bool] = lambda _: False) -> None:
        self._stages = FakeStages(block_size)
        self._fails = fails
        self._delays = random.Random(0)
        self._generation = 0
        self.is_lost = False
        self.can_recover = True
        self.lost_while_idle = asyncio.Event()
        self.num_recoveries = 0
        self.num_steps = 0
        self.max_in_flight = 0
        self._num_in_flight = 0
        self.gate = asyncio.Event()  # no step ends while it is unset
        self.gate.set()

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        self._num_in_flight += 1
        try:
            return await self._run(microbatch)
        finally:
            self._num_in_flight -= 1

    async def _run(self, microbatch: MicroBatch) -> StepOutput:
        if self.is_lost:
            raise PipelineError("still lost")
        generation = self._generation
        self.num_steps += 1
        self.max_in_flight = max(self.max_in_flight, self._num_in_flight)
        output = self._stages.run(microbatch)
        self.is_lost = self._fails(microbatch)
        for _ in range(self._delays.randrange(4)):
            await asyncio.sleep(0)
        await self.gate.wait()
        if self.is_lost or generation != self._generation:
            raise PipelineError("stage 1 was lost")
        return output

    async def watch(self) -> None:
        await self.lost_while_idle.wait()
        self.lost_while_idle.clear()
        raise PipelineError("stage 0 was lost")

    async def recover(self) -> None:
        self.num_recoveries += 1
        await asyncio.sleep(0)
        if not self.can_recover:
            raise PipelineError("no stage comes back")
        self._generation += 1
        self.is_lost = False
        self._stages.restart()


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_serve.engine.engine.RECOVERY_DELAY_S", 0.0)


def mixed_requests(count: int) -> list[EngineRequest]:
    rng = random.Random(count)
    requests = []
    for i in range(count):
        prompt = [rng.randrange(11) for _ in range(rng.randint(1, 12))]
        if i % 5 == 4:
            task, pooling = HEAD_TASKS[i // 5 % len(HEAD_TASKS)]
            requests.append(head_request(str(i), task, prompt, pooling, prompt[::-1] if task is Task.SCORE else []))
        else:
            requests.append(generate_request(str(i), prompt, max_new_tokens=rng.randint(1, 12), seed=i))
    return requests


async def collect(engine: LocalEngine, request: EngineRequest) -> list[Event]:
    return [event async for event in engine.submit(request)]


async def stats(engine: LocalEngine) -> dict[str, int]:
    return engine.stats().as_dict()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("num_stages", "ahead"), [(1, False), (1, True), (2, False), (4, False)])
async def test_all_answers_are_right_and_the_counters_agree(num_stages: int, ahead: bool):
    pipeline = FakePipeline(block_size=2)
    requests = mixed_requests(30)
    scheduler = make_scheduler(
        num_stages=num_stages, num_blocks=24, block_size=2, max_microbatch_tokens=16, schedules_ahead=ahead
    )
    async with LocalEngine(scheduler, pipeline) as engine:
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
        after = await stats(engine)
    assert answers == [expected_events(request) for request in requests]
    assert pipeline.max_in_flight == num_stages + ahead
    assert (after["num_rows_ahead"] > after["num_rows_ahead_wasted"] > 0) == ahead
    assert after["num_requests_finished"] == 30
    assert after["num_tokens_generated"] == sum(
        len(answer) for answer, request in zip(answers, requests, strict=True) if request.task is Task.GENERATE
    )
    assert after["num_preemptions"] > 0
    for nothing in ("running", "waiting", "microbatches_in_flight", "kv_blocks_used", "tokens_waiting"):
        assert after[f"num_{nothing}"] == 0
    assert after["num_requests_aborted"] == after["num_requests_failed"] == after["num_recoveries"] == 0


@pytest.mark.parametrize("limits", [{"num_stages": 3}, {"schedules_ahead": True}], ids=["three stages", "ahead"])
@pytest.mark.parametrize("seed", range(1, 6))
async def test_losing_stages_at_random_changes_no_answer(seed: int, limits: dict[str, int]):
    chance = random.Random(seed)
    pipeline = FakePipeline(fails=lambda _: chance.random() < 0.1)
    requests = mixed_requests(25)
    scheduler = make_scheduler(num_blocks=16, max_microbatch_tokens=16, **limits)
    async with LocalEngine(scheduler, pipeline) as engine:
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
        after = await stats(engine)
        scheduler.check_integrity()
    assert answers == [expected_events(request) for request in requests]
    assert after["num_recoveries"] == pipeline.num_recoveries > 0
    assert after["num_kv_blocks_used"] == after["num_requests_failed"] == 0


@pytest.mark.parametrize(("num_stages", "ahead"), [(1, False), (1, True), (3, False)])
async def test_request_that_kills_the_pipeline_is_told_from_those_beside_it(num_stages: int, ahead: bool):
    """13 in a prompt kills a stage. That request is given up; the others, also later ones, are served."""
    pipeline = FakePipeline(fails=lambda microbatch: any(13 in row.token_ids for row in microbatch.rows))
    scheduler = make_scheduler(num_stages=num_stages, max_microbatch_tokens=16, schedules_ahead=ahead)
    others = [*mixed_requests(10), generate_request("long", [1, 2], max_new_tokens=40, ignore_eos=True)]
    async with LocalEngine(scheduler, pipeline) as engine:
        answers = [asyncio.create_task(collect(engine, request)) for request in others[:6]]
        poison = asyncio.create_task(collect(engine, generate_request("poison", [1, 13])))
        answers += [asyncio.create_task(collect(engine, request)) for request in others[6:]]
        assert await asyncio.gather(*answers) == [expected_events(request) for request in others]
        (event,) = await poison
        scheduler.check_integrity()
        good = generate_request("good", [1, 2])
        assert await collect(engine, good) == expected_events(good)
        after = await stats(engine)
    assert isinstance(event, FailureEvent)
    assert event.is_pipeline_at_fault
    assert "4 times in a row" in event.message
    assert pipeline.num_recoveries == MAX_LOSSES
    assert (after["num_requests_failed"], after["num_requests_finished"]) == (1, 12)


async def test_losses_with_tokens_between_them_are_never_given_up():
    pipeline = FakePipeline(fails=lambda _: pipeline.num_steps % MAX_LOSSES != 0)
    request = generate_request("a", [1], max_new_tokens=10, ignore_eos=True)
    async with LocalEngine(make_scheduler(), pipeline) as engine:
        assert await collect(engine, request) == expected_events(request)
    assert pipeline.num_recoveries > MAX_FUTILE_RECOVERIES


async def test_pipeline_that_never_finishes_a_step_ends_the_engine():
    pipeline = FakePipeline(fails=lambda _: True)
    emitted: list[Event] = []
    engine = Engine(make_scheduler(), pipeline, emitted.extend)
    for i in range(5):
        engine.add(generate_request(str(i), [i]))
    with pytest.raises(PipelineError, match="without a finished step"):
        await asyncio.wait_for(engine.run(), 10)
    assert 0 < len(emitted) < 5
    assert all(isinstance(event, FailureEvent) and event.is_pipeline_at_fault for event in emitted)


async def test_stage_lost_while_idle_is_brought_back_before_anyone_asks():
    pipeline = FakePipeline()
    async with LocalEngine(make_scheduler(), pipeline) as engine:
        await turns()
        for count in (1, 2):
            pipeline.lost_while_idle.set()
            await turns()
            assert pipeline.num_recoveries == count
        request = generate_request("a", [1])
        assert await collect(engine, request) == expected_events(request)


async def test_losses_while_idle_never_end_the_engine(monkeypatch: pytest.MonkeyPatch):
    """However many: those that are far apart are brought back from at once."""
    monkeypatch.setattr("gptj_serve.engine.engine.RECOVERY_DELAY_S", 60.0)
    monkeypatch.setattr("gptj_serve.engine.engine.SOON_S", 0.0)
    pipeline = FakePipeline()
    async with LocalEngine(make_scheduler(), pipeline) as engine:
        await turns()
        for count in range(1, MAX_FUTILE_RECOVERIES + 4):
            pipeline.lost_while_idle.set()
            await turns()
            assert pipeline.num_recoveries == count
        request = generate_request("a", [1])
        assert await collect(engine, request) == expected_events(request)


async def test_losses_while_idle_that_follow_each_other_soon_are_waited_after(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gptj_serve.engine.engine.RECOVERY_DELAY_S", 0.01)
    monkeypatch.setattr("gptj_serve.engine.engine.MAX_RECOVERY_DELAY_S", 0.04)
    pipeline = FakePipeline()
    clock = asyncio.get_running_loop().time
    async with LocalEngine(make_scheduler(), pipeline) as engine:
        await turns()
        began_at = clock()
        for count in range(1, MAX_FUTILE_RECOVERIES + 4):
            pipeline.lost_while_idle.set()
            async with asyncio.timeout(5):
                while pipeline.num_recoveries < count:
                    await asyncio.sleep(0.001)
            await turns()
        assert clock() - began_at >= 0.01 + 0.02 + 0.04 * (MAX_FUTILE_RECOVERIES + 4 - 4)
        request = generate_request("a", [1])
        assert await collect(engine, request) == expected_events(request)


async def test_several_steps_lost_at_once_leave_no_trace_in_the_log(caplog):
    """Each lost step is a task with an exception; asyncio complains of those that nobody looked at."""
    pipeline = FakePipeline()
    pipeline.gate.clear()
    async with LocalEngine(make_scheduler(num_stages=3, max_microbatch_tokens=2), pipeline) as engine:
        requests = [generate_request(str(i), [i, i + 1]) for i in range(3)]
        answers = [asyncio.create_task(collect(engine, request)) for request in requests]
        await turns()
        assert pipeline.max_in_flight == 3
        pipeline.is_lost = True
        pipeline.gate.set()
        assert await asyncio.gather(*answers) == [expected_events(request) for request in requests]
    await turns()
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_pipeline_that_cannot_recover_ends_the_engine():
    """It says so by raising, and leaves it to its owner whether the requests can go on elsewhere."""
    pipeline = FakePipeline(fails=lambda _: True)
    pipeline.can_recover = False
    emitted: list[Event] = []
    engine = Engine(make_scheduler(), pipeline, emitted.extend)
    for i in range(3):
        engine.add(generate_request(str(i), [i]))
    with pytest.raises(PipelineError, match="no stage comes back"):
        await asyncio.wait_for(engine.run(), 10)
    assert emitted == []
    assert engine.stats().num_kv_blocks_used == 0


async def test_request_after_the_end_of_a_local_engine_does_not_wait_for_ever():
    pipeline = FakePipeline(fails=lambda _: True)
    pipeline.can_recover = False
    async with LocalEngine(make_scheduler(), pipeline) as engine:
        first = await collect(engine, generate_request("a", [1]))
        assert [type(event) for event in first] == [FailureEvent]
        try:
            later = await asyncio.wait_for(collect(engine, generate_request("b", [1])), 2)
        except PipelineError:
            return  # just as good
        assert [type(event) for event in later] == [FailureEvent]


async def test_cancelled_engine_fails_what_it_serves():
    pipeline = FakePipeline()
    pipeline.gate.clear()
    async with LocalEngine(make_scheduler(), pipeline) as engine:
        answer = asyncio.create_task(collect(engine, generate_request("a", [1])))
        await turns()
    assert [type(event) for event in await answer] == [FailureEvent]


async def test_events_of_a_step_come_together():
    emitted: list[list[Event]] = []
    engine = Engine(make_scheduler(), FakePipeline(), emitted.append)
    for i in range(4):
        engine.add(generate_request(str(i), [i], max_new_tokens=3, ignore_eos=True))
    task = asyncio.create_task(engine.run())
    while sum(map(is_terminal, [event for events in emitted for event in events])) < 4:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [len(events) for events in emitted] == [4, 4, 4]


async def test_abort_frees_blocks_at_once():
    pipeline = FakePipeline()
    pipeline.gate.clear()
    emitted: list[Event] = []
    engine = Engine(make_scheduler(), pipeline, emitted.extend)
    engine.add(generate_request("a", range(9)))
    task = asyncio.create_task(engine.run())
    await turns()
    assert (engine.stats().num_kv_blocks_used, engine.stats().num_microbatches_in_flight) == (3, 1)
    engine.abort("a")
    engine.abort("a")  # and again: nothing happens
    assert (engine.stats().num_kv_blocks_used, engine.stats().num_running) == (0, 0)
    assert engine.stats().num_requests_aborted == 1
    pipeline.gate.set()
    await turns()
    assert engine.stats().num_microbatches_in_flight == 0
    assert emitted == []
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_closing_a_stream_aborts_its_request_and_no_other():
    pipeline = FakePipeline()
    other = generate_request("other", [2], max_new_tokens=30, ignore_eos=True)
    async with LocalEngine(make_scheduler(num_stages=2), pipeline) as engine:
        answer = asyncio.create_task(collect(engine, other))
        async with aclosing(engine.submit(generate_request("a", [1], max_new_tokens=40, ignore_eos=True))) as stream:
            assert not is_terminal(await anext(stream))
            assert not is_terminal(await anext(stream))
        after = await stats(engine)
        assert (after["num_requests_aborted"], after["num_running"]) == (1, 1)
        assert await answer == expected_events(other)
        after = await stats(engine)
    assert (after["num_kv_blocks_used"], after["num_requests_finished"]) == (0, 1)


async def test_a_cancelled_reader_aborts_its_request():
    async with LocalEngine(make_scheduler(), FakePipeline()) as engine:
        reader = asyncio.create_task(collect(engine, generate_request("a", [1], max_new_tokens=60, ignore_eos=True)))
        await turns()
        assert (await stats(engine))["num_running"] == 1
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        after = await stats(engine)
    assert (after["num_requests_aborted"], after["num_kv_blocks_used"]) == (1, 0)


async def test_finished_stream_is_not_counted_as_aborted():
    async with LocalEngine(make_scheduler(), FakePipeline()) as engine:
        await collect(engine, head_request("a", Task.CLASSIFY, [1, 2]))
        assert (await stats(engine))["num_requests_aborted"] == 0


async def test_refused_request_disturbs_nobody():
    request = generate_request("a", [1], max_new_tokens=30, ignore_eos=True)
    async with LocalEngine(make_scheduler(), FakePipeline()) as engine:
        answer = asyncio.create_task(collect(engine, request))
        await turns()
        with pytest.raises(InvalidRequestError, match="request_id='a'"):
            await collect(engine, head_request("a", Task.QA, [1]))
        with pytest.raises(InvalidRequestError, match="max_new_tokens=64"):
            await collect(engine, generate_request("b", [1], max_new_tokens=64))
        assert await answer == expected_events(request)


async def test_engine_that_stops_while_a_grammar_is_compiled_takes_no_request():
    pipeline = FakePipeline(fails=lambda _: True)
    pipeline.can_recover = False
    stopped = asyncio.Event()

    async def compile_slowly(grammar: Grammar) -> None:
        await stopped.wait()

    async with LocalEngine(make_scheduler(), pipeline, compile_slowly) as engine:
        grammar = Grammar(GrammarKind.REGEX, "a")
        waiting = asyncio.create_task(collect(engine, generate_request("a", [1], grammar=grammar)))
        await turns()
        assert [type(event) for event in await collect(engine, generate_request("b", [1]))] == [FailureEvent]
        await turns()
        stopped.set()
        with pytest.raises(PipelineError, match="has stopped"):
            await asyncio.wait_for(waiting, 2)


async def test_a_job_that_breaks_makes_way_for_who_waits_behind_it():
    scheduler = make_scheduler(max_microbatch_tokens=4, max_num_sequences=1)
    emitted: list[Event] = []
    engine = Engine(scheduler, FakePipeline(), emitted.extend)
    engine.add(generate_request("bad", range(8)))

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    scheduler._entries["bad"].job.row = broken
    good = generate_request("good", [1, 2])
    engine.add(good)
    task = asyncio.create_task(engine.run())
    await turns(100)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [type(event) for event in emitted if event.request_id == "bad"] == [FailureEvent]
    assert [event for event in emitted if event.request_id == "good"] == expected_events(good)
