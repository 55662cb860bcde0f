"""What is known of a stage: what it holds, and how much memory its process has taken."""

import os
from typing import Any

import psutil
import torch

from gptj_serve.pipeline.stage_runner import StageRunner


def describe_stage(runner: StageRunner) -> dict[str, Any]:
    """The fields of `api.status.StageStatus` that stay as they are."""
    spec = runner.spec
    return {
        "layers": [spec.span.start, spec.span.stop],
        "device": str(spec.device),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "kernels": runner.kernels,
        "num_threads": torch.get_num_threads(),
        "weight_bytes": runner.weight_bytes,
        "kv_cache_bytes": runner.kv_cache_bytes,
        "pid": os.getpid(),
    }


def gpu_uuid(device: torch.device) -> str | None:
    """The same in every process, however it numbers its devices; None of a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def memory_bytes(device: torch.device) -> int:
    """Resident memory of this process; for a GPU what torch has reserved on it."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)
