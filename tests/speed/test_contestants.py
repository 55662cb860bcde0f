"""Contestants that fail in their processes: whoever is gone says why, and the others go on."""

import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from benchmarks.random_model import make_checkpoint
from benchmarks.speed.contestants import ContestantError, ContestantProcess, Settings
from benchmarks.speed.engines import Engines
from benchmarks.speed.load import batch_requests
from benchmarks.speed.models import TINY
from benchmarks.speed.results import Results

ONE, OTHER = "ours-fp32", "ours-fp32-torch"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    make_checkpoint(TINY, tmp_path)
    return Settings(tmp_path, TINY, threads=1, num_kv_tokens=256, max_microbatch_tokens=64)


def process(name: str) -> BaseProcess:
    (found,) = [child for child in multiprocessing.active_children() if child.name == name]
    return found


def kill(name: str) -> None:
    child = process(name)
    child.kill()
    child.join()


def test_who_dies_between_turns_is_left_out(settings: Settings):
    results, log = Results(), list[str]()
    engines = Engines([ONE, OTHER], settings, results, log.append)
    requests = batch_requests(TINY, 2, 8, 3, seed=0)
    with engines.loaded([ONE, OTHER]) as processes:
        assert engines.turn(processes, [ONE, OTHER], requests, 2).keys() == {ONE, OTHER}
        kill(ONE)
        for _ in range(2):
            streams = engines.turn(processes, [ONE, OTHER], requests, 2)
            assert [len(stream.token_ids) for stream in streams.pop(OTHER)] == [3, 3]
            assert streams == {}
    assert results.left_out == {ONE: f"{ONE}: died of SIGKILL"}
    assert any("died of SIGKILL" in line for line in log)


def test_who_dies_before_it_loads_is_left_out(settings: Settings):
    contestant = ContestantProcess(ONE, settings)
    kill(ONE)
    with pytest.raises(ContestantError, match=f"^{ONE}: died of SIGKILL$"):
        contestant.load()
    contestant.close()


def test_what_it_said_before_it_ended_is_told(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """It fails while it imports, before it is told to load."""
    (tmp_path / "ctranslate2.py").write_text("raise ImportError('libmissing.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    contestant = ContestantProcess("ctranslate2-fp32", settings)
    process("ctranslate2-fp32").join()
    with pytest.raises(ContestantError, match=r"ImportError.*libmissing\.so\.1"):
        contestant.load()
    contestant.close()
    assert "libmissing.so.1" in capfd.readouterr().err
