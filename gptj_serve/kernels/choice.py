"""Whether a stage runs on our kernels, and with operands of which type."""

import functools
import logging

import torch

from gptj_serve.config import Kernels, Quantization
from gptj_serve.errors import ConfigError
from gptj_serve.kernels.cpu_layers import ACTIVATIONS, BLOCK_SIZE
from gptj_serve.kernels.cpu_library import KernelsUnavailableError, cpu_features, cpu_library
from gptj_serve.kernels.gpu.availability import obstacle as gpu_obstacle
from gptj_serve.kernels.weights import OperandType
from gptj_serve.model.config import GPTJConfig

MAX_INT8_WIDTH = (2**31 - 1) // (255 * 127)

logger = logging.getLogger(__name__)


def choose_operand_type(
    config: GPTJConfig,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    quantization: Quantization,
    kernels: Kernels,
) -> OperandType | None:
    """None: PyTorch's kernels. Why, if that is not what was asked for, is one line in the log.

    Raises `ConfigError` if PyTorch's can't do it either.
    """
    if kernels == "torch":
        reason = "it is asked for by kernels: torch"
    elif device.type != "cpu":
        reason = f"not on {device.type}"
    else:
        reason = _obstacle(config, dtype, block_size, quantization)
        if not reason:
            if quantization == "int8":
                return OperandType.INT8
            return OperandType.FLOAT32 if dtype == torch.float32 else OperandType.BFLOAT16
        _log_once(f"the layers run on PyTorch's kernels, not on our own: {reason}")
    _refuse_quantized(quantization, reason)
    return None


def chooses_gpu_kernels(
    config: GPTJConfig, dtype: torch.dtype, device: torch.device, quantization: Quantization, kernels: Kernels
) -> bool:
    """Whether a stage on a GPU runs on our kernels. Log and errors as in `choose_operand_type`."""
    reason = "it is asked for by kernels: torch" if kernels == "torch" else gpu_obstacle(config, dtype, device)
    if not reason:
        return True
    if kernels == "auto":
        _log_once(f"the layers run on PyTorch's kernels, not on our own: {reason}")
    _refuse_quantized(quantization, reason)
    return False


def _refuse_quantized(quantization: Quantization, reason: str) -> None:
    if quantization != "none":
        raise ConfigError(f"quantization={quantization}: there are no kernels for it here: {reason}")


def _obstacle(config: GPTJConfig, dtype: torch.dtype, block_size: int, quantization: Quantization) -> str:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they have no {str(dtype).removeprefix('torch.')}"
    if block_size != BLOCK_SIZE:
        return f"their KV blocks have {BLOCK_SIZE} tokens, not {block_size}"
    if config.activation_function not in ACTIVATIONS:
        return f"they have no activation_function {config.activation_function}"
    if quantization == "int8" and "avx512_vnni" not in cpu_features():
        return "this CPU has no avx512_vnni"
    if quantization == "int8" and max(config.n_embd, config.inner_dim) > MAX_INT8_WIDTH:
        return f"their int8 sums hold {MAX_INT8_WIDTH} products, and the layers are wider"
    try:
        cpu_library()
    except KernelsUnavailableError as error:
        return str(error)
    return ""


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
