"""The fake is as strict as a GPU is treacherous."""

import pytest
import torch

from gptj_serve.pipeline.gpu.staging import Staging
from tests.pipeline.fake_device import POISON, FakeDevice, HostSyncError, NoHostSync


def test_nothing_is_done_before_it_is_waited_for():
    device = FakeDevice()
    stream = device.stream()
    here, there, back = (make((2,), torch.int32) for make in (device.pinned, device.zeros, device.pinned))
    here.fill_(1)
    stream.copy(there, here)
    copied = stream.record()
    stream.launch(lambda: there.add_(1))
    stream.copy(back, there)
    assert there.tolist() == [0, 0]
    assert back.tolist() == [POISON, POISON]
    copied.wait()
    assert there.tolist() == [1, 1]
    stream.record().wait()
    assert back.tolist() == [2, 2]


def test_what_is_copied_from_pinned_memory_is_what_is_there_in_the_end():
    device = FakeDevice()
    stream = device.stream()
    here, there = device.pinned((1,), torch.int32), device.zeros((1,), torch.int32)
    here.fill_(1)
    stream.copy(there, here)
    here.fill_(2)  # too early
    stream.record().wait()
    assert there.tolist() == [2]


def test_a_stream_that_follows_an_event_comes_after_it():
    device = FakeDevice()
    first, second = device.stream(), device.stream()
    x = device.zeros((1,), torch.int32)
    first.launch(lambda: x.add_(5))
    second.follow(first.record())
    second.launch(lambda: x.mul_(2))
    second.record().wait()
    assert x.tolist() == [10]


def test_memory_that_is_not_pinned_is_refused():
    device = FakeDevice()
    with pytest.raises(HostSyncError, match="neither pinned"):
        device.stream().copy(device.zeros((1,), torch.int32), torch.zeros(1, dtype=torch.int32))


SYNCHRONIZING = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "list": lambda x: x[[0, 1]],
    "set by mask": lambda x: x.__setitem__(x > 0, 1),
    "tensor": lambda x: x + torch.tensor([1, 2]),
}


@pytest.mark.parametrize("work", SYNCHRONIZING.values(), ids=SYNCHRONIZING.keys())
def test_work_that_makes_the_host_wait_is_an_error(work):
    device = FakeDevice()
    stream = device.stream()
    x = device.zeros((2,), torch.int32)
    stream.launch(lambda: work(x))
    with pytest.raises(HostSyncError):
        stream.record().wait()
    with pytest.raises(HostSyncError):
        device.stream().capture(lambda: work(x))
    with NoHostSync(device), pytest.raises(HostSyncError):
        work(x)


def test_work_that_does_not_is_none():
    x = torch.arange(6.0).view(2, 3)
    with NoHostSync(FakeDevice()):
        y = torch.where(x > 1, x, 0)[:, 1:].index_select(0, torch.arange(2)).argmax(-1)
        x[0, :2] = y
    assert x[0].tolist() == [1, 1, 2]


def test_hidden_states_of_every_dtype_are_staged():
    """NumPy, by which others are filled, has no bfloat16."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        device = FakeDevice()
        staging = Staging(device, device.stream(), 4, dtype)
        staging.halves[staging.begin()][:3] = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
        there = staging.send(3)
        staging.begin()
        staging.send(1)
        staging.begin()  # waits for the first copy
        assert there.tolist() == [1.0, -2.0, 0.5]
