"""LayerNorm and the sum before it, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from gptj_serve.kernels.gpu.norm import add, add_and_norm, norm

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "width", "tile"), [(1, 4096, 1024), (7, 48, 256), (3, 100, 1 << 14), (5, 64, 64)]
)
def test_norm_and_sum(num_tokens: int, width: int, tile: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(width)
    hidden, addend, weight, bias, addend_bias = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((num_tokens, width), (num_tokens, 2 * width), (width,), (width,), (width,))
    )
    hidden += 10  # the mean matters
    apart = addend[:, :width]
    total = (hidden.float() + apart.float() + addend_bias.float()).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]

    def assert_normed(out: torch.Tensor, x: torch.Tensor) -> None:
        expected = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), EPS)
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)

    out, stream = torch.empty_like(hidden), torch.empty_like(hidden)
    norm(hidden, weight, bias, EPS, out, tile)
    assert_normed(out, hidden)
    add_and_norm(hidden, apart, addend_bias, stream, weight, bias, EPS, out, tile)
    assert torch.equal(stream, total)
    assert_normed(out, total)
    add(hidden, apart, addend_bias, hidden, tile)  # in place
    assert torch.equal(hidden, total)
