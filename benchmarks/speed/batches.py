"""Engines in process, side by side, on batches of equal requests and on long contexts."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.speed.contestants import CONTESTANTS, Settings
from benchmarks.speed.engines import Engines, Log
from benchmarks.speed.load import batch_requests
from benchmarks.speed.models import Cost, Precision, decode_cost, prefill_cost
from benchmarks.speed.ours_contestant import BLOCK_SIZE
from benchmarks.speed.results import Results, Row, spread
from benchmarks.speed.streams import BatchFigures, Stream, agreement, batch_figures


@dataclass(frozen=True, slots=True)
class Scenario:
    batch: int
    num_prompt: int
    num_new: int

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.num_prompt} + {self.num_new}"

    @property
    def num_tokens(self) -> int:
        """Of KV. The scheduler lets a sequence in while there is a block to spare for each that runs."""
        return self.batch * (1 + -(-(self.num_prompt + self.num_new) // BLOCK_SIZE)) * BLOCK_SIZE


SCENARIOS = [Scenario(batch, 128, 33) for batch in (1, 8, 32)] + [Scenario(batch, 1792, 128) for batch in (1, 4)]
QUICK_SCENARIOS = [Scenario(1, 16, 9), Scenario(4, 16, 9), Scenario(1, 96, 9)]


def measure_batches(
    engines: Engines, settings: Settings, scenarios: Sequence[Scenario], rounds: int, results: Results, log: Log
) -> None:
    """Rows of the group "engine". Each scenario is warmed up with two new tokens."""
    figures: dict[tuple[Scenario, str], list[BatchFigures]] = {}
    firsts: dict[tuple[Scenario, str], list[Stream]] = {}
    for shift in engines.shifts():
        with engines.loaded(shift) as processes:
            for scenario in scenarios:
                for index in range(-1, rounds):
                    log(f"{scenario.name}: {'warm-up' if index < 0 else f'round {index + 1} of {rounds}'}")
                    num_new = scenario.num_new if index >= 0 else 2
                    requests = batch_requests(settings.config, scenario.batch, scenario.num_prompt, num_new, index)
                    streams = engines.turn(processes, shift, requests, scenario.batch)
                    if index >= 0:
                        for name, found in streams.items():
                            figures.setdefault((scenario, name), []).append(batch_figures(found))
                            firsts.setdefault((scenario, name), found)
    rows = [_batch_row(scenario, name, measured, settings, results) for (scenario, name), measured in figures.items()]
    order = [scenario.name for scenario in scenarios]
    rows.sort(key=lambda row: (order.index(row["scenario"]), list(CONTESTANTS).index(row["contestant"])))
    for row in rows:
        scenario = scenarios[order.index(row["scenario"])]
        of_scenario = [name for other, name in firsts if other == scenario]
        exact = next((other for other in of_scenario if CONTESTANTS[other].precision.name == "fp32"), None)
        if exact is not None:
            row["same_tokens"] = agreement(firsts[scenario, row["contestant"]], firsts[scenario, exact])
        peers = [other for other in rows if other["scenario"] == row["scenario"] and _is_peer(other)]
        if peers and not _is_peer(row):
            for rate in ("decode_rate", "overall_rate"):
                row[f"{rate}_to_best_peer"] = row[rate].median / max(peer[rate].median for peer in peers)
    results.groups["engine"] = rows


def _batch_row(
    scenario: Scenario, name: str, measured: Sequence[BatchFigures], settings: Settings, results: Results
) -> Row:
    row: Row = {"scenario": scenario.name, "contestant": name}
    row |= {field: spread(getattr(one, field) for one in measured) for field in BatchFigures._fields}
    precision = CONTESTANTS[name].precision
    prefill = prefill_cost(settings.config, precision, scenario.batch, scenario.num_prompt)
    context = scenario.num_prompt + scenario.num_new // 2
    decode = decode_cost(settings.config, precision, scenario.batch, context)
    row["prefill_of_bound"] = _of_bound(prefill, precision, row["prefill_s"].median, results)
    row["step_of_bound"] = _of_bound(decode, precision, row["step_s"].median, results)
    return row


def _of_bound(cost: Cost, precision: Precision, measured_s: float, results: Results) -> float | None:
    """Bound / measured; None where the machine's rate in this precision is not known."""
    rates = results.machine["operations_per_s"][precision.name]
    if not rates:
        return None
    return cost.bound_s(max(results.machine["read_bytes_per_s"].values()), max(rates.values())) / measured_s


def _is_peer(row: Row) -> bool:
    return CONTESTANTS[row["contestant"]].is_peer
