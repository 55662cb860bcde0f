"""What a GPU does with GPT-J's shape and random weights, in this process: no Ray, no file. See docs/gpu.md.

python -m benchmarks.gpu --only decode,first-token
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import torch
import typer

from benchmarks.gpu.demo import demo
from benchmarks.gpu.engines import Engines, Setup
from benchmarks.gpu.filling import filling
from benchmarks.gpu.machine import described_sums, measure_rates
from benchmarks.gpu.parts import PARTS, Bench, Sizes
from benchmarks.gpu.random_stages import random_prompts, random_stages
from benchmarks.speed.models import MODELS, Precision
from gptj_serve.config import Quantization
from gptj_serve.kernels.gpu.weights import GPUBlock
from gptj_serve.model.block import GPTJBlock
from gptj_serve.pipeline.gpu.cuda_device import CUDADevice
from gptj_serve.pipeline.gpu.device import Device
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec, sum_in_fp32

BLOCK_SIZE = 16
NUM_RATE_BYTES, RATE_SIZE = 4 << 30, 8192

MORE_PARTS = ("filling", "demo")
ALL_PARTS = ",".join([*MORE_PARTS, *PARTS])


def main(
    only: Annotated[str, typer.Option(help=f"Parts: {ALL_PARTS}")] = ALL_PARTS,
    model: Annotated[str, typer.Option(help=f"A shape: {', '.join(MODELS)}")] = "6b",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    quantization: Annotated[str, typer.Option(help="none, int8 or fp8: of the linear layers' weights")] = "none",
    batches: Annotated[str, typer.Option(help="Sequences at a time, of the throughput")] = "1,8,32,64,128,256",
    kv_tokens: Annotated[int, typer.Option(help="Of the KV pool")] = 65536,
    max_num_sequences: int = 256,
    max_microbatch_tokens: int = 2048,
    rounds: Annotated[int, typer.Option(help="Of each batch; the fastest counts")] = 3,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all figures, written after each part")] = None,
) -> None:
    """Measure the parts one after the other."""
    parts = only.split(",")
    if unknown := set(parts) - {*PARTS, *MORE_PARTS}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: parts are {ALL_PARTS}")
    if set(parts) != {"filling"} and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here: all parts but filling need one (--only filling).")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures: dict[str, float] = {}

    def keep(measured: dict[str, float]) -> None:
        """After each part: a later one may be cut off."""
        figures.update(measured)
        if output is not None:
            output.write_text(json.dumps(figures, indent=1))

    if "filling" in parts:
        keep(filling())
    if "demo" in parts:
        keep(demo(torch.device("cuda", torch.cuda.current_device())))
    if any(part in PARTS for part in parts):
        limits = Setup(MODELS[model], kv_tokens // BLOCK_SIZE, BLOCK_SIZE, max_num_sequences, max_microbatch_tokens)
        bench = cuda_bench(limits, dtype, cast(Quantization, quantization))
        bench.sizes = Sizes(batches=tuple(map(int, batches.split(","))), rounds=rounds)
        for part in PARTS:
            if part in parts:
                PARTS[part](bench)
                keep(bench.figures)


def cuda_bench(setup: Setup, dtype_name: str, quantization: Quantization) -> Bench:
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, dtype_name)
    sum_in_fp32()
    rates = measure_rates(device, dtype, NUM_RATE_BYTES, RATE_SIZE)
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: {rates.bytes_per_s / 1e12:.2f} TB/s, "
        f"{rates.operations_per_s / 1e12:.0f} TFLOP/s of products in {dtype_name}; {described_sums()}"
    )
    make_runners = partial(random_runners, CUDADevice(device), setup, dtype, quantization)
    weight_bytes = dtype.itemsize if quantization == "none" else 1
    precision = Precision(dtype_name, weight_bytes, dtype.itemsize)
    prompts = partial(random_prompts, vocab_size=setup.config.vocab_size)
    return Bench(setup.config, precision, dtype, device, rates, Engines(setup, make_runners), prompts)


def random_runners(
    device: Device, setup: Setup, dtype: torch.dtype, quantization: Quantization, num_stages: int
) -> list[StageRunner]:
    from gptj_serve.pipeline.gpu.loading import packed_block, runner_maker

    config = setup.config
    specs = [
        StageSpec(
            span,
            setup.num_kv_blocks,
            setup.block_size,
            dtype,
            device.torch_device,
            config.vocab_size,
            quantization=quantization,
            max_num_sequences=setup.max_num_sequences,
            max_microbatch_tokens=setup.max_microbatch_tokens,
        )
        for span in partition(config.n_layer, num_stages, head_cost(config))
    ]
    blocks: list[list[GPUBlock]] = [[] for _ in specs]

    def take(index: int, block: GPTJBlock) -> None:
        blocks[index].append(packed_block(block, specs[index]))

    stages = random_stages(config, num_stages, dtype, device.torch_device, take)
    return [
        runner_maker(device, stage, own, spec)(setup.num_kv_blocks)
        for stage, own, spec in zip(stages, blocks, specs, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
