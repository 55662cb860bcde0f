"""Engines in process, side by side, on a trace's requests as they come: output tokens per second beside latencies."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.speed.contestants import CONTESTANTS, Settings
from benchmarks.speed.engines import Engines, Log
from benchmarks.speed.load import Shape, batch_requests, trace_requests
from benchmarks.speed.results import Results, Row, spread
from benchmarks.speed.streams import load_figures


@dataclass(frozen=True, slots=True)
class Offer:
    """What is offered: each of `rates` (requests per second) for `seconds`, in the shapes of a trace.

    Ours take `our_max_batch` sequences at a time, the peers are tried with each of `peer_batches`.
    """

    shapes: Sequence[Shape]
    rates: Sequence[float]
    seconds: float
    our_max_batch: int
    peer_batches: Sequence[int]

    def takes_part(self, name: str, max_batch: int) -> bool:
        return max_batch in self.peer_batches if CONTESTANTS[name].is_peer else max_batch == self.our_max_batch


def measure_load(engines: Engines, settings: Settings, offer: Offer, results: Results, log: Log) -> None:
    """Rows of the group "load". Each rate is offered once: its percentiles are of many requests."""
    rows: list[Row] = []
    results.groups["load"] = rows  # those that there are, if it is cut short
    for shift in engines.shifts():
        with engines.loaded(shift) as processes:
            engines.turn(processes, shift, batch_requests(settings.config, 1, 16, 4, -2), 1)  # to warm up
            for rate in offer.rates:
                requests = trace_requests(settings.config, offer.shapes, rate, offer.seconds, seed=1)
                for max_batch in sorted({offer.our_max_batch, *offer.peer_batches}):
                    names = [name for name in shift if offer.takes_part(name, max_batch)]
                    log(f"{len(requests)} requests in {offer.seconds:g} s, at most {max_batch} at a time")
                    for name, streams in engines.turn(processes, names, requests, max_batch, offer.seconds).items():
                        measured = load_figures(requests, streams, offer.seconds)
                        row: Row = {"contestant": name, "max_batch": max_batch, "rate": rate}
                        rows.append(row | {field: spread([value]) for field, value in measured._asdict().items()})


def at_equal_latency(rows: Sequence[Row]) -> list[Row]:
    """For each p99 between tokens that one of ours had: the row with the best output rate within it, by contestant."""
    found = []
    ours = [row for row in rows if not CONTESTANTS[row["contestant"]].is_peer]
    for limit_s in sorted({row["intertoken_p99_s"].median for row in ours}):
        best: dict[str, Row] = {}
        for row in rows:
            name = row["contestant"]
            if row["intertoken_p99_s"].median <= limit_s:
                best[name] = max(best.get(name, row), row, key=lambda row: row["output_rate"].median)
        found.append({"limit_s": limit_s, "best": best})
    return found
