"""What the interpreter takes and the compiler refuses: the kernels of 6B's layers become machine code, GPU or not."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

Kernel = dict[str, int | str]

ATTENTION = {"_attend_chunks", "_attend_tokens", "_join_splits"}
KERNELS = {"_add_and_norm", "_finish_inward", *ATTENTION}


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """In a process of its own, since in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.compiled"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture
def compiled(printed: dict[str, Any]) -> list[Kernel]:
    return printed["kernels"]


@pytest.mark.timeout(300)
def test_all_kernels_compile_for_each_architecture(compiled: list[Kernel]) -> None:
    found = defaultdict(set)
    for kernel in compiled:
        found[kernel["architecture"], kernel["dtype"], kernel["head_dim"]].add(kernel["name"])
    assert len(found) == 8
    for (_, _, head_dim), names in found.items():  # each is compiled once, whatever it is wanted for
        assert names == KERNELS if head_dim == 256 else names >= ATTENTION


def test_they_fit(compiled: list[Kernel]) -> None:
    """No register lives in memory, with heads like 6B's. That shared memory suffices is what the driver has checked."""
    assert [kernel for kernel in compiled if kernel["stack_bytes"] and kernel["head_dim"] == 256] == []


def test_products_are_on_tensor_cores_except_those_of_float32(compiled: list[Kernel]) -> None:
    for kernel in compiled:
        has_products = kernel["name"] in ("_attend_chunks", "_attend_tokens") and kernel["dtype"] != "float32"
        assert kernel["has_tensor_core_products"] == has_products, kernel


def test_they_load_16_bytes_at_a_time(compiled: list[Kernel]) -> None:
    assert [kernel for kernel in compiled if not kernel["has_wide_loads"]] == []


def test_a_step_of_another_size_waits_for_no_compiler(printed: dict[str, Any]) -> None:
    assert printed["compiled_later"] == []
