"""How many threads a stage computes with, wherever it runs. Needs no torch."""

import os


def num_usable_cores() -> int:
    """Those that this process may run on; a container or `taskset` may leave it fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def threads_per_stage(num_stages: int, num_threads: int | None = None) -> int:
    """As `pipeline.stage.num_threads` says; without it the stages of a machine share its cores."""
    return num_threads or max(1, num_usable_cores() // num_stages)
