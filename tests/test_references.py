"""docs/configuration.md and docs/http-api.md are what docs/generate.py writes."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GENERATOR = runpy.run_path(str(DOCS / "generate.py"))


@pytest.mark.parametrize("name", ["configuration.md", "http-api.md"])
def test_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == GENERATOR["documents"]()[name], "run: python docs/generate.py"


def test_every_field_of_the_configuration_is_described() -> None:
    rows = [line for line in GENERATOR["configuration_reference"]().splitlines() if line.startswith("| `")]
    assert len(rows) > 25
    assert [row for row in rows if row.endswith("|  |")] == []
