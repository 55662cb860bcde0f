"""How fast we are on this machine's CPU, beside transformers, CTranslate2 and what the hardware can do at most.

All run on the same weights, threads and requests, in turns. docs/performance.md says what is measured, and how.
"""

import asyncio
import importlib.util
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.number_lists import positive_numbers
from benchmarks.random_model import make_checkpoint
from benchmarks.speed import machine, report
from benchmarks.speed.batches import QUICK_SCENARIOS, SCENARIOS, measure_batches
from benchmarks.speed.contestants import CONTESTANTS, DEFAULT_CONTESTANTS, Settings
from benchmarks.speed.engines import Engines
from benchmarks.speed.load import Shape, drawn_shapes, read_trace
from benchmarks.speed.mixed_load import Offer, measure_load
from benchmarks.speed.models import MODELS, STORED_DTYPES
from benchmarks.speed.options import (
    EFFECTS,
    GROUPS,
    check_comparable,
    check_effects,
    check_place,
    check_rates,
    chosen,
    name_of,
    read_earlier,
    scenarios_of,
)
from benchmarks.speed.pipeline_level import PipelineSizes, measure_pipelines
from benchmarks.speed.plot import draw
from benchmarks.speed.results import Results, ratios
from benchmarks.speed.service_level import ServiceSizes, measure_services
from gptj_serve.errors import DataError
from gptj_serve.pipeline.threads import num_usable_cores
from gptj_serve.planner import DEFAULT_KV_SEQUENCES

console = Console(width=170)


@dataclass(frozen=True, slots=True)
class _Defaults:
    model: str
    only: str
    rounds: int
    rates: str
    seconds: float


FULL = _Defaults("405m", ",".join(GROUPS), 3, "0.05,0.1,0.2,0.4", 300.0)
QUICK = _Defaults("tiny", ",".join(GROUPS[:-1]), 1, "4", 3.0)


def main(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Option(help=f"Random weights of a shape: {', '.join(MODELS)}.", show_default=FULL.model)
    ] = None,
    only: Annotated[str | None, typer.Option(help="Groups to measure.", show_default=FULL.only)] = None,
    contestants: Annotated[str, typer.Option(help=f"Of {', '.join(CONTESTANTS)}.")] = ",".join(DEFAULT_CONTESTANTS),
    scenarios: Annotated[str | None, typer.Option(help="Batch x prompt + new tokens, as 1x128+33,4x1792+128.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of each contestant; 0: one per core that it may use.")] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of which medians are shown; one more warms up. A load is offered once.",
            show_default=str(FULL.rounds),
        ),
    ] = None,
    kv_tokens: Annotated[
        int, typer.Option(min=0, help="Of our KV pool. 0: what the largest scenario needs; for load, 8 full contexts.")
    ] = 0,
    max_microbatch_tokens: Annotated[int, typer.Option(min=1, help="As in the service's config.")] = 512,
    trace: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="CSV of arrival, prompt tokens, output tokens, for load."),
    ] = None,
    shrink: Annotated[int, typer.Option(min=1, help="Divide the trace's lengths by this.")] = 1,
    rates: Annotated[
        str | None, typer.Option(help="Requests per second to offer, for load.", show_default=FULL.rates)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="For which each rate is offered.", show_default=str(FULL.seconds))
    ] = None,
    peer_batches: Annotated[
        str | None,
        typer.Option(help="At most so many sequences of a peer at a time.", show_default="1,8 and --our-batch"),
    ] = None,
    our_batch: Annotated[int, typer.Option(min=1, help="At most so many sequences of ours at a time.")] = 32,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            exists=True,
            help="Directory of a tokenizer.json, for the service's 405 M model. Default: demo.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Another default for each: a tiny model, one round, one thread, no service.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file of all figures.")] = None,
    compare: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="An earlier run's JSON file: print ratios to it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw of the group engine; needs matplotlib.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, exists=True, help="Where there is room for the weights. Default: for temporaries."
        ),
    ] = None,
) -> None:
    """Compare speed on CPUs: our engine, its peers and the hardware's bound, in one run."""
    defaults = QUICK if quick else FULL
    model, rounds, seconds = model or defaults.model, rounds or defaults.rounds, seconds or defaults.seconds
    groups = chosen("--only", only or defaults.only, GROUPS)
    names = chosen("--contestants", contestants, tuple(CONTESTANTS))
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is none of {', '.join(MODELS)}", param_hint="--model")
    remarks = check_effects([name for name in EFFECTS if _is_given(ctx, name) and name != "quick"], groups)
    if shrink > 1 and trace is None:
        raise typer.BadParameter("is of a --trace, which there is none of", param_hint="--shrink")
    if plot is not None and "engine" not in groups:
        raise typer.BadParameter("draws the group engine, which is not measured", param_hint="--plot")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("needs matplotlib, which is not installed", param_hint="--plot")
    for option, file in (("--output", output), ("--plot", plot)):
        check_place(option, file)
    config = MODELS[model]
    scenario_list = (
        scenarios_of(scenarios, config.n_positions) if scenarios else QUICK_SCENARIOS if quick else SCENARIOS
    )
    rate_list = positive_numbers("--rates", rates or defaults.rates, float)
    peers = positive_numbers("--peer-batches", peer_batches or f"1,8,{our_batch}", int)
    shapes = _shapes(trace, config.n_positions, shrink)
    if "load" in groups:
        check_rates(shapes, rate_list, seconds)
    threads = threads or (1 if quick else num_usable_cores())  # tiny tensors are too small for more
    options = {
        "model": model, "threads": threads, "rounds": rounds, "kv_tokens": kv_tokens,
        "max_microbatch_tokens": max_microbatch_tokens, "trace": name_of(trace), "shrink": shrink, "rates": rate_list,
        "seconds": seconds, "our_batch": our_batch, "peer_batches": sorted(set(peers)), "quick": quick,
        "tokenizer": None if tokenizer is None else tokenizer.name,
    }  # fmt: skip
    earlier = None if compare is None else read_earlier(compare)
    if earlier is not None:
        check_comparable(options, earlier, groups)
    results = Results(options)

    def log(line: str) -> None:
        console.print(line, style="dim", markup=False, highlight=False)

    for remark in remarks:
        log(remark)
    log("measuring the machine")
    size = machine.QUICK if quick else machine.FULL
    results.machine = machine.facts(threads) | machine.rates(threads, size)
    report.show_machine(console, results.machine)
    failed = []
    with tempfile.TemporaryDirectory(prefix="speed-", dir=directory) as work:
        if set(groups) - {"service"}:
            log(f"making random weights: {model}")
            make_checkpoint(config, Path(work), getattr(torch, STORED_DTYPES[model]))

        def settings(num_kv_tokens: int) -> Settings:
            return Settings(Path(work), config, threads, num_kv_tokens, max_microbatch_tokens)

        def measure(group: str) -> None:
            match group:
                case "engine":
                    own = settings(kv_tokens or max(scenario.num_tokens for scenario in scenario_list))
                    measure_batches(Engines(names, own, results, log), own, scenario_list, rounds, results, log)
                case "load":
                    own = settings(kv_tokens or DEFAULT_KV_SEQUENCES * config.n_positions)
                    offer = Offer(shapes, rate_list, seconds, our_batch, peers)
                    measure_load(Engines(names, own, results, log), own, offer, results, log)
                case "pipeline":
                    sizes = PipelineSizes((1, 2), num_concurrent=8) if quick else PipelineSizes((1, 2, 4))
                    asyncio.run(measure_pipelines(settings(sizes.num_kv_tokens), sizes, rounds, results, log))
                case "service":
                    measure_services(tokenizer, ServiceSizes(), rounds, directory, results, log)

        for group in groups:
            try:
                measure(group)
            except (Exception, SystemExit) as error:  # the others are measured nevertheless
                traceback.print_exc()
                failed.append(group)
                results.left_out[group] = _last_line(error)
            if group in results.groups:
                report.show_group(console, group, results.groups[group])
            if output is not None:
                results.write(output)  # after each group: a long run may be cut short
    report.show_left_out(console, results)
    if earlier is not None:
        report.show_ratios(console, ratios(results, earlier))
    if plot is not None and results.groups.get("engine"):
        draw(plot, results)
    if failed:
        raise typer.Exit(1)


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _shapes(trace: Path | None, n_positions: int, shrink: int) -> list[Shape]:
    if trace is None:
        return drawn_shapes(n_positions)
    try:
        return read_trace(trace, n_positions, shrink)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from None


def _last_line(error: BaseException) -> str:
    """What it says; the log of a service that doesn't start has the reason at its end."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else repr(error)
