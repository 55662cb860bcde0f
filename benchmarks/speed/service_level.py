"""The service over HTTP: from `serve run` to the first token, then streams 1, 8 and 32 at a time.

Ray Serve, the stages and this client share the machine's cores; the client parses nothing.
"""

import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serve_run import http_stream, make_model, running_service
from benchmarks.speed.engines import Log
from benchmarks.speed.load import batch_requests
from benchmarks.speed.results import Results, Row, spread
from benchmarks.speed.streams import Request
from gptj_serve.config import ServiceConfig
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.profiling.percentile import percentile


@dataclass(frozen=True, slots=True)
class ServiceSizes:
    num_stages: int = 2
    streams: Sequence[int] = (1, 8, 32)
    num_prompt_tokens: int = 128
    num_new_tokens: int = 33


def measure_services(
    tokenizer: Path | None, sizes: ServiceSizes, rounds: int, directory: Path | None, results: Results, log: Log
) -> None:
    """Rows of the group "service": of the demo, and of a random model of 405 M parameters with that tokenizer.

    The model is written below `directory`, or where temporary files are.
    """
    demo = ServiceConfig().checkpoint_dir
    rows: list[Row] = []
    results.groups["service"] = rows  # those that there are, if it is cut short
    for name in ("demo", "405m"):
        with tempfile.TemporaryDirectory(prefix="speed-service-", dir=directory) as work:
            checkpoint = demo if name == "demo" else make_model(tokenizer or demo, Path(work))
            log(f"serve run of {name}")
            for row in _measure(name, checkpoint, Path(work), sizes, rounds, log):
                rows.append(row)


def _measure(name: str, directory: Path, work: Path, sizes: ServiceSizes, rounds: int, log: Log) -> Iterator[Row]:
    config = Checkpoint.open(directory).config
    started_at = time.perf_counter()
    with running_service(directory, sizes.num_stages, work):
        first = batch_requests(config, 1, sizes.num_prompt_tokens, 1, -2)
        asyncio.run(_streams(first))
        startup_s = time.perf_counter() - started_at
        for count in sizes.streams:
            measured = []
            for index in range(-1, rounds):
                log(f"{name}, {count} streams: {'warm-up' if index < 0 else f'round {index + 1} of {rounds}'}")
                requests = batch_requests(config, count, sizes.num_prompt_tokens, sizes.num_new_tokens, index)
                arrivals = asyncio.run(_streams(requests))
                measured += [_figures(arrivals, sizes)] if index >= 0 else []
            row: Row = {"scenario": name, "streams": count, "startup_s": startup_s}
            yield row | {field: spread(one[field] for one in measured) for field in measured[0]}


async def _streams(requests: Sequence[Request]) -> list[list[float]]:
    """Of each, when tokens came, in seconds since all were sent."""
    began_at = time.perf_counter()

    async def follow(request: Request) -> list[float]:
        times: list[float] = []
        async for chunk in http_stream(request.prompt, request.num_new_tokens):
            times += [time.perf_counter() - began_at] * chunk.count(b"data: {")
        return times

    return await asyncio.gather(*[follow(request) for request in requests])


def _figures(arrivals: Sequence[Sequence[float]], sizes: ServiceSizes) -> dict[str, float]:
    """Events are counted for the latencies; the rate is of the tokens asked for."""
    gaps = [later - at for times in arrivals for at, later in itertools.pairwise(times)]
    firsts = [times[0] for times in arrivals]
    return {
        "output_rate": len(arrivals) * sizes.num_new_tokens / max(times[-1] for times in arrivals),
        "ttft_p50_s": percentile(firsts, 0.5),
        "ttft_p99_s": percentile(firsts, 0.99),
        "intertoken_p50_s": percentile(gaps, 0.5),
        "intertoken_p99_s": percentile(gaps, 0.99),
    }
