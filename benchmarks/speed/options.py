"""The command's options: what they may be, and which of the measured groups each makes a difference to."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.speed.batches import Scenario
from benchmarks.speed.load import Shape, check_offer
from benchmarks.speed.results import Results

GROUPS = ("engine", "load", "pipeline", "service")

EFFECTS: dict[str, tuple[str, ...]] = {
    "model": GROUPS[:3],
    "contestants": ("engine", "load"),
    "scenarios": ("engine",),
    "threads": GROUPS[:3],
    "rounds": ("engine", "pipeline", "service"),
    "kv_tokens": ("engine", "load"),
    "max_microbatch_tokens": GROUPS[:3],
    "trace": ("load",),
    "shrink": ("load",),
    "rates": ("load",),
    "seconds": ("load",),
    "peer_batches": ("load",),
    "our_batch": ("load",),
    "tokenizer": ("service",),
    "quick": ("pipeline",),
}
"""The groups whose figures an option changes. `quick` is meant for itself: what else it sets are other options."""

CONDITIONS = (
    "model",
    "threads",
    "kv_tokens",
    "max_microbatch_tokens",
    "trace",
    "shrink",
    "seconds",
    "tokenizer",
    "quick",
)
"""With others of these, figures of two runs can't be compared. What the rest is about, a row tells by its keys."""


def check_effects(given: Iterable[str], groups: Sequence[str]) -> list[str]:
    """What to say of those without effect on some of the groups. Raises `typer.BadParameter` if one has none on any."""
    remarks = []
    for option in given:
        without = [group for group in groups if group not in EFFECTS[option]]
        if without == list(groups):
            raise typer.BadParameter(f"has no effect on {', '.join(groups)}", param_hint=_flag(option))
        if without:
            remarks.append(f"{_flag(option)} has no effect on {', '.join(without)}")
    return remarks


def check_comparable(options: dict[str, Any], earlier: Results, groups: Sequence[str]) -> None:
    """Raises `typer.BadParameter`, naming what differs from the earlier run in the groups that both have."""
    common = [group for group in groups if group in earlier.groups]
    if not common:
        measured = ", ".join(earlier.groups) or "nothing"
        raise typer.BadParameter(f"has no figures of {', '.join(groups)}, but of {measured}", param_hint="--compare")
    differences = [
        f"{_flag(option)} is {options[option]} here, {earlier.options.get(option)} there"
        for option in CONDITIONS
        if set(common) & set(EFFECTS[option]) and options[option] != earlier.options.get(option)
    ]
    if differences:
        raise typer.BadParameter(f"can't be compared: {'; '.join(differences)}", param_hint="--compare")


def read_earlier(file: Path) -> Results:
    try:
        return Results.read(file)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise typer.BadParameter(f"{file}: is no file of this benchmark: {error!r}", param_hint="--compare") from None


def check_place(option: str, file: Path | None) -> None:
    """Before anything is measured that could not be written then."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"{file}: there is no directory {file.parent}", param_hint=option)


def check_rates(shapes: Sequence[Shape], rates: Sequence[float], seconds: float) -> None:
    for rate in rates:
        try:
            check_offer(shapes, rate, seconds)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--rates") from None


def chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)
    return names


def scenarios_of(text: str, n_positions: int) -> list[Scenario]:
    found = []
    for part in text.split(","):
        try:
            batch, lengths = part.split("x")
            num_prompt, num_new = lengths.split("+")
            scenario = Scenario(int(batch), int(num_prompt), int(num_new))
        except ValueError:
            raise typer.BadParameter(f"{part!r} is not like 8x128+33", param_hint="--scenarios") from None
        if min(scenario.batch, scenario.num_prompt, scenario.num_new - 1) < 1:
            raise typer.BadParameter(f"{part!r} has no batch, prompt or second token", param_hint="--scenarios")
        if scenario.num_prompt + scenario.num_new > n_positions:
            raise typer.BadParameter(f"{part!r} exceeds the model's {n_positions} positions", param_hint="--scenarios")
        found.append(scenario)
    return found


def name_of(trace: Path | None) -> str:
    if trace is None:
        return "drawn"
    return f"{trace.name}, SHA-256 {hashlib.sha256(trace.read_bytes()).hexdigest()[:16]}"


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
