"""`python -m benchmarks.gpu_kernels`, as far as it goes without a GPU."""

from collections.abc import Callable

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.gpu_kernels import GPUKernels, Scenarios, console, main
from gptj_serve.kernels.gpu.tiles import Tile

app = typer.Typer()
app.command()(main)


def test_it_says_what_can_be_chosen() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "--head-dim" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert result.output == "benchmarks.gpu_kernels needs a GPU: torch.cuda.is_available() is False here\n"


def test_all_of_it_runs(device: torch.device) -> None:
    """On a clock that calls once: it says how long nothing took."""
    pytest.importorskip("triton", reason="triton is not installed")

    def clock(call: Callable[[], object]) -> float:
        call()
        return 1e-3

    scenarios = Scenarios(
        decoding=[(1, 20), (2, 17)],
        chunks=[(3, 5)],
        mixed=((2, 17), (0, 5)),
        num_tokens=[1, 3],
        decode_tiles=[Tile(16, 32, 4, 2)],
        chunk_tiles=[Tile(16, 16, 4, 2)],
        elements=[256],
        cache_bytes=1,
    )
    with console.capture() as printed:
        GPUKernels(device, torch.float16, 1, 16, scenarios, clock, num_probed=32).measure("all")
    assert printed.get().count("1000.0") == 4  # of two kernels, for two sizes
    assert printed.get().count("500.0") == 3 + 4  # attention and whole layers, by two layers
    assert "16x32 warps 4 stages 2" in printed.get()
    assert "decode 2 x 17" in printed.get()
