"""The lines at the start."""

import dataclasses
from pathlib import Path

from gptj_serve.config import ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadInfo, HeadKind
from gptj_serve.serving.startup import startup_lines

STAGES = [
    {
        "layers": [3 * index, 3 * index + 3], "device": "cpu", "dtype": "float32",
        "kernels": "avx512-int8", "num_threads": 2,
        "weight_bytes": 1_500_000, "kv_cache_bytes": 2_500_000, "pid": 10 + index, "node_ip": f"10.0.0.{index}",
    }
    for index in range(2)
]  # fmt: skip


def test_what_is_served_where(demo: Path) -> None:
    classifier = {"labels": ["a", "b"], "problem_type": "single_label_classification"}
    heads = {"tone": HeadInfo(kind=HeadKind.CLASSIFIER, name="tone", backbone="-", **classifier)}
    blocks = KVBlocks(512, 16)
    lines = startup_lines(ServiceConfig(), Checkpoint.open(demo), heads, STAGES, blocks, "http://127.0.0.1:8000")
    assert lines == [
        "stage 0 of 2 ready: layers 0 to 2, cpu, float32, avx512-int8 kernels, 2 thread(s), 1.5 MB weights, "
        "2.5 MB KV cache, process 10 on 10.0.0.0",
        "stage 1 of 2 ready: layers 3 to 5, cpu, float32, avx512-int8 kernels, 2 thread(s), 1.5 MB weights, "
        "2.5 MB KV cache, process 11 on 10.0.0.1",
        "gptj-demo is ready on http://127.0.0.1:8000; generation, classification, question answering, "
        "tone (classifier); 2 stage(s) on cpu; KV cache of 8,192 tokens for sequences of at most 1,024",
    ]


def test_only_the_tasks_that_the_checkpoint_has_heads_for(demo: Path) -> None:
    checkpoint = Checkpoint.open(demo)
    tensors = {name: info for name, info in checkpoint.tensors.items() if not name.startswith(("score", "lm_head"))}
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    last = startup_lines(ServiceConfig(), checkpoint, {}, STAGES, KVBlocks(4, 16), "http://h")[-1]
    assert "; question answering; " in last
