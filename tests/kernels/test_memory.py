"""What a stage on our kernels takes: as much as the planner says, and hardly more while it is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptj_serve.config import PipelineConfig
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.planner import Model, plan_service

MIB = 1 << 20
N_LAYER = 6
CONFIG = GPTJConfig(
    vocab_size=5000, n_positions=64, n_embd=768, n_layer=N_LAYER, n_head=12, rotary_dim=16, architectures=["GPTJModel"]
)
NUM_IN_LARGEST_PARTS = 12 * 768**2 + 5000 * 768  # a layer and the LM head, which wait to be packed

LOADING = """
import json, sys
import psutil, torch
from pathlib import Path
from gptj_serve.kernels.cpu_library import cpu_library
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec

directory, num_layers, dtype, quantization = sys.argv[1:]
cpu_library()
checkpoint = Checkpoint.open(Path(directory))
spec = StageSpec(
    range(int(num_layers)), 1, 16, getattr(torch, dtype), torch.device("cpu"), 10, quantization=quantization
)
before = psutil.Process().memory_info().rss
runner = StageRunner.load(checkpoint, spec)
after = psutil.Process().memory_info().rss
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps([runner.weight_bytes, after - before, peak - before]))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """200 MB in fp32; their numbers don't matter."""
    directory = tmp_path_factory.mktemp("medium")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name if name.startswith("lm_head") else f"transformer.{name}": torch.rand(shape, generator=generator)
        for name, shape in Model(CONFIG).shapes(range(N_LAYER)).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**CONFIG.model_dump(exclude_none=True), "model_type": "gptj"}))
    yield directory
    (directory / "model.safetensors").unlink()


PRECISIONS = [("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int8")]


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize(("dtype", "quantization"), PRECISIONS)
def test_weights_take_what_the_planner_says(directory: Path, dtype: str, quantization: str) -> None:
    checkpoint = Checkpoint.open(directory)
    config = PipelineConfig.model_validate({"num_stages": 2, "dtype": dtype, "quantization": quantization})
    for stage in plan_service(config, checkpoint).stages:
        spec = StageSpec(
            stage.layers, 4, 16, getattr(torch, dtype), torch.device("cpu"), 10, quantization=config.quantization
        )
        runner = StageRunner.load(checkpoint, spec)
        assert stage.weight_bytes == pytest.approx(runner.weight_bytes, rel=0.03)
        assert runner.kv_cache_bytes == 4 * 16 * stage.kv_bytes_per_token


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "none"), ("float32", "int8")])
def test_loading_never_holds_the_model_twice(directory: Path, dtype: str, quantization: str) -> None:
    """In int8 it is a quarter of the checkpoint: so its layers are packed one after the other, as they are read."""
    command = [sys.executable, "-c", LOADING, str(directory), str(N_LAYER), dtype, quantization]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # what is given back counts no longer
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weight_bytes, held, peak = json.loads(done.stdout)
    assert weight_bytes > {"none": 95, "int8": 55}[quantization] * MIB
    unpacked = NUM_IN_LARGEST_PARTS * getattr(torch, dtype).itemsize
    assert held < weight_bytes + 30 * MIB
    assert peak < weight_bytes + unpacked + 45 * MIB
