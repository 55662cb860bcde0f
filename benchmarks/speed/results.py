"""What a run found: facts and rows, as JSON, and what the rows' figures are called.

A figure measured several times is a `Spread`, another one a float; a row says with `KEYS` what it is of, so that two
runs can be compared.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

KEYS = ("scenario", "contestant", "max_batch", "rate", "kind", "num_stages", "streams")


class Spread(NamedTuple):
    median: float
    min: float
    max: float


Row = dict[str, Any]


def spread(values: Iterable[float]) -> Spread:
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found))


@dataclass(slots=True)
class Results:
    options: dict[str, Any] = field(default_factory=dict)
    """Of the command, as far as figures depend on them: without those, they can't be compared."""

    machine: dict[str, Any] = field(default_factory=dict)
    contestants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each said of itself when it had loaded."""

    left_out: dict[str, str] = field(default_factory=dict)
    """What was not measured, and why."""

    groups: dict[str, list[Row]] = field(default_factory=dict)
    """Rows by group: engine, load, pipeline, service."""

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Results":
        results = cls(**json.loads(file.read_text()))
        for rows in results.groups.values():
            for row in rows:
                row |= {name: Spread(*value) for name, value in row.items() if isinstance(value, list)}
        return results


def ratios(results: Results, earlier: Results) -> list[Row]:
    """This run's medians by those of the earlier one, for each figure of each row that both have."""
    rows_before = {(group, key(row)): row for group, rows in earlier.groups.items() for row in rows}
    found = []
    for group, rows in results.groups.items():
        for row in rows:
            other = rows_before.get((group, key(row)), {})
            figures, before = _figures(row), _figures(other)
            compared = {name: value / before[name] for name, value in figures.items() if before.get(name)}
            if compared:
                found.append({"group": group, **dict(key(row)), "ratios": compared})
    return found


def _figures(row: Row) -> dict[str, float]:
    """Medians of those that were measured several times."""
    return {
        name: value.median if isinstance(value, Spread) else value
        for name, value in row.items()
        if name not in KEYS and isinstance(value, Spread | float)
    }


def key(row: Row) -> tuple[tuple[str, Any], ...]:
    return tuple((name, row[name]) for name in KEYS if name in row)
