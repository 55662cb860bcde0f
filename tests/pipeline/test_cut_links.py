"""A link that is cut while both its ends live is noticed at once, and costs nothing but time."""

import asyncio
import itertools
import os
import random
import socket
import threading
from pathlib import Path

import pytest
import zmq

from gptj_serve.errors import PipelineError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.sockets import HEARTBEAT_INTERVAL_S, LINK_TIMEOUT_S, CurveKeys, connect_sender
from gptj_serve.steps import MicroBatch, Row, StepOutput
from tests.chaos import links
from tests.pipeline.linked import LinkedPipeline, generate_all, make_runners, open_links
from tests.pipeline.relay import Relay

STEP = MicroBatch(0, [Row([1, 2, 3], 0, [0])])


def address_of(pipeline: LinkedPipeline, link: str) -> str:
    return {
        "steps to stage 0": pipeline.addresses[0].steps,
        "steps to stage 1": pipeline.addresses[-1].steps,
        "hidden": pipeline.addresses[-1].hidden,
        "results": pipeline.results_address,
    }[link]


def cut(address: str) -> None:
    """End the one connection to a receiver's address, as a network may: whoever holds it is not asked."""
    (link,) = [link for link in links.connections_of([os.getpid()]) if link.address == address]
    assert links.cut(link)


NAMED_BY = {
    "steps to stage 0": {"engine": "steps to stage 0", 0: "steps from the engine"},
    "steps to stage 1": {"engine": "steps to stage 1", 1: "steps from the engine"},
    "hidden": {0: "hidden states to the next stage", 1: "hidden states from the stage before"},
    "results": {"engine": "results from the last stage", 1: "results to the engine"},
}
"""Per link: what its ends, the engine or a stage's loop, call it."""


@pytest.mark.parametrize("link", NAMED_BY)
async def test_a_cut_is_told_by_both_ends(tiny_gptj, linked, link: str) -> None:
    async with open_links(linked(make_runners(Checkpoint.open(tiny_gptj()), 2))) as pipeline:
        assert await pipeline.run(STEP) == StepOutput(0, [None])
        cut(address_of(pipeline, link))
        for end, name in NAMED_BY[link].items():
            told = pipeline.links.watch() if end == "engine" else asyncio.wrap_future(pipeline.loops[end].failure)
            with pytest.raises(PipelineError, match=f"the link for {name} was cut"):
                await told
        with pytest.raises(PipelineError, match="was cut"):
            await pipeline.watch()
        assert [loop.failure.done() for loop in pipeline.loops] == [index in NAMED_BY[link] for index in (0, 1)]


async def test_a_cut_is_noticed_while_its_step_still_runs(tiny_gptj, linked) -> None:
    """Not after `step_timeout_s`, nor when the stage is done: this one goes on only once the cut was noticed."""
    runners = make_runners(Checkpoint.open(tiny_gptj()), 2)
    is_held_up, goes_on = threading.Event(), threading.Event()

    def hold_up(*_: object) -> None:
        is_held_up.set()
        goes_on.wait()

    runners[1].stage.ln_f.register_forward_pre_hook(hold_up)
    for link in NAMED_BY:
        is_held_up.clear()
        goes_on.clear()
        async with open_links(linked(runners, step_timeout_s=3600)) as pipeline:
            step = asyncio.create_task(pipeline.run(STEP))
            try:
                assert await asyncio.to_thread(is_held_up.wait, 60)
                cut(address_of(pipeline, link))
                with pytest.raises(PipelineError, match="was cut"):
                    await pipeline.watch()
            finally:
                goes_on.set()
                step.cancel()


async def test_answers_are_exact_however_often_links_are_cut(tiny_gptj, linked) -> None:
    checkpoint = Checkpoint.open(tiny_gptj())
    in_process = InProcessPipeline(make_runners(checkpoint, 2))
    expected = await generate_all(checkpoint, in_process, 2, max_new_tokens=40)
    in_process.close()
    rng = random.Random(0)

    async def cut_links(pipeline: LinkedPipeline) -> None:
        for link in [*NAMED_BY, *NAMED_BY]:
            num_recoveries, enough = pipeline.num_recoveries, pipeline.num_steps + rng.randrange(3, 12)
            while pipeline.num_steps < enough:
                await asyncio.sleep(0)
            cut(address_of(pipeline, link))
            while pipeline.num_recoveries == num_recoveries:
                await asyncio.sleep(0.001)

    async with open_links(linked(make_runners(checkpoint, 2))) as pipeline:
        cutter = asyncio.create_task(cut_links(pipeline))
        answers = await generate_all(checkpoint, pipeline, 2, max_new_tokens=40)
        await cutter
        assert answers == expected
        assert pipeline.num_recoveries == 8


async def test_answers_are_exact_though_links_are_cut_with_steps_made_ahead_in_flight(tiny_gptj, linked) -> None:
    checkpoint = Checkpoint.open(tiny_gptj())
    in_process = InProcessPipeline(make_runners(checkpoint, 1))
    expected = await generate_all(checkpoint, in_process, 1, max_new_tokens=40)
    in_process.close()

    async def cut_links(pipeline: LinkedPipeline) -> None:
        for num_recoveries, link in enumerate(["steps to stage 0", "results"]):
            while pipeline.num_steps < 8 * (num_recoveries + 1):
                await asyncio.sleep(0)
            cut(address_of(pipeline, link))
            while pipeline.num_recoveries == num_recoveries:
                await asyncio.sleep(0.001)

    async with open_links(linked(make_runners(checkpoint, 1))) as pipeline:
        cutter = asyncio.create_task(cut_links(pipeline))
        assert await generate_all(checkpoint, pipeline, 1, max_new_tokens=40, ahead=True) == expected
        await cutter
        assert pipeline.num_recoveries == 2


async def test_an_unlinked_socket_file_disturbs_no_link(tiny_gptj, tmp_path: Path) -> None:
    """A link that stands needs its file no longer, and a recovery makes new ones."""
    numbers = itertools.count()
    runners = make_runners(Checkpoint.open(tiny_gptj()), 2)
    pipeline = LinkedPipeline(runners, lambda name: f"ipc://{tmp_path}/{next(numbers)}-{name}", lambda: None)
    async with open_links(pipeline):
        assert await pipeline.run(STEP) == StepOutput(0, [None])
        for path in tmp_path.iterdir():
            path.unlink()
        assert await pipeline.run(MicroBatch(1, STEP.rows)) == StepOutput(1, [None])
        cut(address_of(pipeline, "hidden"))
        with pytest.raises(PipelineError, match="hidden states"):
            await pipeline.watch()
        await pipeline.recover()
        assert await pipeline.run(STEP) == StepOutput(0, [None])


@pytest.mark.parametrize("link", NAMED_BY)
async def test_a_link_that_can_not_be_made_is_told(tiny_gptj, tmp_path: Path, link: str) -> None:
    """Its socket file is gone before the sender comes."""
    pipeline = LinkedPipeline(
        make_runners(Checkpoint.open(tiny_gptj()), 2), lambda name: f"ipc://{tmp_path}/{name}", lambda: None
    )
    Path(address_of(pipeline, link).removeprefix("ipc://")).unlink()
    async with open_links(pipeline):
        with pytest.raises(PipelineError, match="was cut"):
            await pipeline.watch()


async def test_strangers_cut_nothing(tiny_gptj) -> None:
    """Whoever knocks at a TCP port: one that says nothing, one that speaks HTTP, one with other keys."""
    keys = CurveKeys.generate()
    runners = make_runners(Checkpoint.open(tiny_gptj()), 2)
    pipeline = LinkedPipeline(runners, lambda _: "tcp://127.0.0.1", lambda: keys)
    context = zmq.Context[zmq.Socket[bytes]]()
    silent, foes = [], []
    try:
        for link in NAMED_BY:
            host, port = address_of(pipeline, link).removeprefix("tcp://").split(":")
            silent.append(socket.create_connection((host, int(port))))  # before the peer comes, and stays
        async with open_links(pipeline):
            assert await pipeline.run(STEP) == StepOutput(0, [None])
            for link in NAMED_BY:
                host, port = address_of(pipeline, link).removeprefix("tcp://").split(":")
                with socket.create_connection((host, int(port))) as speaker:
                    speaker.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * 100)
                foes.append(context.socket(zmq.PUSH))
                connect_sender(foes[-1], address_of(pipeline, link), CurveKeys.generate())
            await asyncio.sleep(0.3)
            for one in silent:
                one.close()
            await asyncio.sleep(0.1)
            assert await pipeline.run(MicroBatch(1, STEP.rows)) == StepOutput(1, [None])
            assert [loop.failure.done() for loop in pipeline.loops] == [False, False]
    finally:
        context.destroy(linger=0)


async def test_a_peer_that_falls_silent_is_noticed(tiny_gptj) -> None:
    """As when its host loses its power: the connection stands, but nothing comes over it any more."""
    keys = CurveKeys.generate()
    pipeline = LinkedPipeline(make_runners(Checkpoint.open(tiny_gptj()), 2), lambda _: "tcp://127.0.0.1", lambda: keys)
    relay = Relay(pipeline.addresses[-1].hidden)
    pipeline.addresses[-1] = pipeline.addresses[1]._replace(hidden=relay.address)
    async with relay, open_links(pipeline):
        assert await pipeline.run(STEP) == StepOutput(0, [None])
        await asyncio.sleep(LINK_TIMEOUT_S + HEARTBEAT_INTERVAL_S)  # who has nothing to say is not silent
        assert await pipeline.run(MicroBatch(1, STEP.rows)) == StepOutput(1, [None])
        relay.is_silent = True
        for index, name in ((0, "hidden states to the next stage"), (1, "hidden states from the stage before")):
            with pytest.raises(PipelineError, match=f"the link for {name} was cut"):
                await asyncio.wrap_future(pipeline.loops[index].failure)


@pytest.mark.parametrize("link", NAMED_BY)
async def test_who_waits_for_links_hears_which_can_not_be_made(tiny_gptj, tmp_path: Path, link: str) -> None:
    pipeline = LinkedPipeline(
        make_runners(Checkpoint.open(tiny_gptj()), 2), lambda name: f"ipc://{tmp_path}/{name}", lambda: None
    )
    Path(address_of(pipeline, link).removeprefix("ipc://")).unlink()
    unmade = {"steps to stage 0": "engine", "steps to stage 1": "engine", "hidden": 0, "results": 1}[link]
    async with open_links(pipeline):
        for end in ("engine", 0, 1):
            if end == "engine":
                waiting = pipeline.links.wait_until_linked()
            else:
                waiting = asyncio.to_thread(pipeline.loops[end].wait_until_linked)
            if end == unmade:
                with pytest.raises(PipelineError, match=f"the link for {NAMED_BY[link][end]} could not be made"):
                    await waiting
            else:
                await waiting
