"""`gptj-serve simulate`: what a deployment would do under a load, from a trace and a cost model."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gptj_serve.config import PipelineConfig, ServiceConfig
from gptj_serve.errors import ConfigError

if TYPE_CHECKING:
    from gptj_serve.scaling.policy import ScalingLimits
    from gptj_serve.simulation.cost_model import CostModel
    from gptj_serve.simulation.service import Deployment

WIDTH = 100


def simulate(
    trace: Annotated[
        Path, typer.Argument(help="CSV with a line of names, then arrival, prompt tokens and output tokens.")
    ],
    cost: Annotated[Path, typer.Option(help="Cost model, as gptj-serve bench writes it.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Serve config file: its pipeline's limits, pipelines and autoscaling. Default: the service's."
        ),
    ] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Instead of the config's num_stages.")] = None,
    pipelines: Annotated[int | None, typer.Option(min=1, help="So many, and always so many.")] = None,
    max_pipelines: Annotated[
        int | None, typer.Option(min=1, help="Instead: as many as the scaling policy wants, from 1 to this.")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV pool of a pipeline. Default: the config's, or as the service's own.")
    ] = None,
    startup_s: Annotated[
        float, typer.Option(min=0, help="From the decision to start a pipeline until it serves.")
    ] = 60,
    rate: Annotated[float, typer.Option(min=1e-6, help="The trace in 1/rate of its time.")] = 1,
    copies: Annotated[int, typer.Option(min=1, help="Each request so often, within its time: so many more users.")] = 1,
    requests: Annotated[int | None, typer.Option(min=1, help="Of the trace, the first so many that fit.")] = None,
    first_token_s: Annotated[float, typer.Option(min=0, help="Target for the first token.")] = 2.0,
    between_tokens_s: Annotated[float, typer.Option(min=0, help="Target for the mean time between tokens.")] = 0.1,
    gpus_per_stage: Annotated[
        float | None, typer.Option(min=0, help="For the GPU-hours. Default: the config's; 1 without a config.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the router's choices and the copies' times.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write, with the course over time.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG, SVG or PDF to draw; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the service's own scheduler and scaling policy over a trace in simulated time."""
    from gptj_serve.profiling.load import trace_requests
    from gptj_serve.simulation.cost_model import CostModel
    from gptj_serve.simulation.load import make_load
    from gptj_serve.simulation.outcomes import Outcomes
    from gptj_serve.simulation.plot import check_plot_file, draw
    from gptj_serve.simulation.report import Targets, figures, lines
    from gptj_serve.simulation.report import as_json as report_json
    from gptj_serve.simulation.service import SimulatedService

    if plot is not None:
        check_plot_file(plot)
    model = CostModel.read(cost)
    service = _service(config, stages, kv_tokens)
    num_pipelines, scaling = _scaling(service, pipelines, max_pipelines)
    deployment = replace(_deployment(service.pipeline, model), startup_s=startup_s)
    deployment = replace(deployment, num_pipelines=num_pipelines, scaling=scaling)
    planned = trace_requests(trace, requests, min(model.model.max_sequence_tokens, deployment.num_kv_tokens))
    load = make_load(planned, rate, copies, seed)
    targets = Targets(first_token_s, between_tokens_s)
    outcomes = Outcomes(len(load), between_tokens_s)
    began_at = time.perf_counter()
    result = SimulatedService(deployment, outcomes, seed=seed).run(load)
    elapsed_s = time.perf_counter() - began_at
    if gpus_per_stage is None:
        gpus_per_stage = 1.0 if config is None else service.pipeline.stage.num_gpus
    found = figures(outcomes, result, targets, model.request_s, gpus_per_stage * service.pipeline.num_stages)
    settings: dict[str, Any] = {
        "trace": str(trace),
        "rate": rate,
        "copies": copies,
        "num_stages": service.pipeline.num_stages,
        "num_kv_tokens": deployment.num_kv_tokens,
        "num_pipelines": num_pipelines,
        "max_pipelines": num_pipelines if scaling is None else scaling.max_pipelines,
        "startup_s": startup_s,
        "seed": seed,
        "model": model.model.name,
        "cost_source": model.source,
    }
    document = report_json(found, targets, result, settings)
    if output is not None:
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw(plot, outcomes, result, targets, model.request_s)
    if as_json:
        return typer.echo(json.dumps(document, indent=2))
    console = Console(width=WIDTH, soft_wrap=True)
    how_many = f"{num_pipelines:,} pipelines" if scaling is None else f"up to {scaling.max_pipelines:,} pipelines"
    what = f"{service.pipeline.num_stages} stages, {deployment.num_kv_tokens:,} KV tokens"
    console.print(f"{model.model.name}, {how_many} of {what}", highlight=False)
    table = Table(show_header=False)
    for name, value in lines(found, targets):
        table.add_row(name, value)
    console.print(table)
    if model.source == "estimated":
        console.print("An ESTIMATE: the cost model was made from figures of hardware, and not measured.")
    console.print(f"simulated in {elapsed_s:.1f} s", highlight=False)
    return None


def _service(config: Path | None, stages: int | None, kv_tokens: int | None) -> ServiceConfig:
    from gptj_serve.profiling.deployment import read_deployment

    service = ServiceConfig() if config is None else read_deployment(config)
    changes: dict[str, Any] = {}
    if stages is not None:
        changes["num_stages"] = stages
    if kv_tokens is not None:
        changes["kv_cache"] = service.pipeline.kv_cache.model_copy(update={"num_tokens": kv_tokens})
    return service.model_copy(update={"pipeline": service.pipeline.model_copy(update=changes)})


def _scaling(
    service: ServiceConfig, pipelines: int | None, max_pipelines: int | None
) -> "tuple[int, ScalingLimits | None]":
    """How many pipelines there are at first, and within what their number changes."""
    from gptj_serve.config import AutoscalingConfig

    if pipelines is not None and max_pipelines is not None:
        raise ConfigError(f"--max-pipelines={max_pipelines}: can't be set beside --pipelines, a number that stays")
    if pipelines is not None:
        return pipelines, None
    if max_pipelines is not None:
        changes = {"max_pipelines": max_pipelines}
        scaling = AutoscalingConfig(**changes) if service.autoscaling is None else service.autoscaling
        scaling = scaling.model_copy(update=changes)
    elif service.autoscaling is not None:
        scaling = service.autoscaling
    else:
        return service.num_pipelines, None
    return scaling.num_initial, scaling.limits


def _deployment(config: PipelineConfig, model: "CostModel") -> "Deployment":
    from gptj_serve.engine.scheduler import SchedulerLimits
    from gptj_serve.planner import DEFAULT_KV_SEQUENCES
    from gptj_serve.simulation.service import Deployment

    if config.sizes_kv_pool_from_memory:
        raise ConfigError(
            "pipeline.kv_cache.num_tokens is not set: on GPUs pipelines find out themselves how large their KV pool "
            "is. Say --kv-tokens; `gptj-serve plan` forecasts it"
        )
    max_tokens = model.model.max_sequence_tokens
    num_kv_tokens = config.kv_cache.num_tokens or DEFAULT_KV_SEQUENCES * max_tokens
    wait_s = config.scheduler.max_queue_wait_s
    return Deployment(
        limits=SchedulerLimits(
            config.num_stages,
            config.scheduler.max_num_sequences,
            config.scheduler.max_microbatch_tokens,
            max_tokens,
            math.inf if wait_s is None else wait_s,
        ),
        num_kv_blocks=-(-num_kv_tokens // config.kv_cache.block_size),
        block_size=config.kv_cache.block_size,
        reuse_prefixes=config.kv_cache.reuse_prefixes,
        costs=model.pipeline(config.num_stages),
        num_pipelines=1,
    )
