"""What `GET /status` answers of pipelines that are not there: with steps that a scheduler could have made."""

from typing import Any

from gptj_serve.api.status import PipelineStatus, StageStatus, Status, StepSpan

NOW = 1_790_000_000.0
MIB = 1 << 20


def status(*pipelines: PipelineStatus, **changes: Any) -> Status:
    values: Any = {
        "model": "gptj-6b",
        "version": "0.1.0",
        "uptime_s": 15_480.0,
        "tasks": ["generate", "classify", "qa"],
        "heads": {"default": "classifier", "tone": "classifier", "reader": "qa"},
        "max_model_len": 2048,
        "ingress": {"num_requests": 12, "max_requests": 1024},
        "pipelines": list(pipelines),
        "scaling": None,
        "problems": [],
    }
    return values | changes


def pipeline(durations_s: list[float], replica_id: str = "x7k2p9qd", *, is_ready: bool = True) -> PipelineStatus:
    """A stage for each duration, which is what it takes for a microbatch of decoding; as many are in flight."""
    steps = schedule(durations_s, num_microbatches=160)
    return {
        "replica_id": replica_id,
        "is_ready": is_ready,
        "now": NOW if is_ready else NOW + 6.2,
        "tokens_per_s": 212.4 if is_ready else 0.0,
        "stages": [stage(index, durations_s, steps[index], is_ready) for index in range(len(durations_s))],
        "engine": {
            "num_running": 14,
            "num_waiting": 0 if is_ready else 9,
            "queue_wait_s": 0.0,
            "num_microbatches_in_flight": len(durations_s) if is_ready else 0,
            "num_kv_blocks": 1024,
            "num_kv_blocks_used": 381,
            "num_preemptions": 0,
            "num_tokens_generated": 48_120,
            "num_recoveries": 0 if is_ready else 1,
        },
    }


def stage(index: int, durations_s: list[float], steps: list[StepSpan], is_ready: bool) -> StageStatus:
    num_layers = 28 // len(durations_s)
    return {
        "stage_index": index,
        "layers": [index * num_layers, (index + 1) * num_layers],
        "device": "cuda:0",
        "dtype": "float16",
        "kernels": "torch",
        "num_threads": 4,
        "pid": 4100 + index,
        "node_ip": f"10.0.0.{index + 1}",
        "weight_bytes": 4070 * MIB,
        "kv_cache_bytes": 2390 * MIB,
        "memory_bytes": 6884 * MIB,
        "num_restarts": 0 if is_ready or index else 1,
        "busy_ratio": durations_s[index] / max(durations_s) if is_ready else 0.0,
        "handoff": "shared_memory" if index else None,
        "handoff_s": (0.00021, 0.00034, 0.0029)[index % 3] if index else 0.00012,
        "steps": steps[-64:],
    }


def schedule(durations_s: list[float], num_microbatches: int) -> list[list[StepSpan]]:
    """Per stage its steps, the last one ending at `NOW`; every eighth microbatch has a chunk of a prompt in it."""
    num_stages = len(durations_s)
    free_s, left_s = [0.0] * num_stages, [0.0] * num_microbatches
    steps: list[list[StepSpan]] = [[] for _ in durations_s]
    for number in range(num_microbatches):
        ready_s = left_s[number - num_stages] if number >= num_stages else 0.0
        for index, usual_s in enumerate(durations_s):
            duration_s = usual_s * (2.2 if number % 8 == 0 else 1.0 + 0.03 * (number % 3))
            start_s = max(ready_s, free_s[index])
            ready_s = free_s[index] = start_s + duration_s
            num_tokens = 132 if number % 8 == 0 else 4
            steps[index].append(
                {
                    "microbatch_id": 9000 + number,
                    "started_at": start_s,
                    "duration_s": duration_s,
                    "num_rows": 5 if number % 8 == 0 else 4,
                    "num_tokens": num_tokens,
                }
            )
        left_s[number] = ready_s
    shift_s = NOW - max(free_s)
    for step in (step for of_stage in steps for step in of_stage):
        step["started_at"] += shift_s
    return steps
