"""`remedies`: what to change where a plan does not fit."""

from dataclasses import replace
from math import ceil
from typing import Any

from gptj_serve.gpus import missing_capability
from gptj_serve.planner import DTYPE_BYTES, Model, Resources, plan, resolve_dtype


def remedies(model: Model, resources: Resources, context: int) -> list[str]:
    """Changes that would each, alone, make a plan fit that doesn't; fewer bytes and more stages together if neither is
    enough."""

    def fits(**changes: Any) -> bool:
        return plan(model, replace(resources, **changes), context).fits

    def fewest_stages(**changes: Any) -> int | None:
        num_layers = model.config.n_layer
        numbers = range(resources.num_stages + 1, num_layers + 1)
        return next((n for n in numbers if fits(num_stages=n, **changes)), None)

    pool = ""
    if resources.num_kv_tokens is not None and resources.num_kv_tokens < context:
        pool = f" --kv-tokens {context}"
        resources = replace(resources, num_kv_tokens=context)
        if plan(model, resources, context).fits:
            return [f"a KV pool that holds one sequence:{pool}"]
    found = []
    half, advice = _half(resources)
    if half is not None and fits(dtype=half):
        found.append(f"fewer bytes per weight: {advice}")
    if (num_stages := fewest_stages()) is not None:
        found.append(f"more stages: --stages {num_stages}")
    if not found and half is not None and (num_stages := fewest_stages(dtype=half)) is not None:
        found.append(f"fewer bytes per weight and more stages: --dtype {half} --stages {num_stages}")
    is_half = DTYPE_BYTES[resources.dtype] == 2
    has_kernels = resources.capability is not None and missing_capability("int8", resources.capability) is None
    if resources.quantization == "none" and is_half and has_kernels and fits(quantization="int8"):
        found.append("fewer bytes per weight: --quantization int8")
    room = min((stage.num_kv_tokens or 0) for stage in plan(model, resources, context).stages)
    if resources.num_kv_tokens is not None and room >= context:
        found.append(f"less KV: --kv-tokens {room}")
    elif 0 < room < context and resources.num_kv_tokens is None:
        found.append(f"less KV: --context {room}")
    found.append(f"more memory per device: --device-memory-gib {_memory_that_fits(model, resources, context):.1f}")
    return [change + pool for change in found]


def _half(resources: Resources) -> tuple[str | None, str]:
    """The dtype of half the bytes, if there is one, and how to say that."""
    if DTYPE_BYTES[resources.dtype] == 2:
        return None, ""
    if resources.capability is not None:
        half = resolve_dtype("auto", [resources.capability])
        return half, f"--dtype {half}"
    if resources.quantization == "int8":
        return "bfloat16", "--dtype bfloat16"
    return "float16", "--dtype float16 (or bfloat16)"


def _memory_that_fits(model: Model, resources: Resources, context: int) -> float:
    """GiB per device, up to the next tenth."""
    block_size = resources.block_size
    num_blocks = -(-max(context, resources.num_kv_tokens or 0) // block_size) + 1
    needed = max(
        stage.fixed_bytes + num_blocks * block_size * stage.kv_bytes_per_token
        for stage in plan(model, resources, context).stages
    )
    return ceil(needed / resources.memory_utilization / 2**30 * 10 + 1e-6) / 10
