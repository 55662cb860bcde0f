"""How fast we are on this machine's CPU, beside transformers, CTranslate2 and what the hardware can do at most.

All run on the same weights, threads and requests, in turns. docs/performance.md says what is measured, and how.
"""

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.random_model import make_checkpoint
from benchmarks.speed import machine, report
from benchmarks.speed.batches import QUICK_SCENARIOS, SCENARIOS, Scenario, measure_batches
from benchmarks.speed.contestants import CONTESTANTS, DEFAULT_CONTESTANTS, Settings
from benchmarks.speed.engines import Engines
from benchmarks.speed.load import drawn_shapes, read_trace
from benchmarks.speed.mixed_load import Offer, measure_load
from benchmarks.speed.models import MODELS, STORED_DTYPES
from benchmarks.speed.pipeline_level import PipelineSizes, measure_pipelines
from benchmarks.speed.plot import draw
from benchmarks.speed.results import Results, ratios
from benchmarks.speed.service_level import ServiceSizes, measure_services
from gptj_serve.pipeline.threads import num_usable_cores
from gptj_serve.planner import DEFAULT_KV_SEQUENCES

GROUPS = ("engine", "load", "pipeline", "service")
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
    model: Annotated[
        str | None, typer.Option(help=f"Random weights of a shape: {', '.join(MODELS)}.", show_default=FULL.model)
    ] = None,
    only: Annotated[str | None, typer.Option(help="Groups to measure.", show_default=FULL.only)] = None,
    contestants: Annotated[str, typer.Option(help=f"Of {', '.join(CONTESTANTS)}.")] = ",".join(DEFAULT_CONTESTANTS),
    scenarios: Annotated[str | None, typer.Option(help="Batch x prompt + new tokens, as 1x128+33,4x1792+128.")] = None,
    threads: Annotated[int, typer.Option(help="Of each contestant; 0: one per core that it may use.")] = 0,
    rounds: Annotated[
        int | None, typer.Option(help="Of which medians are shown; one more warms up.", show_default=str(FULL.rounds))
    ] = None,
    kv_tokens: Annotated[
        int, typer.Option(help="Of our KV pool. 0: what the largest scenario needs; for load, 8 full contexts.")
    ] = 0,
    max_microbatch_tokens: Annotated[int, typer.Option(help="As in the service's config.")] = 512,
    trace: Annotated[Path | None, typer.Option(help="CSV of arrival, prompt tokens, output tokens, for load.")] = None,
    shrink: Annotated[int, typer.Option(help="Divide the trace's lengths by this.")] = 1,
    rates: Annotated[
        str | None, typer.Option(help="Requests per second to offer, for load.", show_default=FULL.rates)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="For which each rate is offered.", show_default=str(FULL.seconds))
    ] = None,
    peer_batches: Annotated[str, typer.Option(help="At most so many sequences of a peer at a time.")] = "1,8",
    our_batch: Annotated[int, typer.Option(help="At most so many sequences of ours at a time.")] = 32,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of a tokenizer.json, for the service's 405 M model. Default: demo.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Another default for each: a tiny model, one round, one thread, no service.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file of all figures.")] = None,
    compare: Annotated[Path | None, typer.Option(help="An earlier run's JSON file: print ratios to it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw of the group engine; needs matplotlib.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where there is room for the weights. Default: for temporaries.")
    ] = None,
) -> None:
    """Compare speed on CPUs: our engine, its peers and the hardware's bound, in one run."""
    defaults = QUICK if quick else FULL
    model, rounds, seconds = model or defaults.model, rounds or defaults.rounds, seconds or defaults.seconds
    groups, names = (
        _chosen("--only", only or defaults.only, GROUPS),
        _chosen("--contestants", contestants, tuple(CONTESTANTS)),
    )
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is none of {', '.join(MODELS)}", param_hint="--model")
    if plot is not None and "engine" not in groups:
        raise typer.BadParameter("draws the group engine, which is not measured", param_hint="--plot")
    earlier = None if compare is None else Results.read(compare)
    config = MODELS[model]
    chosen = _scenarios(scenarios) if scenarios else QUICK_SCENARIOS if quick else SCENARIOS
    shapes = drawn_shapes(config.n_positions) if trace is None else read_trace(trace, config.n_positions, shrink)
    offered, batches = list(map(float, (rates or defaults.rates).split(","))), list(map(int, peer_batches.split(",")))
    offer = Offer(shapes, offered, seconds, our_batch, batches)
    threads = threads or (1 if quick else num_usable_cores())  # tiny tensors are too small for more
    results = Results(model)

    def log(line: str) -> None:
        console.print(f"[dim]{line}[/dim]", highlight=False)

    log("measuring the machine")
    size = machine.QUICK if quick else machine.FULL
    results.machine = machine.facts(threads) | machine.rates(threads, size)
    report.show_machine(console, results.machine)
    with tempfile.TemporaryDirectory(prefix="speed-", dir=directory) as work:
        if set(groups) - {"service"}:
            log(f"making random weights: {model}")
            make_checkpoint(config, Path(work), getattr(torch, STORED_DTYPES[model]))

        def settings(num_kv_tokens: int) -> Settings:
            return Settings(Path(work), config, threads, num_kv_tokens, max_microbatch_tokens)

        for group in groups:
            match group:
                case "engine":
                    own = settings(kv_tokens or max(scenario.num_tokens for scenario in chosen))
                    measure_batches(Engines(names, own, results, log), own, chosen, rounds, results, log)
                case "load":
                    own = settings(kv_tokens or DEFAULT_KV_SEQUENCES * config.n_positions)
                    measure_load(Engines(names, own, results, log), own, offer, results, log)
                case "pipeline":
                    sizes = PipelineSizes((1, 2), num_concurrent=8) if quick else PipelineSizes((1, 2, 4))
                    asyncio.run(measure_pipelines(settings(sizes.num_kv_tokens), sizes, rounds, results, log))
                case "service":
                    measure_services(tokenizer, ServiceSizes(), rounds, results, log)
            if group in results.groups:
                report.show_group(console, group, results.groups[group])
            if output is not None:
                results.write(output)  # after each group: a long run may be cut short
    report.show_left_out(console, results)
    if earlier is not None:
        report.show_ratios(console, ratios(results, earlier))
    if plot is not None:
        draw(plot, results)


def _chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)
    return names


def _scenarios(text: str) -> list[Scenario]:
    found = []
    for part in text.split(","):
        try:
            batch, lengths = part.split("x")
            num_prompt, num_new = lengths.split("+")
            found.append(Scenario(int(batch), int(num_prompt), int(num_new)))
        except ValueError:
            raise typer.BadParameter(f"{part!r} is not like 8x128+33", param_hint="--scenarios") from None
    return found
