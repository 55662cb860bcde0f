"""What a stage takes of a GPU beside weights and KV cache, measured, and as the planner forecasts it.

python -m benchmarks.gpu_memory [--stages N] [--quantization int8] [--dtype bfloat16] [--utilization 0.9]

GPT-J 6B's shape with random weights, made on the device; no Ray. Each stage is built as the service builds it, alone on
the GPU: it measures its room, makes the KV cache that it has room for, and does its largest microbatches again, three
times, in another thread, as in the service. For that one cuBLAS takes a handle and workspaces, and nothing else may be
taken from the device.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.machine import described_sums
from benchmarks.gpu.random_stages import random_stage
from gptj_serve.config import Quantization
from gptj_serve.gpus import StepLimits
from gptj_serve.kernels.gpu.weights import GPUBlock
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.gpu.device import Device
from gptj_serve.pipeline.kv_room import GIB, KVRoom
from gptj_serve.pipeline.memory_trial import CUDAMemory, DeviceMemory, TrialLimits, measure_room, run_largest
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec, sum_in_fp32
from gptj_serve.planner import Model, Plan, Resources, StagePlan, plan

BLOCK_SIZE = 16
console = Console(width=110)


class Outcome(NamedTuple):
    room: KVRoom
    grown_bytes: int  # that repeated steps took from the device in another thread


def main(
    stages: Annotated[int, typer.Option(min=1)] = 1,
    dtype: str = "bfloat16",
    quantization: Quantization = "none",
    utilization: float = 0.9,
    max_microbatch_tokens: int = 512,
    max_num_sequences: int = 256,
) -> None:
    from gptj_serve.pipeline.gpu.cuda_device import CUDADevice

    sum_in_fp32()
    console.print(described_sums())
    device = torch.device("cuda", 0)
    memory = CUDAMemory(device)
    config = GPTJConfig()
    resources = Resources(
        num_stages=stages,
        dtype=dtype,
        quantization=quantization,
        device_memory_bytes=memory.free_and_total()[1],
        memory_utilization=utilization,
        capability=memory.capability,
        step_limits=StepLimits(max_microbatch_tokens, max_num_sequences),
    )
    forecast = plan(Model(config), resources)
    table = Table("stage", "", "measured GiB", "forecast GiB", "of the measured")
    for stage in forecast.stages:
        outcome = measured(config, stage, forecast, memory, CUDADevice(device))
        for line in lines(stage, forecast, outcome):
            table.add_row(*line)
        memory.release()
    console.print(table)


def measured(config: GPTJConfig, stage: StagePlan, forecast: Plan, memory: DeviceMemory, device: Device) -> Outcome:
    resources = forecast.resources
    spec = StageSpec(
        stage.layers,
        0,
        BLOCK_SIZE,
        getattr(torch, resources.dtype),
        device.torch_device,
        config.vocab_size,
        quantization=resources.quantization,
        max_num_sequences=resources.step_limits.max_num_sequences,
        max_microbatch_tokens=resources.step_limits.max_microbatch_tokens,
    )
    make = random_runners(config, spec, device)
    memory.release()
    limits = TrialLimits(spec.max_microbatch_tokens, spec.max_num_sequences, config.n_positions)
    room = measure_room(make, BLOCK_SIZE, limits, memory, resources.memory_utilization)
    runner = make(room.num_blocks)
    run_largest(runner, limits)
    before_bytes, _ = memory.free_and_total()
    with ThreadPoolExecutor(1) as others:
        for _ in range(3):
            others.submit(run_largest, runner, limits).result()
        after_bytes, _ = memory.free_and_total()
    return Outcome(room, before_bytes - after_bytes)


def random_runners(config: GPTJConfig, spec: StageSpec, device: Device) -> Callable[[int], StageRunner]:
    from gptj_serve.pipeline.gpu.loading import packed_block, runner_maker

    blocks: list[GPUBlock] = []
    stage = random_stage(
        config, spec.span, spec.dtype, device.torch_device, lambda block: blocks.append(packed_block(block, spec))
    )
    return runner_maker(device, stage, blocks, spec)


def lines(stage: StagePlan, forecast: Plan, outcome: Outcome) -> list[list[str]]:
    room, resources = outcome.room, forecast.resources
    pool_bytes = (room.num_blocks + 1) * room.block_bytes
    assert stage.num_kv_tokens is not None
    forecast_pool_bytes = (stage.num_kv_tokens + resources.block_size) * stage.kv_bytes_per_token
    compared = [
        ("weights", room.weight_bytes, stage.weight_bytes),
        ("all else but KV", room.used_bytes - room.weight_bytes, stage.overhead.total),
        ("KV cache that fits", pool_bytes, forecast_pool_bytes),
        ("in use with it", room.used_bytes + pool_bytes, stage.fixed_bytes + forecast_pool_bytes),
    ]
    rows = [
        [str(stage.stage_index), name, f"{real / GIB:.3f}", f"{told / GIB:.3f}", f"{told / real:.3f}"]
        for name, real, told in compared
    ]
    return [*rows, [str(stage.stage_index), "taken by steps afterwards", f"{outcome.grown_bytes / GIB:.3f}", "0", ""]]


if __name__ == "__main__":
    typer.run(main)
