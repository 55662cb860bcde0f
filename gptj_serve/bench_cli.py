"""`gptj-serve bench`: a cost model for `gptj-serve simulate`, measured here or estimated from figures of hardware."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from gptj_serve.errors import ConfigError

if TYPE_CHECKING:
    from gptj_serve.simulation.cost_model import CostModel


def bench(
    config: Annotated[
        Path | None, typer.Argument(help="Serve config file, as for serve run. Default: the demo over two stages.")
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("cost.json"),
    estimate: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure nothing: gpt-j-6b, or a config.json, on hardware as described."),
    ] = None,
    bandwidth_gb_s: Annotated[
        float | None, typer.Option(help="With --estimate: what a stage reaches, in 10^9 bytes/s of its memory.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="With --estimate: what a stage reaches, in 10^12 operations/s.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --estimate: of weights and KV.")] = "float16",
) -> None:
    """Measure how long a checkpoint's stages and the engine take, and write it for gptj-serve simulate."""
    if estimate is None:
        if bandwidth_gb_s is not None or tflops is not None:
            raise ConfigError("--bandwidth-gb-s and --tflops go with --estimate: what is measured needs no figures")
        cost = _measured(config)
    else:
        if config is not None:
            raise ConfigError(f"{config}: can't be set beside --estimate={estimate}")
        cost = _estimated(estimate, bandwidth_gb_s, tflops, dtype)
    cost.write(output)
    console = Console(width=100, soft_wrap=True)
    table = Table("coefficient", "µs", "of what")
    for name, field in type(cost).model_fields.items():
        if name.endswith("_s"):
            table.add_row(name, f"{getattr(cost, name) * 1e6:,.4g}", field.description)
    console.print(table)
    for line in remarks(cost):
        console.print(line, markup=False, highlight=False)
    console.print(f"written to {output}", markup=False, highlight=False)


def remarks(cost: "CostModel") -> list[str]:
    """What to know before it is believed."""
    if cost.source == "estimated":
        return ["An ESTIMATE, made from figures of hardware: nothing was measured."]
    notes = cost.notes
    mean, p90 = (float(notes[name]) for name in ("stage_error_mean", "stage_error_p90"))
    lines = [
        f"{notes['stage_times']} times of stages; the fit is off by {mean:.1%} on average, p90 {p90:.1%}",
        f"measured with up to {notes['max_context_tokens']:,} context tokens (rows x context) in a microbatch",
    ]
    if num_left_out := notes["stage_times_left_out"]:
        lines.append(f"{num_left_out} times were left out: the KV pool is too small for so many rows x context")
    return [*lines, "handoff_s and handoff_token_s are 0: set them by hand for stages on several hosts"]


def _measured(config: Path | None) -> "CostModel":
    from gptj_serve.environment import keep_openmp_from_spinning

    keep_openmp_from_spinning()  # as in the service; from here on torch is loaded
    from gptj_serve.profiling.deployment import DEMO, read_deployment
    from gptj_serve.simulation.calibration import calibrate

    return calibrate(DEMO if config is None else read_deployment(config))


def _estimated(name: str, bandwidth_gb_s: float | None, tflops: float | None, dtype: str) -> "CostModel":
    from gptj_serve.model.config import GPTJConfig
    from gptj_serve.planner import NAMED_CONFIGS, Model
    from gptj_serve.simulation.estimate import estimate

    if bandwidth_gb_s is None or tflops is None:
        raise ConfigError("--estimate: needs --bandwidth-gb-s and --tflops")
    if name not in NAMED_CONFIGS and not Path(name).is_file():
        raise ConfigError(f"--estimate={name!r}: neither a file nor one of {', '.join(NAMED_CONFIGS)}")
    model = Model(NAMED_CONFIGS[name] if name in NAMED_CONFIGS else GPTJConfig.from_file(Path(name)))
    return estimate(model, name, dtype, bandwidth_gb_s * 1e9, tflops * 1e12)
