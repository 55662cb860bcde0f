"""The code blocks of README.md and docs/, and how each is run as its reader would."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.serving.service import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# `--fail-with-body` makes an error answer a failure, which a reader would see too.
PREAMBLE = 'set -euo pipefail\ncurl() { command curl --silent --show-error --fail-with-body "$@"; echo; }\n'


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its fence, 1-based."""

    document: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def run(self, directory: Path, substitutions: dict[str, str]) -> str:
        """What it prints, run in `directory` by bash or Python; an assertion fails if it fails."""
        code = self.code
        for written, meant in substitutions.items():
            code = code.replace(written, meant)
        interpreter = {"sh": ["bash", "-c", PREAMBLE + code], "python": [sys.executable, "-c", code]}[self.language]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        process = subprocess.run(
            interpreter, cwd=directory, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=100
        )
        assert process.returncode == 0, f"{self} failed:\n{process.stdout}\n{process.stderr}"
        return process.stdout


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    name = str(document.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
