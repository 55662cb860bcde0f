"""The planner against what stages really hold, the known numbers of the 6B model, and its own advice."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_serve.config import KVCacheConfig, PipelineConfig, StageConfig
from gptj_serve.errors import ConfigError
from gptj_serve.gpus import GPUS, StepLimits
from gptj_serve.model.attention import KVCache
from gptj_serve.model.checkpoint import HEADS, Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.stage import GPTJStage
from gptj_serve.planner import DTYPE_BYTES, Model, Resources, plan, plan_service, resolve_dtype
from gptj_serve.remedies import remedies

GIB = 2**30
SIX_B = Model(GPTJConfig())


@st.composite
def models(draw: st.DrawFn) -> Model:
    n_head = draw(st.integers(1, 4))
    config = GPTJConfig(
        vocab_size=draw(st.integers(1, 200)),
        n_positions=draw(st.integers(1, 64)),
        n_embd=n_head * 4,
        n_head=n_head,
        n_layer=draw(st.integers(1, 6)),
        n_inner=draw(st.none() | st.integers(1, 50)),
        rotary_dim=4,
        tie_word_embeddings=draw(st.booleans()),
        id2label={label: str(label) for label in range(draw(st.integers(1, 3)))},
    )
    return Model(config, tuple(head for head in HEADS if draw(st.booleans())))


@st.composite
def planned(draw: st.DrawFn) -> tuple[Model, Resources, int]:
    model = draw(models())
    on_gpu = draw(st.booleans())
    resources = Resources(
        num_stages=draw(st.integers(1, model.config.n_layer)),
        dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
        block_size=draw(st.integers(1, 20)),
        num_kv_tokens=draw(st.none() | st.integers(1, 500)),
        device_memory_bytes=draw(st.none() | st.integers(0, 200_000).map(lambda size: size + on_gpu * 600 * 2**20)),
        memory_utilization=draw(st.floats(0.1, 1)),
        bandwidth_bytes_s=draw(st.none() | st.floats(1, 1e12)),
        capability=(9, 0) if on_gpu else None,
        step_limits=StepLimits(draw(st.integers(1, 64)), draw(st.integers(1, 64))),
    )
    return model, resources, draw(st.integers(1, model.config.n_positions))


@given(planned())
@settings(max_examples=30)  # building the modules takes a while
def test_bytes_are_those_of_the_real_tensors(case: tuple[Model, Resources, int]):
    model, resources, context = case
    result = plan(model, resources, context)
    dtype = getattr(torch, resources.dtype)
    with torch.device("meta"):
        stages = [GPTJStage(model.config, stage.layers, model.heads).to(dtype) for stage in result.stages]
    meta = torch.device("meta")
    for planned_stage, stage in zip(result.stages, stages, strict=True):
        assert planned_stage.weight_bytes == sum(parameter.nbytes for parameter in stage.parameters())
        layers, block_size = len(planned_stage.layers), resources.block_size
        cache = KVCache(model.config, layers, result.num_kv_blocks, block_size, dtype, meta)
        assert result.kv_pool_bytes(planned_stage) == cache.num_bytes
    assert [layer for stage in result.stages for layer in stage.layers] == list(range(model.config.n_layer))


@given(planned())
def test_a_plan_that_fits_stays_within_the_memory(case: tuple[Model, Resources, int]):
    model, resources, context = case
    result = plan(model, resources, context)
    if resources.device_memory_bytes is None:
        return
    usable = resources.device_memory_bytes * resources.memory_utilization
    needed = [stage.weight_bytes + stage.overhead.total + result.kv_pool_bytes(stage) for stage in result.stages]
    blocks = [-(-length // resources.block_size) for length in (context,) * result.max_batch(context)]
    assert sum(blocks) <= result.num_kv_blocks
    if result.fits:
        assert max(needed) <= usable
        assert result.num_kv_tokens >= context
    else:  # one sequence and the block of padding are too much for a stage, or the pool asked for is
        tokens = max(context, resources.num_kv_tokens or 0)
        size = (-(-tokens // resources.block_size) + 1) * resources.block_size
        full = max(stage.fixed_bytes + size * stage.kv_bytes_per_token for stage in result.stages)
        assert full > int(usable) or result.max_batch(context) == 0


@given(planned())
def test_advice_helps(case: tuple[Model, Resources, int]):
    """Whatever is said to fit does."""
    model, resources, context = case
    if plan(model, resources, context).fits:
        return
    for advice in remedies(model, resources, context):
        changed, length = resources, context
        for option, value in re.findall(r"--([a-z-]+) (\S+)", advice):
            match option:
                case "dtype":
                    changed = replace(changed, dtype=value)
                case "quantization":
                    changed = replace(changed, quantization=value)
                case "stages":
                    changed = replace(changed, num_stages=int(value))
                case "context":
                    length = int(value)
                case "kv-tokens":
                    changed = replace(changed, num_kv_tokens=int(value))
                case "device-memory-gib":
                    changed = replace(changed, device_memory_bytes=int(float(value) * GIB))
        assert plan(model, changed, length).fits, advice


def test_the_6b_model():
    result = plan(SIX_B, Resources(num_stages=4, dtype="float16", bandwidth_bytes_s=4.3e12))
    assert result.num_parameters == 6_050_882_784
    assert result.weight_bytes == 2 * 6_050_882_784
    assert result.kv_bytes_per_token == 448 * 1024
    assert [len(stage.layers) for stage in result.stages] == [8, 7, 7, 6]
    assert result.num_kv_tokens == 8 * 2048  # the service's default
    embedding = 50400 * 4096
    assert result.min_token_latency_s == pytest.approx(2 * (6_050_882_784 - embedding) / 4.3e12)
    assert result.min_step_interval_s == pytest.approx(max(s.read_bytes for s in result.stages) / 4.3e12)


def test_6b_on_a_24_gib_device():
    result = plan(SIX_B, Resources(dtype="float16", device_memory_bytes=24 * GIB))
    assert result.fits
    room = 24 * GIB * 0.9 - 2 * 6_050_882_784
    assert result.num_kv_tokens == (int(room // (448 * 1024 * 16)) - 1) * 16
    assert result.max_batch(2048) == result.num_kv_tokens // 2048
    assert result.max_batch(1) == result.num_kv_blocks


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"dtype": "float32", "device_memory_bytes": 16 * GIB},
            ["--dtype float16", "--stages 2", "--device-memory-gib 27.1"],
        ),
        ({"device_memory_bytes": 12 * GIB}, ["--stages 2", "--device-memory-gib 13.6"]),
        (
            {"dtype": "float32", "num_stages": 24, "device_memory_bytes": 1 * GIB},
            ["--dtype float16 --stages 28", "--device-memory-gib"],
        ),
        ({"device_memory_bytes": 13 * GIB}, ["--stages 2", "--context", "--device-memory-gib 13.6"]),
        ({"device_memory_bytes": 16 * GIB, "num_kv_tokens": 50_000}, ["--stages 3", "--kv-tokens", "--device-memory"]),
    ],
)
def test_6b_that_does_not_fit(changes: dict[str, int | str], advice: list[str]):
    resources = replace(Resources(), **changes)
    result = plan(SIX_B, resources)
    assert not result.fits
    found = remedies(SIX_B, resources, result.context)
    assert len(found) == len(advice), found
    for part, line in zip(advice, found, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("resources", "context", "message"),
    [
        (Resources(num_stages=29), None, "num_stages=29"),
        (Resources(), 2049, "context=2049"),
        (Resources(), 0, "context=0"),
        (Resources(dtype="int3"), None, "dtype='int3'"),
        (Resources(quantization="int4"), None, "quantization='int4'"),
        (Resources(quantization="fp8", dtype="bfloat16"), None, "quantization='fp8': is for GPUs"),
        (Resources(quantization="fp8", capability=(9, 0)), None, "with dtype bfloat16, not float16"),
        (Resources(quantization="int8"), None, "on CPUs with float32 or bfloat16, not float16"),
        (Resources(quantization="int8", dtype="float32", capability=(9, 0)), None, "bfloat16 or float16, not float32"),
    ],
)
def test_impossible_values(resources: Resources, context: int | None, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(SIX_B, resources, context)


def test_the_service_takes_its_defaults(tiny_gptj):
    checkpoint = Checkpoint.open(tiny_gptj())
    result = plan_service(PipelineConfig(num_stages=3), checkpoint)
    assert result.num_kv_blocks == 8 * 96 // 16
    assert result.resources.dtype == "float32"
    asked = PipelineConfig(
        dtype="bfloat16", kv_cache=KVCacheConfig(block_size=8, num_tokens=81), stage=StageConfig(num_gpus=1)
    )
    result = plan_service(asked, checkpoint)
    assert (result.num_kv_blocks, result.resources.block_size, result.resources.dtype) == (11, 8, "bfloat16")
    with pytest.raises(ConfigError, match="num_stages=7"):
        plan_service(PipelineConfig(num_stages=7), checkpoint)


@pytest.mark.parametrize(
    ("requested", "capabilities", "expected"),
    [
        ("auto", [], "float32"),
        ("auto", [(8, 0), (9, 0)], "bfloat16"),
        ("auto", [(9, 0), (7, 5)], "float16"),
        ("float16", [(9, 0)], "float16"),
        ("bfloat16", [], "bfloat16"),
    ],
)
def test_auto_dtype(requested: str, capabilities: list[tuple[int, int]], expected: str):
    assert resolve_dtype(requested, capabilities) == expected


@pytest.mark.parametrize(("quantization", "bytes_per_weight"), [("none", 2), ("int8", 1), ("fp8", 1)])
def test_weights_on_gpus(quantization: str, bytes_per_weight: int):
    """Of GPT-J 6B the matrices, with a scale in fp32 for each output where they are in 8 bits."""
    result = plan(SIX_B, Resources(dtype="bfloat16", quantization=quantization, capability=(9, 0)))
    layers, dim, vocabulary = 28, 4096, 50400
    matrices = layers * 12 * dim * dim + vocabulary * dim
    outputs = layers * (3 * dim + dim + 4 * dim + dim) + vocabulary
    scales = 0 if quantization == "none" else 4 * outputs
    others = result.num_parameters - matrices
    assert result.weight_bytes == bytes_per_weight * matrices + scales + 2 * others


def test_what_else_a_stage_on_a_gpu_takes():
    """More where more is computed at once; logits on the last stage only; nothing of it on CPUs."""
    few, many = (
        plan(SIX_B, Resources(num_stages=2, dtype="bfloat16", capability=(9, 0), step_limits=limits))
        for limits in (StepLimits(128, 64), StepLimits(2048, 512))
    )
    for less, more in zip(few.stages, many.stages, strict=True):
        assert less.overhead.context == more.overhead.context > 0
        assert 16 * less.overhead.activations == more.overhead.activations > 0
        assert 0 < less.overhead.graphs < more.overhead.graphs
    assert [stage.overhead.logits > 0 for stage in few.stages] == [False, True]
    assert plan(SIX_B, Resources(dtype="bfloat16")).stages[0].overhead.total == 0


def test_6b_on_known_gpus():
    fits = {
        name: plan(
            SIX_B, Resources(dtype="float16", capability=gpu.capability, device_memory_bytes=gpu.memory_bytes)
        ).fits
        for name, gpu in GPUS.items()
    }
    assert [name for name, does in fits.items() if not does] == ["t4"]
    on_t4 = Resources(dtype="float16", capability=GPUS["t4"].capability, device_memory_bytes=GPUS["t4"].memory_bytes)
    assert plan(SIX_B, replace(on_t4, num_stages=2)).fits
    with pytest.raises(
        ConfigError, match=r"quantization='int8': the GPU has compute capability 7.5, and int8 needs 8.0"
    ):
        plan(SIX_B, replace(on_t4, quantization="int8"))
    assert not any("int8" in advice for advice in remedies(SIX_B, on_t4, 2048))
