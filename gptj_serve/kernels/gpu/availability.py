"""Whether `GPULayers` can run a stage. Importable without triton."""

import importlib.util

import torch

from gptj_serve.model.config import GPTJConfig

MAX_HEAD_DIM = 512
"""Beyond, a tile of queries and keys does not fit into shared memory."""


def obstacle(config: GPTJConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Why it can't; empty if it can."""
    if device.type != "cuda":
        return f"they are for CUDA devices, not for {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they have no {str(dtype).removeprefix('torch.')}"
    if config.head_dim > MAX_HEAD_DIM:
        return f"heads have at most {MAX_HEAD_DIM} dimensions, not {config.head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "they need compute capability 8.0 or more, and this device has {}.{}".format(*capability)
    return ""
