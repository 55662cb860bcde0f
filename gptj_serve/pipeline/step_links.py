"""`StepLinks`: the engine's side of the links: steps out to every stage at once, results back from the last.

A link that is cut ends the steps in flight at once: what was on its way is lost.
"""

import asyncio
import logging
from collections.abc import Sequence

import msgspec
import zmq
import zmq.asyncio

from gptj_serve.errors import PipelineError, WireError
from gptj_serve.pipeline.link_watch import LinkWatch
from gptj_serve.pipeline.sockets import CurveKeys, bind_receiver, connect_sender
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.wire import WireDecoder

logger = logging.getLogger(__name__)


class StepLinks:
    """Lives as long as the stages' loops do: after a failure, `close` it and make another."""

    def __init__(self, keys: CurveKeys | None, step_timeout_s: float) -> None:
        self._keys = keys
        self._step_timeout_s = step_timeout_s
        self._context = zmq.asyncio.Context()
        self._results: zmq.asyncio.Socket = self._context.socket(zmq.PULL)
        self._stages: list[zmq.Socket[bytes]] = []
        self._pending: dict[int, asyncio.Future[StepOutput]] = {}
        self._failure: PipelineError | None = None
        self._has_failed = asyncio.Event()
        self._receiver: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch = LinkWatch(self._on_cut)
        self._last_result_at = 0.0
        self.timed_out = False
        self._encoder = msgspec.msgpack.Encoder()

    def bind(self, address: str) -> str:
        """Listen for results at `ipc://directory/name` or `tcp://host`; returns the address for the last stage."""
        self._watch.add(self._results, "results from the last stage")
        return bind_receiver(self._results, address, self._keys)

    def connect(self, step_addresses: Sequence[str]) -> None:
        """Connect to every stage, in order, and begin to receive results."""
        self._loop = asyncio.get_running_loop()
        for index, address in enumerate(step_addresses):
            socket = zmq.Context[zmq.Socket[bytes]](self._context).socket(zmq.PUSH)
            self._watch.add(socket, f"steps to stage {index}")
            connect_sender(socket, address, self._keys)
            self._stages.append(socket)
        self._watch.start()
        self._receiver = asyncio.create_task(self._receive_results())

    async def wait_until_linked(self) -> None:
        """Until the link to every stage stands. Raises `PipelineError` if one can't be made."""
        await asyncio.to_thread(self._watch.wait_until_made)

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        """Raises `PipelineError` when the links fail or the step exceeds its time."""
        if self._failure is not None:
            raise self._failure
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepOutput] = loop.create_future()
        self._pending[microbatch.microbatch_id] = future
        sent_at = loop.time()
        try:
            message = self._encoder.encode(microbatch)
            for socket in self._stages:
                socket.send(message, zmq.NOBLOCK)
            while not future.done():
                # Steps in flight queue behind each other: the time counts from the last one that came back.
                remaining_s = max(sent_at, self._last_result_at) + self._step_timeout_s - loop.time()
                if remaining_s <= 0:
                    self.timed_out = True
                    raise PipelineError(
                        f"microbatch {microbatch.microbatch_id} is not back after step_timeout_s={self._step_timeout_s}"
                    )
                await asyncio.wait({future}, timeout=remaining_s)
            return future.result()
        except zmq.ZMQError as error:
            raise PipelineError(f"sending microbatch {microbatch.microbatch_id} failed: {error}") from error
        finally:
            del self._pending[microbatch.microbatch_id]

    async def watch(self) -> None:
        """Raise what the links failed with, as soon as they do."""
        await self._has_failed.wait()
        assert self._failure is not None
        raise self._failure

    def fail(self, error: PipelineError) -> None:
        """End every step in flight, and every later one, with `error`, or with what these links failed with before."""
        self._failure = self._failure or error
        self._has_failed.set()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._failure)
                future.exception()  # its step may have been given up already: then nobody else asks

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.cancel()
        self.fail(PipelineError("the links were closed"))
        self._watch.stop()
        for socket in [*self._stages, self._results]:
            socket.close(linger=0)
        self._context.term()

    def _on_cut(self, error: PipelineError) -> None:
        """In the watch's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.fail, error)

    async def _receive_results(self) -> None:
        decoder = WireDecoder[StepOutput](StepOutput)
        try:
            while True:
                try:
                    output = decoder.decode(await self._results.recv())
                except WireError as error:
                    logger.warning("a result is left out: %s", error)
                    continue
                self._last_result_at = asyncio.get_running_loop().time()
                future = self._pending.get(output.microbatch_id)
                if future is not None and not future.done():
                    future.set_result(output)
        except zmq.ZMQError as error:
            self.fail(PipelineError(f"receiving results failed: {error}"))
