"""The picture of a run: ours beside the peers, a row for each batch and, if there was one, for the load over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speed.contestants import CONTESTANTS
from benchmarks.speed.report import significant
from benchmarks.speed.results import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "ours-fp32": "#9fd3c7",
    "ours-bf16": "#4aa596",
    "ours-int8": "#12776b",
    "ours-int8-fp32": "#0b4f47",
    "ours-fp32-torch": "#cfe5df",
    "ours-bf16-torch": "#a9cdc4",
    "transformers-fp32": "#d5dad7",
    "transformers-bf16": "#9aa5a0",
    "ctranslate2-fp32": "#f0c9a8",
    "ctranslate2-int8": "#d98f4e",
}
PANELS = (("prefill_s", "prefill, s"), ("decode_rate", "decode, tokens/s"), ("overall_rate", "overall, tokens/s"))
LOAD_PANELS = (
    ("intertoken_p99_s", "p99 between tokens, s"),
    ("ttft_p50_s", "p50 of the first token, s"),
    ("ttft_p99_s", "p99 of the first token, s"),
)


def draw(file: Path, results: Results) -> None:
    """Needs the group "engine"."""
    from matplotlib.figure import Figure

    rows, load = results.groups["engine"], results.groups.get("load", [])
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    num_rows = len(scenarios) + bool(load)
    figure = Figure(figsize=(9.6, 2.4 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, len(PANELS), squeeze=False)
    for panels, scenario in zip(grid, scenarios, strict=False):
        for axes, (key, title) in zip(panels, PANELS, strict=True):
            _draw_bars(axes, [row for row in rows if row["scenario"] == scenario], key)
            axes.set_title(f"{scenario}: {title}", fontsize=9)
            if axes is not panels[0]:
                axes.set_yticklabels([])
    if load:
        for axes, (key, title) in zip(grid[-1], LOAD_PANELS, strict=True):
            _draw_load(axes, load, key)
            axes.set_title(f"output tokens/s by {title}", fontsize=9)
        grid[-1][-1].legend(frameon=False, fontsize=6)
    figure.savefig(file, dpi=150)


def _draw_bars(axes: "Axes", rows: Sequence[Row], key: str) -> None:
    """Medians, with lines from the least to the greatest."""
    names = [row["contestant"] for row in rows]
    values = [row[key].median for row in rows]
    below = [row[key].median - row[key].min for row in rows]
    above = [row[key].max - row[key].median for row in rows]
    bars = axes.barh(names, values, color=[COLOURS[name] for name in names], xerr=[below, above], ecolor="#59625e")
    axes.bar_label(bars, [significant(value) for value in values], fontsize=8, padding=4)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)  # the numbers are at the bars
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _draw_load(axes: "Axes", rows: Sequence[Row], key: str) -> None:
    """A line for each contestant and limit, from rate to rate."""
    for name in CONTESTANTS:
        for max_batch in sorted({row["max_batch"] for row in rows if row["contestant"] == name}):
            found = [row for row in rows if (row["contestant"], row["max_batch"]) == (name, max_batch)]
            x, y = [row[key].median for row in found], [row["output_rate"].median for row in found]
            axes.plot(x, y, "o-", color=COLOURS[name], markersize=3, linewidth=1, label=f"{name}, {max_batch}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
