"""`GPULinear` against the layers that it stands for, and its Triton kernels against it.

Without a GPU the kernels run in Triton's interpreter, which is wrong where rounding to fp8 carries over to the
exponent, for subnormal numbers, and for bfloat16 made of int8. That they compile for GPUs is seen in a process without
it.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptj_serve.errors import ConfigError
from gptj_serve.gpus import FP8_CAPABILITY
from gptj_serve.kernels.gpu.linear import MAX_FEW_ROWS, GPULinear, LinearKind, quantized
from gptj_serve.pipeline.gpu.cuda_device import CUDADevice

HALF_STEP = {"int8": 0.5 / 127, "fp8": 1 / 16}
"""The most that rounding moves a weight, of the largest of its output in int8, of itself in fp8."""


NOT_INTERPRETED = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter is wrong there")


def random_linears(width: int, sizes: Sequence[int], seed: int = 0, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(width, size, bias=bias).requires_grad_(False) for size in sizes]


def restored(linear: GPULinear) -> Tensor:
    """Its weights [N, K] in fp32."""
    return (linear.weight.float() * linear.scale[:, None])[: linear.num_outputs]


def require_types(device: torch.device, kind: LinearKind) -> None:
    if kind == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        pytest.skip("this GPU has no fp8")


@pytest.mark.parametrize("kind", ["native", "int8", "fp8"])
@pytest.mark.parametrize("sizes", [(48,), (32, 20, 7)])
def test_it_gives_the_layers_outputs_side_by_side(kind: LinearKind, sizes: tuple[int, ...]) -> None:
    linears = random_linears(64, sizes)
    x = torch.randn(5, 64)
    expected = torch.cat([linear(x) for linear in linears], dim=1)
    out = GPULinear(linears, kind)(x)
    assert out.dtype == x.dtype
    tolerance = {"native": 1e-6, "int8": 0.01, "fp8": 0.1}[kind]
    assert (out - expected).abs().max() < tolerance
    if kind != "native":
        assert not torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["native", "int8", "fp8"])
def test_layers_with_and_without_a_bias_together(kind: LinearKind) -> None:
    linears = [*random_linears(32, (16,), bias=False), *random_linears(32, (16,), seed=1)]
    out = GPULinear(linears, kind)(torch.zeros(2, 32))
    expected = torch.cat([torch.zeros(16), linears[1].bias]).expand(2, -1)
    torch.testing.assert_close(out, expected, atol=1e-3 if kind == "fp8" else 0, rtol=0)  # fp8's outputs are bfloat16


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_weights_are_rounded_to_the_nearest(kind: LinearKind, seed: int) -> None:
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    rounded, scale = quantized(weight, kind)
    error = (rounded.float() * scale[:, None] - weight).abs()
    largest = weight.abs().amax(dim=1, keepdim=True)
    if kind == "int8":
        assert (error <= largest * HALF_STEP["int8"] * 1.001).all()
    else:
        assert (error <= torch.maximum(weight.abs() * HALF_STEP["fp8"], largest / 448 * 2**-10) * 1.001).all()
    assert not rounded[0].float().any()


def test_bytes_are_a_quarter_of_float32s_and_a_scale() -> None:
    (linear,) = random_linears(64, (48,))
    assert GPULinear([linear]).num_bytes == 4 * (48 * 64 + 48)
    assert GPULinear([linear], "fp8").num_bytes == 48 * 64 + 4 * 48 + 4 * 48


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["native", "int8", "fp8"])
def test_what_is_not_finite_is_seen_in_its_own_row(kind: LinearKind, wrong: float) -> None:
    x = torch.randn(3, 32)
    x[1, 4] = wrong
    out = GPULinear(random_linears(32, (16,)), kind)(x)
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]


def test_fp8_refuses_a_width_that_the_cores_have_not() -> None:
    with pytest.raises(ConfigError, match="multiple of 16, not 40"):
        GPULinear(random_linears(40, (16,)), "fp8")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("int8", torch.float32),
        ("int8", torch.float16),
        pytest.param("int8", torch.bfloat16, marks=NOT_INTERPRETED),
        ("fp8", torch.float32),
        ("fp8", torch.float16),
        ("fp8", torch.bfloat16),
    ],
)
@given(
    num_rows=st.integers(1, 70), width=st.integers(1, 20), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    bias=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_the_kernel_multiplies_with_the_rounded_weights(
    device: torch.device,
    kind: LinearKind,
    dtype: torch.dtype,
    num_rows: int,
    width: int,
    sizes: list[int],
    bias: bool,
    seed: int,
) -> None:
    """Which for int8 is also what the path for many rows does."""
    pytest.importorskip("triton")
    from gptj_serve.kernels.gpu.linear_kernels import product

    require_types(device, kind)
    linears = [linear.to(device, dtype) for linear in random_linears(16 * width, sizes, seed, bias)]
    linear = GPULinear(linears, kind)
    x = torch.randn(num_rows, 16 * width, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    out = product(x, linear.weight, linear.scale, linear.bias, linear.num_outputs)
    expected = x.float() @ restored(linear).T
    if linear.bias is not None:
        expected += linear.bias[: linear.num_outputs].float()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    if kind == "int8":
        torch.testing.assert_close(out, linear(x), atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_that_rounds_rows(device: torch.device, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from gptj_serve.kernels.gpu.linear_kernels import round_rows

    require_types(device, "fp8")
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x[2] = 0
    x[3, 7], x[4, 7] = torch.nan, torch.inf
    rounded, scale = round_rows(x)
    assert rounded.dtype == torch.float8_e4m3fn
    sound = [0, 1, 2, 5]
    torch.testing.assert_close(scale[sound][:, 0], (x[sound].float().abs().amax(dim=1) / 448).clamp_min(1e-30))
    assert scale[[3, 4]].isnan().all()
    scaled = x[sound].float() / scale[sound]
    expected = scaled.to(torch.float8_e4m3fn).float()
    is_right = torch.ones_like(expected, dtype=torch.bool)
    if device.type == "cpu":
        is_right = (expected.abs() >= 2**-6) & (expected.frexp().mantissa.abs() > 0.5)
    assert is_right.sum() > 400
    error = (rounded[sound].float() - expected).abs()[is_right]
    assert (error <= (expected.abs()[is_right] / 8).clamp_min(2**-9)).all()  # a step, where the last bit differs
    assert not rounded[2].float().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the paths for many rows have other kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_on_a_gpu_all_numbers_of_rows_give_the_products_of_the_rounded_weights(
    device: torch.device, kind: LinearKind, bias: bool, dtype: torch.dtype
) -> None:
    """Launched one by one, and from a graph that reads other inputs than those it was captured with."""
    require_types(device, kind)
    linears = [linear.to(device, dtype) for linear in random_linears(256, (100, 77), bias=bias)]
    linear = GPULinear(linears, kind)
    stream = CUDADevice(device).stream()
    for num_rows in (1, 3, 16, 17, 64, 257):
        x = torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(num_rows)).to(device, dtype)
        expected = x.float() @ restored(linear).T
        if linear.bias is not None:
            expected += linear.bias[: linear.num_outputs].float()
        captured_x, out = torch.zeros_like(x), torch.zeros_like(expected, dtype=dtype)
        torch.cuda.synchronize()
        graph = stream.capture(partial(put_product, linear, captured_x, out))
        stream.copy(captured_x, x)
        graph.replay()
        stream.record().wait()
        # from 17 rows on fp8 rounds the inputs too, by up to 1/16 of each: that much moves a sum of 256 products
        rounds_inputs = kind == "fp8" and num_rows > MAX_FEW_ROWS["fp8"]
        tolerance = 0.1 if rounds_inputs else {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        for found in (linear(x), out):
            assert found.shape == (num_rows, 177)
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def put_product(linear: GPULinear, x: Tensor, out: Tensor) -> None:
    out.copy_(linear(x))


COMPILE = """
import itertools
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gptj_serve.kernels.gpu import linear_kernels as kernels

def compiled(kernel, capability, arguments, constants, **options):
    signature = arguments | dict.fromkeys(constants, "constexpr")
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(len(arguments)) if "num_rows" != list(arguments)[n]}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

unspecialized = [parameter.name for parameter in kernels.product_kernel.params if parameter.do_not_specialize]
assert unspecialized == ["num_rows"], unspecialized  # or a step of 1 row, or of 16, would wait for the compiler
types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
for capability, weight, x, num_rows in itertools.product((80, 89, 90), ("i8", "fp8e4nv"), types, (1, 64)):
    if weight == "fp8e4nv" and capability < 89 or x == "fp32" and capability != 89:
        continue
    arguments = dict(x_ptr="*" + x, weight_ptr="*" + weight, scale_ptr="*fp32", bias_ptr="*" + x, out_ptr="*" + x)
    arguments |= dict.fromkeys(("num_rows", "num_outputs", "width"), "i32")
    constants = dict(kernels.product_blocks(num_rows, 16384), HAS_BIAS=True)
    options = dict(num_warps=4, num_stages=kernels.num_product_stages(types[x]))
    made = compiled(kernels.product_kernel, capability, arguments, constants, **options)
    print(capability, weight, x, num_rows, len(made.asm["cubin"]), made.metadata.shared)
for capability in (89, 90):
    arguments = dict(x_ptr="*bf16", rounded_ptr="*fp8e4nv", scale_ptr="*fp32", width="i32")
    constants = dict(FP8_MAX=448.0, SMALLEST=1e-30, BLOCK_K=32768)
    num_warps = kernels.num_warps_of_a_row(20480)
    made = compiled(kernels.round_rows_kernel, capability, arguments, constants, num_warps=num_warps)
    print(capability, "fp8e4nv", "bf16", "all", len(made.asm["cubin"]), made.metadata.shared)
"""

SMALLEST_SHARED_MEMORY = 99 << 10
"""Of a block on these GPUs, in bytes: that of compute capability 8.6 and 8.9 (CUDA C programming guide)."""


def test_the_kernels_compile_for_the_gpus_that_have_the_types() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=110, env=environment
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line.split() for line in process.stdout.splitlines()]
    assert len(lines) == 4 + 12 + 8 + 2
    for *_, cubin_bytes, shared_bytes in lines:
        assert int(cubin_bytes) > 0
        assert int(shared_bytes) <= SMALLEST_SHARED_MEMORY
