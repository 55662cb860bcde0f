"""The command line: `gptj-serve convert | plan | fit | profile | bench | simulate | status`.

What a command needs is imported inside it, so that the others need not wait for it.
An error of this package ends as one line on stderr and exit status 1.
"""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptj_serve.errors import ConfigError, GPTJServeError

if TYPE_CHECKING:
    from gptj_serve.gpus import GPU
    from gptj_serve.planner import Model, Plan

GIB = 2**30

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Prepare GPT-J checkpoints for serving. The service itself is started with: serve run deployments/gptj.yaml",
)


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(StrEnum):
    none = "none"
    int8 = "int8"
    fp8 = "fp8"


def main(arguments: list[str] | None = None) -> None:
    """The entry point `gptj-serve`."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("fit", "--help"):  # it needs torch, which the other commands shall not wait for
        from gptj_serve import fit_cli

        app.add_typer(fit_cli.app, name="fit")
    if not words or words[0] in ("profile", "--help"):
        from gptj_serve import profile_cli

        app.command()(profile_cli.profile)
    if not words or words[0] in ("status", "--help"):
        from gptj_serve import status_cli

        app.command()(status_cli.status)
    if not words or words[0] in ("simulate", "--help"):
        from gptj_serve import simulate_cli

        app.command()(simulate_cli.simulate)
    if not words or words[0] in ("bench", "--help"):
        from gptj_serve import bench_cli

        app.command()(bench_cli.bench)
    try:
        app(arguments)
    except GPTJServeError as error:
        typer.echo(f"gptj-serve: {error}", err=True)
        raise SystemExit(1) from None


@app.callback()
def _commands() -> None:
    pass


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Directory with config.json and pytorch_model.bin or safetensors, one file or shards."),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights written. Default: each as it is stored.")] = None,
    max_shard_mb: Annotated[int, typer.Option(min=1, help="Largest shard, in 10^6 bytes.")] = 1000,
) -> None:
    """Write a checkpoint as sharded safetensors.

    Needs little memory, whatever the model's size. A run that was cut off goes on where it was when repeated.
    """
    from tqdm import tqdm

    from gptj_serve.model.convert import Conversion

    conversion = Conversion.prepare(source, destination, dtype and dtype.value, max_shard_mb * 1_000_000)
    with tqdm(total=conversion.num_bytes, unit="B", unit_scale=True, desc=destination.name) as bar:
        conversion.run(bar.update)
    typer.echo(
        f"{destination}: {conversion.num_bytes:,} bytes in {len(conversion.shards)} file(s), read back and sound"
    )


@app.command()
def plan(
    checkpoint: Annotated[str | None, typer.Argument(help="Checkpoint directory (safetensors), or 'demo'.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead: gpt-j-6b, or a config.json; without any weights.")
    ] = None,
    stages: Annotated[int, typer.Option(min=1, help="Pipeline stages, one device each.")] = 1,
    device: Annotated[
        str,
        typer.Option(help="What a stage runs on: cpu; gpu; or a GPU whose memory and bandwidth are known, as h200."),
    ] = "gpu",
    device_memory_gib: Annotated[
        float | None, typer.Option(min=0, help="Memory of one device. Without it: the service's default KV pool.")
    ] = None,
    memory_utilization: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Share of it for the service; on GPUs pipeline.gpu_memory_utilization."),
    ] = 0.9,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and KV. Default: as the service's auto on such a device.")
    ] = None,
    quantization: Annotated[
        Quantization, typer.Option(help="The matrices of the layers and the LM head in 8 bits.")
    ] = Quantization.none,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block.")] = 16,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Size of the KV pool. Default: what fits.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest sequence. Default: the model's n_positions.")] = None,
    typical: Annotated[int, typer.Option(min=1, help="Typical length of a sequence, in tokens.")] = 512,
    max_microbatch_tokens: Annotated[int, typer.Option(min=1, help="As pipeline.scheduler's.")] = 512,
    max_num_sequences: Annotated[int, typer.Option(min=1, help="As pipeline.scheduler's.")] = 256,
    bandwidth_gb_s: Annotated[
        float | None, typer.Option(min=0.001, help="Memory bandwidth of one device in 10^9 bytes/s, for latency.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how a model splits over stages, what fits, and how fast it can be at best. Exit status 1: it doesn't fit."""
    from gptj_serve import planner
    from gptj_serve.gpus import ASSUMED_CAPABILITY, StepLimits
    from gptj_serve.remedies import remedies

    card = _card(device)
    capability = card.capability if card else None if device == "cpu" else ASSUMED_CAPABILITY
    model = _model(checkpoint, config)
    memory_bytes = None if card is None else card.memory_bytes
    bandwidth_bytes_s = None if card is None else card.bandwidth_bytes_s
    resources = planner.Resources(
        num_stages=stages,
        dtype=dtype.value if dtype else planner.resolve_dtype("auto", [] if capability is None else [capability]),
        quantization=quantization.value,
        block_size=block_size,
        num_kv_tokens=kv_tokens,
        device_memory_bytes=memory_bytes if device_memory_gib is None else int(device_memory_gib * GIB),
        memory_utilization=memory_utilization,
        bandwidth_bytes_s=bandwidth_bytes_s if bandwidth_gb_s is None else bandwidth_gb_s * 1e9,
        capability=capability,
        step_limits=StepLimits(max_microbatch_tokens, max_num_sequences),
    )
    result = planner.plan(model, resources, context)
    changes = [] if result.fits else remedies(model, resources, result.context)
    if as_json:
        typer.echo(json.dumps(_as_json(result, min(typical, result.context), changes), indent=2))
    else:
        _print_plan(result, min(typical, result.context), changes)
    if not result.fits:
        raise typer.Exit(1)


def _model(checkpoint: str | None, config: str | None) -> "Model":
    """What to plan for."""
    from gptj_serve.config import ServiceConfig
    from gptj_serve.model.checkpoint import Checkpoint
    from gptj_serve.model.config import GPTJConfig
    from gptj_serve.planner import NAMED_CONFIGS, Model

    if (checkpoint is None) == (config is None):
        raise ConfigError("give either a checkpoint directory or --config")
    if checkpoint is not None:
        opened = Checkpoint.open(ServiceConfig(checkpoint=checkpoint).checkpoint_dir)
        return Model(opened.config, opened.heads)
    assert config is not None
    if config in NAMED_CONFIGS:
        return Model(NAMED_CONFIGS[config])
    if not Path(config).is_file():
        raise ConfigError(f"--config={config!r}: neither a file nor one of {', '.join(NAMED_CONFIGS)}")
    return Model(GPTJConfig.from_file(Path(config)))


def _card(device: str) -> "GPU | None":
    """None where nothing more is known of it."""
    from gptj_serve.gpus import GPUS

    if device in ("cpu", "gpu"):
        return None
    if device not in GPUS:
        raise ConfigError(f"--device={device!r}: none of cpu, gpu, {', '.join(GPUS)}")
    return GPUS[device]


def _as_json(plan: "Plan", typical: int, changes: list[str]) -> dict[str, Any]:
    return {
        "fits": plan.fits,
        "would_fit": changes,
        "num_parameters": plan.num_parameters,
        "dtype": plan.resources.dtype,
        "quantization": plan.resources.quantization,
        "block_size": plan.resources.block_size,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "num_kv_blocks": plan.num_kv_blocks,
        "num_kv_tokens": plan.num_kv_tokens,
        "context": plan.context,
        "max_batch_full": plan.max_batch(plan.context),
        "typical": typical,
        "max_batch_typical": plan.max_batch(typical),
        "min_token_latency_s": plan.min_token_latency_s,
        "min_step_interval_s": plan.min_step_interval_s,
        "stages": [
            {
                "stage_index": stage.stage_index,
                "layers": [stage.layers.start, stage.layers.stop],
                "weight_bytes": stage.weight_bytes,
                "overhead_bytes": stage.overhead._asdict(),
                "kv_bytes_per_token": stage.kv_bytes_per_token,
                "kv_pool_bytes": plan.kv_pool_bytes(stage),
                "num_kv_tokens": stage.num_kv_tokens,
            }
            for stage in plan.stages
        ],
    }


def _print_plan(plan: "Plan", typical: int, changes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("stage", "layers", "weights GiB", "other GiB", "KV KiB/token", "KV pool GiB", "KV tokens that fit"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        table.add_row(
            str(stage.stage_index),
            f"{stage.layers.start}-{stage.layers.stop - 1}",
            f"{stage.weight_bytes / GIB:.3f}",
            f"{stage.overhead.total / GIB:.3f}",
            f"{stage.kv_bytes_per_token / 1024:g}",
            f"{plan.kv_pool_bytes(stage) / GIB:.3f}",
            "?" if stage.num_kv_tokens is None else f"{stage.num_kv_tokens:,}",
        )
    table.add_section()
    table.add_row(
        "all",
        str(sum(len(stage.layers) for stage in plan.stages)),
        f"{plan.weight_bytes / GIB:.3f}",
        f"{sum(stage.overhead.total for stage in plan.stages) / GIB:.3f}",
        f"{plan.kv_bytes_per_token / 1024:g}",
        f"{sum(map(plan.kv_pool_bytes, plan.stages)) / GIB:.3f}",
        f"{plan.num_kv_tokens:,} in the pool",
    )
    console = Console(width=100, soft_wrap=True)
    console.print(f"{plan.num_parameters:,} parameters in {plan.resources.dtype}", highlight=False)
    console.print(table)
    for line in _remarks(plan, typical, changes):
        console.print(line, markup=False, highlight=False)


def _remarks(plan: "Plan", typical: int, changes: list[str]) -> list[str]:
    lines = []
    if plan.fits:
        lines.append(f"largest batch: {plan.max_batch(plan.context):,} sequences of {plan.context:,} tokens")
        lines[-1] += f", or {plan.max_batch(typical):,} of {typical:,}"
    if plan.min_token_latency_s is not None and plan.min_step_interval_s is not None:
        lines.append(
            f"decode: at least {plan.min_token_latency_s * 1e3:.2f} ms from a sequence's token to its next (every "
            f"stage's weights are read), at least {plan.min_step_interval_s * 1e3:.2f} ms between steps (the slowest "
            "stage's)"
        )
    if not plan.fits:
        lines.append(
            "DOES NOT FIT: every stage needs room for its weights, for all else that runs there, and for one sequence "
            "of full length."
        )
        lines += ["What would fit:", *[f"  - {change}" for change in changes]]
    return lines


if __name__ == "__main__":
    main()
