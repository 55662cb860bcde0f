"""`gptj-serve profile`: a timeline of an engine's steps, for Perfetto or chrome://tracing, and its figures."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from gptj_serve.errors import ConfigError

if TYPE_CHECKING:
    from gptj_serve.profiling.load import PlannedRequest
    from gptj_serve.profiling.summary import ProfileSummary

DEFAULT_REQUESTS = 32
DEFAULT_PROMPT_TOKENS = 128
DEFAULT_NEW_TOKENS = 32
DEFAULT_CONCURRENCY = 8
WIDTH = 100


def profile(
    config: Annotated[
        Path | None, typer.Argument(help="Serve config file, as for serve run. Default: the demo over two stages.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests to serve; of a trace the first so many that fit.")
    ] = DEFAULT_REQUESTS,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help=f"Of each request. Default: {DEFAULT_PROMPT_TOKENS}."),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help=f"To generate for each. Default: {DEFAULT_NEW_TOKENS}."),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help=f"Requests at a time. Default: {DEFAULT_CONCURRENCY}; of a trace each when it arrived.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV of arrival, prompt tokens, output tokens, for the requests' lengths and times."),
    ] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="Record torch's operators too. Every step then takes longer.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for the timeline; compressed if it ends in .gz.")
    ] = Path("trace.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Serve a load with an engine in this process, and write what it did when, for ui.perfetto.dev."""
    from gptj_serve.environment import keep_openmp_from_spinning

    keep_openmp_from_spinning()  # as in the service; from here on torch is loaded
    from gptj_serve.profiling.deployment import DEMO, read_deployment
    from gptj_serve.profiling.load import Load
    from gptj_serve.profiling.session import Session
    from gptj_serve.profiling.trace_events import check_trace_file, write_trace

    check_trace_file(output)
    for option, value in (("--prompt-tokens", prompt_tokens), ("--new-tokens", new_tokens)):
        if trace is not None and value is not None:
            raise ConfigError(f"{option}={value}: can't be set beside --trace, which has the lengths")
    service = DEMO if config is None else read_deployment(config)
    session = Session(service)
    planned = _planned(session.max_sequence_tokens, requests, prompt_tokens, new_tokens, trace)
    if trace is None:
        concurrency = concurrency or DEFAULT_CONCURRENCY
    result = asyncio.run(session.profile(Load(planned, concurrency), with_operators=operators))
    summary = result.summary
    write_trace(
        output,
        {service.served_name: result.timeline},
        {"model": service.served_name, "num_stages": service.pipeline.num_stages}
        | {name: getattr(summary, name) for name in ("dtype", "kernels", "threads_per_stage")},
    )
    if as_json:
        return typer.echo(json.dumps({"model": service.served_name} | asdict(summary), indent=2))
    console = Console(width=WIDTH, soft_wrap=True)
    console.print(_heading(service.served_name, summary), markup=False, highlight=False)
    console.print(_stage_table(summary))
    for line in _remarks(summary, output, with_operators=operators):
        console.print(line, markup=False, highlight=False)
    return None


def _planned(
    max_tokens: int, num_requests: int, prompt_tokens: int | None, new_tokens: int | None, trace: Path | None
) -> "list[PlannedRequest]":
    from gptj_serve.profiling.load import trace_requests, uniform_requests

    if trace is not None:
        return trace_requests(trace, num_requests, max_tokens)
    return uniform_requests(
        num_requests, prompt_tokens or DEFAULT_PROMPT_TOKENS, new_tokens or DEFAULT_NEW_TOKENS, max_tokens
    )


def _heading(model: str, summary: "ProfileSummary") -> str:
    threads = f"{summary.threads_per_stage} thread{'s' * (summary.threads_per_stage > 1)}"
    return f"{model} in {summary.dtype}, {summary.kernels} kernels, {threads} per stage"


def _stage_table(summary: "ProfileSummary") -> Table:
    table = Table()
    for column in ("stage", "layers", "steps", "mean ms", "p50 ms", "p99 ms", "busy", "bubble", "handoff µs"):
        table.add_column(column, justify="right")
    for stage in summary.stages:
        first, end = stage.layers
        table.add_row(
            str(stage.stage_index),
            f"{first}-{end - 1}",
            f"{stage.num_steps:,}",
            *(f"{seconds * 1e3:.2f}" for seconds in (stage.mean_step_s, stage.p50_step_s, stage.p99_step_s)),
            f"{stage.busy_ratio:.0%}",
            f"{stage.bubble_ratio:.0%}",
            "" if stage.mean_handoff_s is None else f"{stage.mean_handoff_s * 1e6:,.0f}",
        )
    return table


def _remarks(summary: "ProfileSummary", output: Path, *, with_operators: bool) -> list[str]:
    refused = f", {summary.num_refused:,} refused since they would wait too long" if summary.num_refused else ""
    preempted = f", {summary.num_preemptions:,} preemptions" if summary.num_preemptions else ""
    lines = [
        f"{summary.num_finished:,} requests{refused}: {summary.num_prompt_tokens:,} prompt tokens, "
        f"{summary.num_tokens_generated:,} generated, in {summary.num_steps:,} steps and {summary.duration_s:.2f} s"
        f"{preempted}",
        f"{summary.tokens_per_s:,.0f} generated tokens/s, {summary.scheduler_s_per_step * 1e6:,.0f} µs of the "
        "scheduler per step",
    ]
    if with_operators:
        lines.append("torch's operators were recorded, so every step took longer than otherwise")
    return [*lines, f"timeline: {output}, for ui.perfetto.dev or chrome://tracing"]
