"""What a pipeline says when it is ready: what is served, on what, and how much fits."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptj_serve.config import ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadInfo

_TASKS = {"lm_head": "generation", "score": "classification", "qa_outputs": "question answering"}


def startup_lines(
    config: ServiceConfig,
    checkpoint: Checkpoint,
    heads: Mapping[str, HeadInfo],
    stages: Sequence[Mapping[str, Any]],
    blocks: KVBlocks,
    url: str,
) -> list[str]:
    """A line for each of the `stages`, described as `RayPipeline.descriptions` does it, and then: it is ready."""
    lines = [_stage_line(stage, index, len(stages)) for index, stage in enumerate(stages)]
    own = [task for head, task in _TASKS.items() if head in checkpoint.heads]
    named = [f"{name} ({info.kind.value})" for name, info in heads.items()]
    context, num_tokens = checkpoint.config.n_positions, blocks.num_blocks * blocks.block_size
    parts = [
        f"{config.served_name} is ready on {url}",
        ", ".join([*own, *named]),
        f"{len(stages)} stage(s) on {', '.join(sorted({str(stage['device']) for stage in stages}))}",
        f"KV cache of {num_tokens:,} tokens for sequences of at most {context:,}",
    ]
    return [*lines, "; ".join(parts)]


def _stage_line(stage: Mapping[str, Any], index: int, num_stages: int) -> str:
    first, end = stage["layers"]
    return (
        f"stage {index} of {num_stages} ready: layers {first} to {end - 1}, {stage['device']}, {stage['dtype']}, "
        f"{stage['kernels']} kernels, {stage['num_threads']} thread(s), {stage['weight_bytes'] / 1e6:.1f} MB weights, "
        f"{stage['kv_cache_bytes'] / 1e6:.1f} MB KV cache, process {stage['pid']} on {stage['node_ip']}"
    )
