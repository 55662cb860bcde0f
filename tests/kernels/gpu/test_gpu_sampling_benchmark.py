"""`python -m benchmarks.gpu_sampling`, as far as it goes without a GPU: its logic, and that tokens are the CPU's."""

import time
from collections.abc import Callable

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("triton")

from benchmarks.gpu_sampling import DTYPES, WARPERS, GPUSampling, Shapes, console, main

app = typer.Typer()
app.command()(main)


def seconds_once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def test_it_times_each_kind_of_draw_and_compares_their_tokens(device: torch.device) -> None:
    shapes = Shapes(
        width=80, num_token_ids=70, num_rows=(1, 2), num_edited_rows=(1,), num_seen=5, num_compared_rows=2,
        copied_bytes=1 << 16,
    )  # fmt: skip
    sampling = GPUSampling(device, shapes, seconds_once)
    assert sampling.count_different(1) == {name: [0] * len(DTYPES) for name in WARPERS}
    with console.capture() as captured:
        sampling.measure(1)
    printed = captured.get()
    assert all(printed.count(name) >= 3 for name in WARPERS)
    assert "bound" in printed
    assert "sample_on_gpu ms" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert result.output == "benchmarks.gpu_sampling needs a GPU: torch.cuda.is_available() is False here\n"
