"""The picture of a simulation; needs matplotlib."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from gptj_serve.errors import ConfigError
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.report import Targets
from gptj_serve.simulation.service import Result

NUM_SLOTS = 120


def check_plot_file(file: Path) -> None:
    """Before the work is done: raises `ConfigError` if nothing could be drawn there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"--plot={file}: needs matplotlib: pip install 'gptj_serve[plot]'") from None
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot={file}: must end in .png, .svg or .pdf")


def draw(file: Path, outcomes: Outcomes, result: Result, targets: Targets, request_s: float) -> None:
    """Pipelines, requests in them, and first tokens, over the time of the load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.4), layout="constrained")
    pipelines, requests, first = figure.subplots(3, 1, sharex=True)
    at_s = [moment.at_s for moment in result.moments]
    columns = [
        [getattr(moment, name) for moment in result.moments] for name in ("num_running", "num_starting", "num_ending")
    ]
    colours = ("#12776b", "#d98f4e", "#9aa5a0")
    pipelines.stackplot(at_s, columns, labels=("running", "starting", "ending"), colors=colours, step="post")
    pipelines.set_ylabel("pipelines")
    requests.plot(at_s, [moment.num_generating for moment in result.moments], color="#12776b", label="begun")
    requests.plot(at_s, [moment.num_waiting for moment in result.moments], color="#d98f4e", label="waiting")
    requests.set_ylabel("requests")
    _draw_first_tokens(first, outcomes, targets, request_s)
    first.set_ylabel("first token, s")
    first.set_xlabel("s")
    for axes in (pipelines, requests, first):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(file, dpi=150)


def _draw_first_tokens(axes: "object", outcomes: Outcomes, targets: Targets, request_s: float) -> None:
    """p50 and p99 of those who arrived in each slot of time."""
    arrived_s, first_s = np.array(outcomes.arrived_s), np.array(outcomes.first_s)
    bounds = np.linspace(0, arrived_s[-1] + 1e-9, NUM_SLOTS + 1)
    places = np.searchsorted(arrived_s, bounds)
    slots = [(first_s - arrived_s + request_s)[start:end] for start, end in pairwise(places)]
    slots = [slot[~np.isnan(slot)] for slot in slots]
    for percent, colour in ((50, "#12776b"), (99, "#d98f4e")):
        values = [np.percentile(slot, percent) if len(slot) else np.nan for slot in slots]
        axes.plot(bounds[:-1], values, color=colour, label=f"p{percent}")  # type: ignore[attr-defined]
    axes.axhline(targets.first_token_s, color="#9aa5a0", linewidth=0.8, label="target")  # type: ignore[attr-defined]
