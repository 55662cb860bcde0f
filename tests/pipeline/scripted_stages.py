"""Two linked stages without a model, one of them in a process of its own; how long a step takes is said in the step."""

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from gptj_serve.config import HandoffKind
from gptj_serve.pipeline.stage_loop import StageAddresses, StageLoop
from gptj_serve.pipeline.step_links import StepLinks
from gptj_serve.steps import MicroBatch, Row, RowResult, SampledToken, StepOutput
from tests.pipeline.neighbours import device_of, process_context

WIDTH = 512


def step(microbatch_id: int, token_id: int, num_tokens: int = 1, durations_ms: tuple[int, int] = (0, 0)) -> MicroBatch:
    """Its token goes through both stages, which take so long."""
    return MicroBatch(microbatch_id, [Row([token_id] * num_tokens, 0, list(durations_ms))])


def outcome(microbatch_id: int, token_id: int) -> StepOutput:
    return StepOutput(microbatch_id, [RowResult([SampledToken(2 * token_id, 0.0)])])


@dataclass
class ScriptedRunner:
    """What a `StageLoop` needs of a `StageRunner`: hidden states are the token, times two on the last stage."""

    index: int
    device: torch.device

    @property
    def spec(self) -> Any:
        return SimpleNamespace(device=self.device, span=range(1))

    @property
    def stage(self) -> Any:
        return SimpleNamespace(is_first=self.index == 0, is_last=self.index == 1)

    def restart(self) -> None: ...

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def run(self, microbatch: MicroBatch, hidden: Tensor | None) -> Tensor | StepOutput:
        (row,) = microbatch.rows
        time.sleep(row.block_table[self.index] / 1000)
        if hidden is None:
            return torch.full((len(row.token_ids), WIDTH), float(row.token_ids[0]), device=self.device)
        assert hidden.shape == (len(row.token_ids), WIDTH)
        (value,) = hidden.unique().tolist()
        return outcome(microbatch.microbatch_id, int(value))


class StageProcess:
    """A stage in a process of its own."""

    def __init__(self, index: int, handoff: HandoffKind) -> None:
        """`handoff`: that it will be told to use; on a GPU it needs another kind of process."""
        context = process_context(handoff)
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, index), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def bind(self, address: str, handoff: HandoffKind) -> StageAddresses:
        return StageAddresses(*self._ask("bind", address, handoff))

    def start(self, next_address: str, handoff: HandoffKind = "zmq", tensors: str = "") -> None:
        self._ask("start", next_address, handoff, tensors)

    def wait_until_linked(self) -> None:
        self._ask("wait_until_linked")

    def stop(self) -> None:
        self._ask("stop")

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def _ask(self, *call: Any) -> Any:
        self._pipe.send(call)
        assert self._pipe.poll(60)
        return self._pipe.recv()


class StageHere:
    """A stage in this process, whose failure can be looked at."""

    def __init__(self, index: int) -> None:
        self._runner: Any = None
        self.index = index
        self.loop: StageLoop | None = None

    def bind(self, address: str, handoff: HandoffKind) -> StageAddresses:
        self._runner = self._runner or ScriptedRunner(self.index, device_of(handoff))
        self.loop = StageLoop(self._runner, None)
        return self.loop.bind(address, handoff)

    def start(self, next_address: str, handoff: HandoffKind = "zmq", tensors: str = "") -> None:
        assert self.loop is not None
        self.loop.start(next_address, handoff, tensors)

    def wait_until_linked(self) -> None:
        assert self.loop is not None
        self.loop.wait_until_linked()

    def stop(self) -> None:
        assert self.loop is not None
        self.loop.stop()


def _run(pipe: Connection, index: int) -> None:
    torch.set_num_threads(1)
    stage = StageHere(index)
    while True:
        name, *arguments = pipe.recv()
        answer = getattr(stage, name)(*arguments)
        pipe.send(None if answer is None else tuple(answer))


Stage = StageProcess | StageHere


@asynccontextmanager
async def linked(stages: tuple[Stage, Stage], directory: str, handoff: HandoffKind) -> AsyncIterator[StepLinks]:
    """The engine's side of new links between these; they are closed in the end, the stages' are not."""
    links = StepLinks(None, step_timeout_s=60)
    first, second = stages
    addresses = [stage.bind(f"ipc://{directory}/{index}", handoff) for index, stage in enumerate(stages)]
    results = links.bind(f"ipc://{directory}/results")
    second.start(results)
    first.start(addresses[1].hidden, handoff, addresses[1].tensors)
    links.connect([address.steps for address in addresses])
    for stage in stages:
        stage.wait_until_linked()
    await links.wait_until_linked()
    try:
        yield links
    finally:
        links.close()
