"""The sampler's kernels become machine code, GPU or not: the interpreter takes what no compiler does."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

pytest.importorskip("triton")

Kernel = dict[str, int | str]


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    """In a process of its own, since in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.compiled_sampling"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(300)
def test_a_mode_needs_no_more_kernels_for_another_number_of_rows(compiled: list[Kernel]) -> None:
    counts = defaultdict(Counter)
    for kernel in compiled:
        counts[kernel["architecture"], kernel["dtype"]][kernel["name"]] += 1
    assert {architecture for architecture, _ in counts} == {80, 86, 90}
    assert {dtype for _, dtype in counts} == {"bfloat16", "float16", "float32"}
    assert all(of_each == {"measure": 2, "narrow": 1, "weigh": 2, "choose": 3} for of_each in counts.values())


def test_no_more_than_some_words_are_in_memory_instead_of_registers(compiled: list[Kernel]) -> None:
    assert [kernel for kernel in compiled if kernel["stack_bytes"] > 64] == []


def test_whole_rows_are_loaded_16_bytes_at_a_time(compiled: list[Kernel]) -> None:
    assert [kernel for kernel in compiled if not kernel["has_wide_loads"] and kernel["name"] != "choose"] == []
