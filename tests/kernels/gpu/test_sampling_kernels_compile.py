"""The sampler's kernels as machine code for GPUs that need not be here: the interpreter takes what no compiler does."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gptj_serve.kernels.gpu import draw_kernels, narrowing_kernel
from gptj_serve.kernels.gpu.sampling import CHUNK_GROUPS, NUM_PIVOTS, NUM_WARPS, SEARCH_TILE

KERNELS = {"measure": draw_kernels.measure, "weigh": draw_kernels.weigh, "choose": draw_kernels.choose,
           "narrow": narrowing_kernel.narrow}
POINTERS = {"numbers": "*i64", "reals": "*fp64", "peaks": "*fp32", "sums": "*fp32", "warm_sums": "*fp32",
            "normalizers": "*fp32", "values": "*fp64"} | dict.fromkeys(
    ["best_ids", "maxima", "thresholds", "last_tied_ids", "best_groups", "candidates", "sampled"], "*i32")

def compiled(name, dtype, shift, capability, mode):
    kernel = KERNELS[name]
    constants = {"CHUNK_GROUPS": CHUNK_GROUPS, "PADDED_CHUNKS": 32, "SHIFT": shift, "DRAWS": mode > 0,
                 "NARROWS": mode > 1, "TILE": SEARCH_TILE, "NUM_PIVOTS": NUM_PIVOTS}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {key: "constexpr" if key in constants else {**POINTERS, "logits": dtype}.get(key, "i32")
                 for key in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, key in enumerate(kernel.arg_names)
               if signature[key].startswith("*") or key in ("stride", "width")}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": NUM_WARPS[name]})

capability = int(sys.argv[1])
found = {}
for dtype, shift in (("*fp32", 0), ("*bf16", 16), ("*fp16", 13)):
    for name, modes in {"measure": (0, 2), "weigh": (1, 2), "choose": (0, 1, 2), "narrow": (2,)}.items():
        for mode in modes:
            kernel = compiled(name, dtype, shift, capability, mode)
            found[f"{name} {dtype} {mode}"] = [len(kernel.asm["cubin"]), kernel.metadata.shared,
                                               "ld.global.v4" in kernel.asm["ptx"]]
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int):
    """Each also fits into any GPU's 48 KiB of shared memory, and what reads whole rows does so 16 bytes at a time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 24
    for name, (num_bytes, shared_bytes, is_wide) in found.items():
        assert num_bytes > 0
        assert shared_bytes <= 48 * 1024, name
        assert is_wide or name.startswith("choose"), name
