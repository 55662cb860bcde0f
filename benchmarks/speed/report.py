"""Tables of what a run found."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.contestants import CONTESTANTS
from benchmarks.speed.mixed_load import at_equal_latency
from benchmarks.speed.results import Results, Row, Spread

Column = tuple[str, str, Callable[[Any], str]]
"""Key of a row, title, and how a value is written."""


def _text(value: Any) -> str:
    return str(value)


def _number(value: Any) -> str:
    """Median, and the range where there is one."""
    if not isinstance(value, Spread):
        return f"{value:.3g}"
    shown = significant(value.median)
    return shown if value.min == value.max else f"{shown} ({significant(value.min)}..{significant(value.max)})"


def significant(value: float) -> str:
    """Three digits, and no powers of ten for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _scaled(factor: float) -> Callable[[Any], str]:
    return lambda value: _number(Spread(*(factor * number for number in value)))


_millis, _micros = _scaled(1e3), _scaled(1e6)


def _percent(value: Any) -> str:
    return f"{value.median if isinstance(value, Spread) else value:.0%}"


def _times(value: Any) -> str:
    return f"{value:.2f}x"


COLUMNS: dict[str, list[Column]] = {
    "engine": [
        ("scenario", "batch x prompt + new", _text),
        ("contestant", "engine", _text),
        ("prefill_s", "prefill s", _number),
        ("prefill_of_bound", "of bound", _percent),
        ("step_s", "step ms", _millis),
        ("step_of_bound", "of bound", _percent),
        ("decode_rate", "decode tok/s", _number),
        ("decode_rate_to_best_peer", "/ best peer", _times),
        ("overall_rate", "overall tok/s", _number),
        ("overall_rate_to_best_peer", "/ best peer", _times),
        ("same_tokens", "same tokens", _percent),
    ],
    "load": [
        ("rate", "requests/s", _number),
        ("contestant", "engine", _text),
        ("max_batch", "at most", _text),
        ("output_rate", "output tok/s", _number),
        ("ttft_p50_s", "first token p50 s", _number),
        ("ttft_p99_s", "p99 s", _number),
        ("intertoken_p50_s", "between tokens p50 ms", _millis),
        ("intertoken_p99_s", "p99 ms", _millis),
        ("num_unfinished", "unfinished", _number),
    ],
    "pipeline": [
        ("kind", "stages are", _text),
        ("num_stages", "stages", _text),
        ("threads", "threads each", _text),
        ("single_rate", "1 sequence tok/s", _number),
        ("handoff_s", "handoff µs per hop", _micros),
        ("concurrent_rate", "many tok/s", _number),
        ("to_one_stage", "/ one stage", _times),
        ("bubble_ratio", "idle", _percent),
    ],
    "service": [
        ("scenario", "model", _text),
        ("startup_s", "serve run to first token s", _number),
        ("streams", "streams", _text),
        ("output_rate", "tok/s", _number),
        ("ttft_p50_s", "first token p50 s", _number),
        ("ttft_p99_s", "p99 s", _number),
        ("intertoken_p50_s", "between tokens p50 ms", _millis),
        ("intertoken_p99_s", "p99 ms", _millis),
    ],
}


def show_machine(console: Console, machine: dict[str, Any]) -> None:
    table = Table("", "", title="machine", show_header=False)
    table.add_row("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used")
    table.add_row("features", ", ".join(machine["features"]))
    table.add_row("load average at the start", f"{machine['load_average']:.2f}")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    reads = (f"{rate / 1e9:.1f} on {threads}" for threads, rate in machine["read_bytes_per_s"].items())
    table.add_row("reads GB/s, by threads", ", ".join(reads))
    for precision, rates in machine["operations_per_s"].items():
        shown = ", ".join(f"{rate / 1e9:.0f} ({name})" for name, rate in rates.items())
        table.add_row(f"{precision} GOP/s", shown or "not available")
    console.print(table)


def show_group(console: Console, name: str, rows: Sequence[Row]) -> None:
    columns = COLUMNS[name]
    table = Table(*(title for _, title, _ in columns), title=name)
    last = None
    for row in rows:
        if last is not None and row.get(columns[0][0]) != last:
            table.add_section()
        last = row.get(columns[0][0])
        table.add_row(*("" if row.get(key) is None else write(row[key]) for key, _, write in columns))
    console.print(table)
    if name == "load":
        _show_equal_latency(console, rows)


def _show_equal_latency(console: Console, rows: Sequence[Row]) -> None:
    names = [name for name in CONTESTANTS if any(row["contestant"] == name for row in rows)]
    table = Table("p99 between tokens, ms", *names, title="most output tok/s within a p99 that one of ours had")
    for limit in at_equal_latency(rows):
        best = limit["best"]
        cells = [_number(best[name]["output_rate"]) if name in best else "" for name in names]
        table.add_row(f"{1e3 * limit['limit_s']:.0f}", *cells)
    console.print(table)


def show_left_out(console: Console, results: Results) -> None:
    for name, reason in results.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False)


def show_ratios(console: Console, compared: Sequence[Row]) -> None:
    """Rows of `results.ratios`."""
    table = Table("group", "row", "this run / the earlier one", title="compared")
    for row in compared:
        of = ", ".join(str(value) for name, value in row.items() if name not in ("group", "ratios"))
        table.add_row(row["group"], of, ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items()))
    console.print(table)
