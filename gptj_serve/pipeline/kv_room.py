"""`KVRoom`: what a stage on a GPU has left for its KV cache; and how many blocks that makes for all stages.

Needs no torch: the engine's process counts the blocks, from what the stages tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gptj_serve.errors import DeviceMemoryError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class KVRoom:
    """Of one stage, in bytes, after it has done its largest microbatches with a small pool."""

    device: str  # its name
    total_bytes: int  # of the device
    budget_bytes: int  # what the stage and all else there may use of it: gpu_memory_utilization
    used_bytes: int  # without the KV cache: weights, context, graphs, the largest microbatch, other processes
    weight_bytes: int
    block_bytes: int  # of a KV block in all the stage's layers, and what computing with it takes

    @property
    def num_blocks(self) -> int:
        """That fit, beside the block of padding."""
        return max(0, (self.budget_bytes - self.used_bytes) // self.block_bytes - 1)

    def __str__(self) -> str:
        return (
            f"{self.device}: {_gib(self.weight_bytes)} of weights, {_gib(self.used_bytes - self.weight_bytes)} of all "
            f"else; in the {_gib(self.budget_bytes)} that may be used there is room for {self.num_blocks:,} KV blocks "
            f"of {self.block_bytes:,} bytes"
        )


@dataclass(frozen=True, slots=True)
class Knobs:
    """What decides how much memory a stage takes, for errors to name; as in `config.PipelineConfig`."""

    num_stages: int
    dtype: str
    quantization: str
    max_microbatch_tokens: int
    max_num_sequences: int
    num_kv_tokens: int | None = None
    gpu_memory_utilization: float = 0.9


def agreed_num_blocks(rooms: Sequence[KVRoom], block_size: int, max_sequence_tokens: int, knobs: Knobs) -> int:
    """As many KV blocks as every stage has room for.

    Raises `DeviceMemoryError` if they don't hold a sequence of full length.
    """
    index = min(range(len(rooms)), key=lambda index: rooms[index].num_blocks)
    room, needed = rooms[index], -(-max_sequence_tokens // block_size)
    if room.num_blocks >= needed:
        return room.num_blocks
    missing_bytes = (needed + 1) * room.block_bytes - (room.budget_bytes - room.used_bytes)
    raise DeviceMemoryError(
        f"stage {index} of {knobs.num_stages} on {room.device}: a KV cache of one sequence of n_positions="
        f"{max_sequence_tokens} needs {_gib((needed + 1) * room.block_bytes)}; of gpu_memory_utilization="
        f"{knobs.gpu_memory_utilization:g} of {_gib(room.total_bytes)} "
        f"{_gib(max(0, room.budget_bytes - room.used_bytes))} is left beside {_gib(room.weight_bytes)} of weights and "
        f"{_gib(room.used_bytes - room.weight_bytes)} of all else: {_gib(missing_bytes)} too little. {advice(knobs)}"
    )


def out_of_memory(what: str, needed_bytes: int | None, free_bytes: int, total_bytes: int, knobs: Knobs) -> str:
    """What an error says when a device had no more memory at start, while it was doing `what`."""
    needed = "" if needed_bytes is None else f"needs {_gib(needed_bytes)}; "
    return f"{what}: {needed}of {_gib(total_bytes)} {_gib(free_bytes)} were free. {advice(knobs)}"


def advice(knobs: Knobs) -> str:
    """What to change, with the values that it has now."""
    ways = []
    if knobs.num_kv_tokens is None:
        ways.append(f"raise gpu_memory_utilization={knobs.gpu_memory_utilization:g} if nothing else uses the GPU")
    else:
        ways.append(f"lower kv_cache.num_tokens={knobs.num_kv_tokens}, or leave it out: the pool then is what fits")
    ways.append(
        f"lower scheduler.max_microbatch_tokens={knobs.max_microbatch_tokens} or "
        f"scheduler.max_num_sequences={knobs.max_num_sequences}"
    )
    if knobs.dtype == "float32":
        ways.append("use dtype=auto instead of float32")
    elif knobs.quantization == "none":
        ways.append("use quantization=int8 or fp8 instead of none")
    ways.append(f"raise num_stages={knobs.num_stages}")
    return f"Under pipeline: {'; '.join(ways)}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
