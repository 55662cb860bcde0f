"""`GPUStep`: a step that a stage's stream has been given, and what will come of it."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from gptj_serve.pipeline.gpu.device import Event
from gptj_serve.steps import RowResult, StepOutput


@dataclass(frozen=True, slots=True)
class DeviceHidden:
    """Hidden states of a step on the device, in a buffer of whoever made them, and the next stage's for a while."""

    tensor: Tensor  # [T, D], contiguous
    ready: Event
    give_back: Callable[[Event | None], None]
    """To be called once, with the event at which they will have been read, or with None if they have been."""


class GPUStep:
    """`hidden` are for the next stage; None on the last one, which has results."""

    def __init__(
        self,
        microbatch_id: int,
        done: Event,
        *,
        hidden: DeviceHidden | None = None,
        results: Callable[[], list[RowResult | None]] | None = None,
        first_place: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """`results` waits for the device, and is called once. `first_place`: see `StepPlan`."""
        self.microbatch_id = microbatch_id
        self.first_place = first_place
        self.hidden = hidden
        self._done = done
        self._results = results
        self._output: StepOutput | None = None
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Until the device has done it."""
        self._done.wait()

    def output(self) -> StepOutput:
        """Of the last stage, as soon as it is there. In any thread: the next step may ask as well."""
        with self._lock:
            if self._output is None:
                assert self._results is not None
                self._output = StepOutput(self.microbatch_id, self._results())
                self._results = None
            return self._output
