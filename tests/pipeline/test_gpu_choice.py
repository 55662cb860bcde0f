"""Whether a stage on a GPU runs on our kernels, and who says so if not."""

import logging

import pytest
import torch

from gptj_serve.errors import ConfigError
from gptj_serve.kernels import choice
from gptj_serve.kernels.choice import chooses_gpu_kernels
from gptj_serve.model.config import GPTJConfig

CPU = torch.device("cpu")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="gptj_serve"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_what_was_asked_for_needs_no_line(lines) -> None:
    assert not chooses_gpu_kernels(GPTJConfig(), torch.bfloat16, CPU, "none", "torch")
    assert lines() == []


def test_what_stands_in_the_way_is_said_once(lines) -> None:
    for _ in range(2):
        assert not chooses_gpu_kernels(GPTJConfig(), torch.bfloat16, CPU, "none", "auto")
    (line,) = lines()
    assert line.startswith("the layers run on PyTorch's kernels, not on our own: ")
    assert "cpu" in line


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_pytorchs_kernels_have_no_quantized_weights(quantization) -> None:
    with pytest.raises(ConfigError, match=f"quantization={quantization}: there are no kernels for it here: .*cpu"):
        chooses_gpu_kernels(GPTJConfig(), torch.bfloat16, CPU, quantization, "auto")
