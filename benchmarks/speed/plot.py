"""The picture of a run: decode and overall rates of each batch, ours beside the peers."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.contestants import CONTESTANTS
from benchmarks.speed.report import significant
from benchmarks.speed.results import Results, Row

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


def draw(file: Path, results: Results) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    rows = results.groups["engine"]
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    names = [name for name in CONTESTANTS if any(row["contestant"] == name for row in rows)]
    figure = Figure(figsize=(9.6, 2.6 * len(scenarios)), layout="constrained")
    grid = figure.subplots(len(scenarios), len(PANELS), squeeze=False)

    def draw_panel(axes: Axes, scenario: str, key: str) -> None:
        found = {row["contestant"]: row for row in rows if row["scenario"] == scenario}
        present = [name for name in names if name in found]
        values = [found[name][key].median for name in present]
        bars = axes.barh(present, values, color=[COLOURS[name] for name in present])
        axes.barh(present, values, color="none", xerr=_errors([found[name] for name in present], key), ecolor="#59625e")
        axes.bar_label(bars, [significant(value) for value in values], fontsize=8, padding=6)
        axes.xaxis.set_visible(False)  # the numbers are at the bars
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(labelsize=8)

    for panels, scenario in zip(grid, scenarios, strict=True):
        for axes, (key, title) in zip(panels, PANELS, strict=True):
            draw_panel(axes, scenario, key)
            axes.set_title(f"{scenario}: {title}", fontsize=9)
            if axes is not panels[0]:
                axes.set_yticklabels([])
    figure.savefig(file, dpi=150)


def _errors(rows: Sequence[Row], key: str) -> list[list[float]]:
    """Below and above the medians."""
    below = [row[key].median - row[key].min for row in rows]
    return [below, [row[key].max - row[key].median for row in rows]]
