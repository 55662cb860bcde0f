"""`StageLoop`: the thread in which a stage takes microbatches, runs them and hands them on."""

import contextlib
import logging
import threading
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import msgspec
import zmq
from torch import Tensor

from gptj_serve.errors import WireError
from gptj_serve.pipeline.handoff import Handoff, ZmqHandoff
from gptj_serve.pipeline.link_watch import LinkWatch
from gptj_serve.pipeline.sockets import CurveKeys, bind_receiver, connect_sender, receive
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.pipeline.step_meter import StepMeter
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.wire import WireDecoder

logger = logging.getLogger(__name__)


class StageAddresses(NamedTuple):
    """Where a stage listens: for steps from the engine, and for hidden states from the stage before it."""

    steps: str
    hidden: str


class StageLoop:
    """One stage's links and thread: `bind`, then `start` towards the next stage (or, from the last, the engine).

    It lives as long as its links; after a failure anywhere in the pipeline a new one is made around the same runner.
    `failure` completes with what went wrong, or with None when told to stop. A link that is cut ends the thread, after
    the step at hand: no later step could be complete.
    """

    def __init__(self, runner: StageRunner, keys: CurveKeys | None, meter: StepMeter | None = None) -> None:
        self._runner = runner
        self._keys = keys
        self._meter = meter or StepMeter()
        self._microbatch_id: int | None = None  # of the step at hand, or the last one
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._steps = self._context.socket(zmq.PULL)
        self._hidden = self._context.socket(zmq.PULL)
        self._next = self._context.socket(zmq.PUSH)
        self._watch = LinkWatch(self._fail)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: Future[None] = Future()

    def bind(self, address: str) -> StageAddresses:
        """Listen below `address`: `ipc://directory/name` or `tcp://host`."""
        self._watch.add(self._steps, "steps from the engine")
        if not self._runner.stage.is_first:
            self._watch.add(self._hidden, "hidden states from the stage before")
        if address.startswith("tcp://"):
            return StageAddresses(
                bind_receiver(self._steps, address, self._keys), bind_receiver(self._hidden, address, self._keys)
            )
        return StageAddresses(
            bind_receiver(self._steps, f"{address}-steps", self._keys),
            bind_receiver(self._hidden, f"{address}-hidden", self._keys),
        )

    def start(self, next_address: str) -> None:
        is_last = self._runner.stage.is_last
        self._watch.add(self._next, "results to the engine" if is_last else "hidden states to the next stage")
        connect_sender(self._next, next_address, self._keys)
        self._watch.start()
        self._runner.restart()
        self._thread = threading.Thread(target=self._run, name="stage-loop", daemon=True)
        self._thread.start()

    def wait_until_linked(self) -> None:
        """Until the link to the next stage stands. Raises `PipelineError` if it can't be made."""
        self._watch.wait_until_made()

    def stop(self) -> None:
        """End the thread and close the links; returns when the step at hand, if any, is done."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._watch.stop()
        self._context.destroy(linger=0)
        with contextlib.suppress(InvalidStateError):
            self.failure.set_result(None)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            span = self._runner.spec.span
            logger.exception("layers %d to %d failed at microbatch %s", span[0], span[-1], self._microbatch_id)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """In any thread."""
        with contextlib.suppress(InvalidStateError):  # the first one counts
            self.failure.set_exception(error)
        self._stopping.set()

    def _serve(self) -> None:
        stage = self._runner.stage
        encoder = msgspec.msgpack.Encoder()
        decoder = WireDecoder[MicroBatch](MicroBatch)
        from_previous: Handoff = ZmqHandoff(self._hidden)
        to_next: Handoff = ZmqHandoff(self._next)
        self._meter.wait()
        while (frames := receive(self._steps, self._stopping.is_set)) is not None:
            try:
                microbatch = decoder.decode(frames[0].buffer)
            except WireError as error:
                logger.warning("a step is left out: %s", error)
                continue
            self._microbatch_id = microbatch.microbatch_id
            hidden: Tensor | None = None
            sent_at: float | None = None
            if not stage.is_first:
                received = from_previous.receive(microbatch.microbatch_id, self._stopping.is_set)
                if received is None:
                    return
                hidden, sent_at = received
            self._meter.begin(sent_at)
            result = self._runner.run(microbatch, hidden)
            self._runner.synchronize()  # of hidden states on a GPU the next thing would wait for them anyway
            self._meter.end(microbatch)
            if isinstance(result, StepOutput):
                self._next.send(encoder.encode(result))
            else:
                to_next.send(microbatch.microbatch_id, result)
            self._meter.wait()
