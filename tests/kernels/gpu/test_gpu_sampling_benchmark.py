"""`python -m benchmarks.gpu_sampling`, as far as it goes without a GPU."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.gpu_sampling import main

app = typer.Typer()
app.command()(main)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert result.output == "benchmarks.gpu_sampling needs a GPU: torch.cuda.is_available() is False here\n"
