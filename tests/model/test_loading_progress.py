"""Progress is told of slow loads only, and in a terminal only as a bar."""

import io
from pathlib import Path

import pytest
import torch

from gptj_serve.model import loading_progress
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.loading_progress import LINE_INTERVAL_S, ProgressLines, terminal_bar
from gptj_serve.model.stage import load_stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_tells_of_each_of_its_bytes(tiny_gptj, dtype: torch.dtype) -> None:
    told: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(tiny_gptj())
    stage = load_stage(
        checkpoint, range(2, 6), dtype, torch.device("cpu"), lambda done, total: told.append((done, total))
    )
    num_bytes = sum(parameter.nbytes for parameter in stage.parameters())
    assert {total for _, total in told} == {num_bytes}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == num_bytes


def test_lines_come_now_and_then_and_not_at_the_end() -> None:
    lines: list[str] = []
    now = 0.0
    progress = ProgressLines(lines.append, lambda: now)
    for percent in range(5, 101, 5):
        now += LINE_INTERVAL_S / 4
        progress(percent * 10**8, 10**10)
    assert lines == [f"{percent}% of 10.0 GB loaded" for percent in (20, 40, 60, 80)]


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_progress, "BAR_DELAY_S", 0.0)
    terminal = Terminal()
    with terminal_bar("Loading x", terminal) as progress:
        progress(500, 1000)
        progress(1000, 1000)
    assert "Loading x" in terminal.getvalue()


def test_no_bar_for_a_quick_load_or_a_file() -> None:
    for file in (Terminal(), io.StringIO()):
        with terminal_bar("Loading x", file) as progress:
            progress(1000, 1000)
        assert file.getvalue() == ""


def test_a_model_of_the_library_is_silent_where_there_is_no_terminal(
    tiny_gptj, capfd: pytest.CaptureFixture[str]
) -> None:
    from gptj_serve import GPTJForCausalLM

    directory: Path = tiny_gptj()
    GPTJForCausalLM.from_pretrained(directory)
    assert "Loading" not in capfd.readouterr().err
