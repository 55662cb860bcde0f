"""What computes as the service's stages do has their environment, before it loads torch and OpenMP with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WATCHED = """
import os, sys

class AtTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("at torch:", os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()

sys.meta_path.insert(0, AtTorch())
"""


@pytest.mark.parametrize(
    "code",
    [
        "from gptj_serve.cli import main; main(['profile'])",
        "from gptj_serve.cli import main; main(['bench'])",
        "import benchmarks.engine",
        "import benchmarks.simulation_check",
    ],
)
@pytest.mark.parametrize(
    ("wait_policy", "seen"), [({}, "1000 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")], ids=["", "told"]
)
def test_threads_sleep_before_torch_is_loaded(code: str, wait_policy: dict[str, str], seen: str, tmp_path: Path):
    root = Path(__file__).parents[1]
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = kept | {"PYTHONPATH": str(root)} | wait_policy
    run = subprocess.run(
        [sys.executable, "-c", WATCHED + code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.stdout == f"at torch: {seen}\n", run.stderr
