"""Stage loops linked over ZeroMQ, in this process: same tokens, closed to strangers, and no failure unnoticed."""

import asyncio
import gc
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from gptj_serve.errors import PipelineError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.handoff import HiddenHeader, ZmqHandoff
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.sockets import CurveKeys, bind_receiver, connect_sender
from gptj_serve.steps import MicroBatch, Row, StepOutput
from tests.pipeline.linked import NUM_BLOCKS, generate_all, make_runners, open_links

STEP = MicroBatch(0, [Row([1, 2, 3], 0, [0])])


@pytest.mark.parametrize(("num_stages", "ahead"), [(1, False), (1, True), (3, False)])
async def test_linked_stages_equal_threads(tiny_gptj, linked, num_stages: int, ahead: bool) -> None:
    checkpoint = Checkpoint.open(tiny_gptj())
    in_process = InProcessPipeline(make_runners(checkpoint, num_stages))
    expected = await generate_all(checkpoint, in_process, num_stages)
    in_process.close()
    async with open_links(linked(make_runners(checkpoint, num_stages))) as pipeline:
        assert await generate_all(checkpoint, pipeline, num_stages, ahead=ahead) == expected
    assert all(len(tokens) == 12 for tokens in expected)


async def test_failing_stage_is_reported(tiny_gptj, linked) -> None:
    """The loop's `failure` says what happened; a hanging step ends at its timeout."""
    async with open_links(linked(make_runners(Checkpoint.open(tiny_gptj()), 2))) as pipeline:
        pipeline.links._step_timeout_s = 0.5
        bad = MicroBatch(0, [Row([1, 2], 0, [NUM_BLOCKS + 5])])  # a block that isn't there
        with pytest.raises(PipelineError, match="microbatch 0 is not back"):
            await pipeline.run(bad)
        with pytest.raises(IndexError):
            pipeline.loops[0].failure.result(timeout=10)
        with pytest.raises(PipelineError, match="IndexError"):
            await pipeline.watch()


async def test_failed_links_fail_every_step(tiny_gptj, linked) -> None:
    async with open_links(linked(make_runners(Checkpoint.open(tiny_gptj()), 1))) as pipeline:
        assert await pipeline.run(STEP) == StepOutput(0, [None])
        step = asyncio.create_task(pipeline.run(MicroBatch(7, [STEP.rows[0]])))
        await asyncio.sleep(0)
        pipeline.links.fail(PipelineError("stage 0 was lost"))
        with pytest.raises(PipelineError, match="stage 0 was lost"):
            await step
        with pytest.raises(PipelineError, match="stage 0 was lost"):
            await pipeline.run(STEP)


async def test_a_step_that_was_given_up_leaves_no_complaint(tiny_gptj, linked) -> None:
    """asyncio logs an exception that nobody asked for, when the future is collected."""
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with open_links(linked(make_runners(Checkpoint.open(tiny_gptj()), 1))) as pipeline:
        step = asyncio.create_task(pipeline.run(STEP))
        await asyncio.sleep(0)
        step.cancel()
        pipeline.links.fail(PipelineError("stage 0 was lost"))
        await asyncio.wait([step])
    del step
    gc.collect()
    assert complaints == []


async def test_what_is_no_message_is_left_out(tiny_gptj, linked, caplog) -> None:
    """Whoever could send it: the stages and the engine go on with what is."""
    async with open_links(linked(make_runners(Checkpoint.open(tiny_gptj()), 2))) as pipeline:
        for junk in (b"", b"\xc1" * 9, msgspec.msgpack.encode(STEP)[:-1], b"\xa1\xff"):
            for stage in pipeline.links._stages:
                stage.send(junk)
            pipeline.loops[0]._next.send_multipart([junk, junk])
            pipeline.loops[1]._next.send(junk)
        assert await pipeline.run(STEP) == StepOutput(0, [None])
    assert {record.getMessage().partition(" left out")[0] for record in caplog.records} == {
        "a step is", "hidden states are", "a result is",
    }  # fmt: skip


async def test_stopping_is_not_a_failure(tiny_gptj, linked) -> None:
    async with open_links(linked(make_runners(Checkpoint.open(tiny_gptj()), 1))) as pipeline:
        assert await pipeline.run(STEP) == StepOutput(0, [None])
        await asyncio.to_thread(pipeline.loops[0].stop)
        assert pipeline.loops[0].failure.result(timeout=0) is None
    assert not [thread for thread in threading.enumerate() if thread.name in ("stage-loop", "link-watch")]


@pytest.mark.parametrize("stranger", [None, "other keys"])
def test_stranger_is_refused(stranger: str | None) -> None:
    keys = CurveKeys.generate()
    context = zmq.Context[zmq.Socket[bytes]]()
    receiver, friend, foe = context.socket(zmq.PULL), context.socket(zmq.PUSH), context.socket(zmq.PUSH)
    try:
        address = bind_receiver(receiver, "tcp://127.0.0.1", keys)
        connect_sender(foe, address, CurveKeys.generate() if stranger else None)
        foe.send(b"from a stranger")
        connect_sender(friend, address, keys)
        friend.send(b"from a friend")
        received = []
        while receiver.poll(1000):
            received.append(receiver.recv())
        assert received == [b"from a friend"]
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_arrive_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    context = zmq.Context[zmq.Socket[bytes]]()
    receiver, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    try:
        connect_sender(sender, bind_receiver(receiver, f"ipc://{tmp_path}/hidden", None), None)
        hidden = torch.randn(5, 8).to(dtype).t().contiguous().t()  # not contiguous
        before = time.time()
        ZmqHandoff(sender).send(3, hidden)
        arrived, sent_at = ZmqHandoff(receiver).receive(3, lambda: False)
        assert before <= sent_at <= time.time()
        assert arrived is not None
        assert arrived.dtype == dtype
        assert torch.equal(arrived, hidden)
        ZmqHandoff(sender).send(4, hidden)
        sender.send_multipart([b"\xc1", b""])  # no message at all
        sender.send_multipart([msgspec.msgpack.encode(HiddenHeader(6, "float32", [2, 2], 0.0)), b"too short"])
        ZmqHandoff(sender).send(6, hidden)
        with pytest.raises(PipelineError, match="microbatch 6 came when 5 was due"):  # 4 was late, the rest nothing
            ZmqHandoff(receiver).receive(5, lambda: False)
    finally:
        context.destroy(linger=0)
