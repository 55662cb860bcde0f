"""What is in two halves may be filled while the other half is on its way, and not before."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptj_serve.pipeline.gpu.buffer_pool import BufferPool
from gptj_serve.pipeline.gpu.device import Event
from gptj_serve.pipeline.gpu.staging import Staging
from tests.pipeline.fake_device import FakeDevice

NUM_STEPS = 6


class StagingWithoutWaits(Staging):
    def begin(self) -> int:
        return self._next


class PoolWithoutEvents(BufferPool):
    def give_back(self, buffer: Tensor, read: Event | None = None) -> None:
        super().give_back(buffer)


def staged(make: type[Staging], rng: random.Random | None = None) -> list[int]:
    """What each step finds on the device."""
    device = FakeDevice(rng)
    stream = device.stream()
    staging = make(device, stream, 4, torch.int32)
    found = [device.zeros((2,), torch.int32) for _ in range(NUM_STEPS)]
    for step, place in enumerate(found):
        staging.arrays[staging.begin()][:2] = step
        stream.copy(place, staging.send(2))
    stream.record().wait()
    return [place[0].item() for place in found]


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_each_step_finds_what_was_meant_for_it(seed: int | None):
    rng = None if seed is None else random.Random(seed)
    assert staged(Staging, rng) == list(range(NUM_STEPS))


def test_without_the_wait_it_would_find_what_is_meant_for_a_later_one():
    assert staged(StagingWithoutWaits) == [4, 5, 4, 5, 4, 5]


def handed_over(make: Callable[[Callable[[], Tensor]], BufferPool]) -> list[int]:
    """What a reader in another stream, which is slower, finds in the buffers."""
    device = FakeDevice()
    writer, reader = device.stream(), device.stream()
    pool = make(lambda: device.zeros((1,), torch.int32))
    source = [
        torch.add(device.zeros((1,), torch.int32), step, out=device.zeros((1,), torch.int32))
        for step in range(NUM_STEPS)
    ]
    found = [device.zeros((1,), torch.int32) for _ in range(NUM_STEPS)]
    for step, place in enumerate(found):
        source[step].fill_(step)
        buffer = pool.take(writer)
        writer.copy(buffer, source[step])
        reader.follow(writer.record())
        reader.copy(place, buffer)
        pool.give_back(buffer, reader.record())
    writer.record().wait()
    reader.record().wait()
    return [place.item() for place in found]


def test_buffers_are_written_again_when_they_have_been_read():
    assert handed_over(BufferPool) == list(range(NUM_STEPS))


def test_without_the_event_they_would_be_written_too_early():
    assert handed_over(PoolWithoutEvents) == [4, 5, 4, 5, 4, 5]


def test_a_buffer_that_is_never_given_back_is_replaced():
    made: list[Tensor] = []

    def make() -> Tensor:
        made.append(torch.zeros(1))
        return made[-1]

    pool, stream = BufferPool(make), FakeDevice().stream()
    taken = [pool.take(stream) for _ in range(3)]
    assert [id(buffer) for buffer in taken] == [id(buffer) for buffer in made]
    pool.give_back(taken[1])
    assert pool.take(stream) is taken[1]
    assert len(made) == 3
