"""`benchmarks.gpu_memory` with a tiny model: the stages of a GPU, interpreted, on a device whose memory is counted."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu_memory
from gptj_serve.config import Quantization
from gptj_serve.gpus import StepLimits
from gptj_serve.model.config import GPTJConfig
from gptj_serve.planner import Model, Resources, plan
from tests.pipeline.fake_device import FakeDevice

CONFIG = GPTJConfig(n_layer=2, n_embd=32, n_head=2, rotary_dim=8, vocab_size=96, n_positions=32)
TOTAL_BYTES, TAKEN_BYTES = 2 << 30, 700 << 20


IS_THE_CPUS = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake device's tensors are the CPU's")


class CountedMemory:
    name = "a fake"
    capability = (9, 0)

    def free_and_total(self) -> tuple[int, int]:
        return TOTAL_BYTES - self.reserved_bytes(), TOTAL_BYTES

    def reserved_bytes(self) -> int:
        return TAKEN_BYTES

    def release(self) -> None:
        pass


@IS_THE_CPUS
@pytest.mark.parametrize(("dtype", "quantization"), [("float16", "none"), ("bfloat16", "fp8")])
def test_each_stage_is_measured_beside_its_forecast(dtype: str, quantization: Quantization) -> None:
    pytest.importorskip("triton")
    resources = Resources(
        num_stages=2,
        dtype=dtype,
        quantization=quantization,
        device_memory_bytes=TOTAL_BYTES,
        memory_utilization=0.35,
        capability=CountedMemory.capability,
        step_limits=StepLimits(32, 3),
    )
    forecast = plan(Model(CONFIG), resources)
    for stage in forecast.stages:
        outcome = gpu_memory.measured(CONFIG, stage, forecast, CountedMemory(), FakeDevice())
        assert outcome.grown_bytes == 0
        assert 0 < outcome.room.used_bytes < TAKEN_BYTES
        assert outcome.room.weight_bytes == pytest.approx(stage.weight_bytes, rel=0.01)
        rows = {name: values for _, name, *values in gpu_memory.lines(stage, forecast, outcome)}
        assert float(rows["in use with it"][0]) == pytest.approx(0.35 * 2, abs=0.01)
        assert float(rows["in use with it"][2]) == pytest.approx(1, abs=0.02)


def test_its_options_are_sound() -> None:
    import typer

    app = typer.Typer()
    app.command()(gpu_memory.main)
    assert "--max-microbatch-tokens" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
