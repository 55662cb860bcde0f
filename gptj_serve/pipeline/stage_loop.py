"""`StageLoop`: the thread in which a stage takes microbatches, runs them and hands them on."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import msgspec
import zmq
from torch import Tensor

from gptj_serve.config import HandoffKind
from gptj_serve.errors import PipelineError, WireError
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.step_results import GivenStep, StepResults
from gptj_serve.pipeline.handoff import HandoffEnd, HiddenReceiver, HiddenSender
from gptj_serve.pipeline.handoff_ends import Site, listen, reach
from gptj_serve.pipeline.link_watch import LinkWatch
from gptj_serve.pipeline.sockets import CurveKeys, bind_receiver, connect_sender, receive
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.pipeline.step_meter import StepMeter
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.wire import WireDecoder

MAX_CONNECT_S = 60.0
"""More than a handoff's own time-outs, which NCCL doesn't have everywhere: a neighbour that hangs while the two set up
their communicator keeps this one's thread. The stage is then lost too: it can't be stopped."""

logger = logging.getLogger(__name__)


class StageAddresses(NamedTuple):
    """Where a stage listens: for steps from the engine, and for hidden states from the stage before it."""

    steps: str
    hidden: str
    tensors: str  # what that stage must know besides, of a handoff that needs more than ZeroMQ


class StageLoop:
    """One stage's links and thread: `bind`, then `start` towards the next stage (or, from the last, the engine).

    It lives as long as its links; after a failure anywhere in the pipeline a new one is made around the same runner.
    `failure` completes with what went wrong, or with None when told to stop. A link that is cut ends the thread, after
    the step at hand: no later step could be complete.
    """

    def __init__(
        self,
        runner: StageRunner,
        keys: CurveKeys | None,
        meter: StepMeter | None = None,
        max_connect_s: float = MAX_CONNECT_S,
    ) -> None:
        self._runner = runner
        self._keys = keys
        self._meter = meter or StepMeter()
        self._max_connect_s = max_connect_s
        self._microbatch_id: int | None = None  # of the step at hand, or the last one
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._steps = self._context.socket(zmq.PULL)
        self._hidden = self._context.socket(zmq.PULL)
        self._next = self._context.socket(zmq.PUSH)
        self._watch = LinkWatch(self._fail)
        self._site = Site(runner.spec.device, "127.0.0.1")
        self._from_previous: HiddenReceiver | None = None
        self._to_next: HiddenSender | None = None
        self._incoming: HandoffKind = "zmq"
        self._outgoing: HandoffKind = "zmq"
        self._connected = threading.Event()  # to its neighbours, or it has failed or been stopped before
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: Future[None] = Future()

    def bind(self, address: str, handoff: HandoffKind = "zmq") -> StageAddresses:
        """Listen below `address`, `ipc://directory/name` or `tcp://host`, for hidden states that come by `handoff`."""
        self._watch.add(self._steps, "steps from the engine")
        tensors = ""
        if not self._runner.stage.is_first:
            self._watch.add(self._hidden, "hidden states from the stage before")
        if address.startswith("tcp://"):
            steps, hidden = address, address
            self._site = self._site._replace(host=address.removeprefix("tcp://"))
        else:
            steps, hidden = f"{address}-steps", f"{address}-hidden"
        steps = bind_receiver(self._steps, steps, self._keys)
        hidden = bind_receiver(self._hidden, hidden, self._keys)
        if not self._runner.stage.is_first:
            self._from_previous, tensors = listen(handoff, self._hidden, self._site)
            self._incoming = handoff
        return StageAddresses(steps, hidden, tensors)

    def start(self, next_address: str, handoff: HandoffKind = "zmq", tensors: str = "") -> None:
        """Towards the next stage, which takes hidden states by `handoff` and bound to `tensors`, or the engine."""
        is_last = self._runner.stage.is_last
        self._watch.add(self._next, "results to the engine" if is_last else "hidden states to the next stage")
        connect_sender(self._next, next_address, self._keys)
        if not is_last:
            self._outgoing = handoff
            self._to_next = reach(handoff, self._next, tensors, self._site)
        self._watch.start()
        self._runner.restart()
        self._thread = threading.Thread(target=self._run, name="stage-loop", daemon=True)
        self._thread.start()

    def wait_until_linked(self) -> None:
        """Until the links to the stages beside it stand. Raises `PipelineError` if they can't be made."""
        self._watch.wait_until_made()
        if not self._connected.wait(self._max_connect_s):
            raise PipelineError(f"no connection to the stages beside it within {self._max_connect_s:g} s")
        if self.failure.done() and (error := self.failure.exception()) is not None:
            raise PipelineError(f"{error}") from error

    def stop(self) -> None:
        """End the thread and close the links; returns when the step at hand, if any, is done.

        Raises `PipelineError` if the device does no more work for this process, as after most of CUDA's errors: then
        the stage is lost, though its process lives.
        """
        self._end_waits()
        if self._thread is not None:
            self._thread.join()
        for end in self._ends():
            end.close()
        self._watch.stop()
        self._context.destroy(linger=0)
        with contextlib.suppress(InvalidStateError):
            self.failure.set_result(None)
        try:
            self._runner.synchronize()
        except RuntimeError as error:
            raise PipelineError(f"the device does no more work for this process: {error}") from error

    def _ends(self) -> list[HandoffEnd]:
        return [end for end in (self._to_next, self._from_previous) if end is not None]

    def _run(self) -> None:
        try:
            for end in self._ends():
                end.connect(self._stopping.is_set)
            self._connected.set()
            self._serve()
        except Exception as error:
            self._fail_at_a_step(error)

    def _fail_at_a_step(self, error: Exception) -> None:
        """While it is handled."""
        if self._stopping.is_set():  # what was told to stop fails for no reason of its own
            return
        if not isinstance(error, PipelineError):
            span = self._runner.spec.span
            logger.exception("layers %d to %d failed at microbatch %s", span[0], span[-1], self._microbatch_id)
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        """In any thread."""
        with contextlib.suppress(InvalidStateError):  # the first one counts
            self.failure.set_exception(error)
        self._end_waits()

    def _end_waits(self) -> None:
        self._stopping.set()
        self._connected.set()
        for end in self._ends():
            end.abort()

    def _serve(self) -> None:
        runner = self._runner
        if not isinstance(runner, GPUStageRunner):
            self._meter.wait()
            for arrived in self._microbatches():
                self._run_step(*arrived)
            return
        results = StepResults(runner, self._meter, self._send_output, self._fail_at_a_step)
        try:
            for arrived in self._microbatches():
                results.put(self._give_step(runner, *arrived))
        finally:
            results.close()

    def _microbatches(self) -> Iterator[tuple[MicroBatch, Tensor | None, float | None]]:
        """With the hidden states of the stage before, and when it sent them; ends when told to stop."""
        decoder = WireDecoder[MicroBatch](MicroBatch)
        while (frames := receive(self._steps, self._stopping.is_set)) is not None:
            try:
                microbatch = decoder.decode(frames[0].buffer)
            except WireError as error:
                logger.warning("a step is left out: %s", error)
                continue
            self._microbatch_id = microbatch.microbatch_id
            hidden: Tensor | None = None
            sent_at: float | None = None
            if self._from_previous is not None:
                received = self._from_previous.receive(microbatch.microbatch_id, self._stopping.is_set)
                if received is None:
                    return
                hidden, sent_at = received
            yield microbatch, hidden, sent_at
            if self._stopping.is_set():
                return

    def _run_step(self, microbatch: MicroBatch, hidden: Tensor | None, sent_at: float | None) -> None:
        is_done = self._runner.spec.device.type == "cpu" or self._may_have_received_anything
        self._meter.begin(sent_at)
        try:
            result = self._runner.run(microbatch, hidden)
            if is_done:
                self._runner.synchronize()
                self._meter.end(microbatch)
            if self._stopping.is_set():
                return
            if isinstance(result, StepOutput):
                self._send_output(result)
            else:
                assert self._to_next is not None
                self._to_next.send(microbatch.microbatch_id, result)
            if not is_done:  # what was handed on is on its way already
                self._runner.synchronize()
                self._meter.end(microbatch)
        finally:
            self._meter.wait()

    def _give_step(
        self, runner: GPUStageRunner, microbatch: MicroBatch, hidden: Tensor | None, sent_at: float | None
    ) -> GivenStep:
        """To the device; what comes of it is waited for elsewhere."""
        step = runner.begin(microbatch, hidden)
        given_at = time.time()
        if step.hidden is not None:
            assert self._to_next is not None
            if self._may_have_received_anything:
                step.wait()
            if not self._stopping.is_set():
                with runner.hidden_of(step) as states:
                    self._to_next.send(microbatch.microbatch_id, states)
        return GivenStep(step, microbatch, given_at, sent_at)

    @property
    def _may_have_received_anything(self) -> bool:
        """An aborted receive brings anything; what would hand it on isn't aborted. It is over when the step is."""
        return self._incoming == "distributed" != self._outgoing

    def _send_output(self, output: StepOutput) -> None:
        if not self._stopping.is_set():
            self._next.send(msgspec.msgpack.encode(output))
