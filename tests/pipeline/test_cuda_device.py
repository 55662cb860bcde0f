"""`CUDADevice`, where there is a GPU; elsewhere `FakeDevice` stands for it."""

import gc

import pytest
import torch

from gptj_serve.pipeline.gpu.cuda_device import CUDADevice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def device() -> CUDADevice:
    return CUDADevice(torch.device("cuda"))


def test_a_graph_reads_what_is_there_when_it_is_replayed(device: CUDADevice) -> None:
    stream = device.stream()
    here, there, back = (
        device.pinned((4,), torch.float32),
        device.zeros((4,), torch.float32),
        device.pinned((4,), torch.float32),
    )
    graph = stream.capture(lambda: there.mul_(2).add_(1))
    for value in (1.0, 5.0):
        here.fill_(value)
        stream.copy(there, here)
        graph.replay()
        stream.copy(back, there)
        stream.record().wait()
        assert back.tolist() == [2 * value + 1] * 4


def test_a_stream_follows_another_ones_event(device: CUDADevice) -> None:
    first, second = device.stream(), device.stream()
    x, back = device.zeros((1 << 20,), torch.float32), device.pinned((1 << 20,), torch.float32)
    for _ in range(50):
        first.launch(lambda: x.add_(1))
    second.follow(first.record())
    second.copy(back, x)
    second.record().wait()
    assert back.unique().tolist() == [50.0]


def test_streams_of_nobody_are_used_again(device: CUDADevice) -> None:
    """With what cuBLAS keeps for them."""
    square = torch.ones(256, 256, device=device.torch_device)
    torch.cuda.synchronize()

    def multiply_in_two() -> int:
        for stream in (device.stream(), device.stream()):
            stream.run(lambda: torch.mm(square, square))
        del stream
        gc.collect()
        return device.reserved_bytes()

    first = multiply_in_two()
    assert [multiply_in_two() for _ in range(5)] == [first] * 5
