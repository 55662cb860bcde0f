"""What is known of GPUs without having one: data sheets, and what a stage takes of one besides weights and KV cache.

By arithmetic over shapes, for `planner`. Needs no torch. A stage that has a GPU measures (`pipeline.memory_trial`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.gpu.buckets import DecodeBuckets

GIB, MIB = 2**30, 2**20

Capability = tuple[int, int]
"""CUDA's compute capability: major and minor."""

BFLOAT16_CAPABILITY: Capability = (8, 0)
"""From which on tensor cores multiply bfloat16 (CUDA C++ programming guide, table of compute capabilities)."""

FP8_CAPABILITY: Capability = (8, 9)
"""From which on they multiply fp8."""

KERNEL_CAPABILITY: Capability = (8, 0)
"""From which on our kernels run, which int8 needs."""

ASSUMED_CAPABILITY: Capability = (9, 0)
"""Of a GPU that nobody has asked yet."""


@dataclass(frozen=True, slots=True)
class GPU:
    """A card. Sizes in bytes are about what PyTorch reports as total capacity, without what ECC and firmware keep; they
    differ by some tenths of a GiB between drivers, and none was read off a card here. Bandwidth and capability are
    NVIDIA's, from the card's data sheet and from developer.nvidia.com/cuda-gpus."""

    memory_bytes: int
    bandwidth_bytes_s: float
    capability: Capability


GPUS: Mapping[str, GPU] = {
    "t4": GPU(int(14.6 * GIB), 320e9, (7, 5)),
    "v100-16gb": GPU(int(15.8 * GIB), 900e9, (7, 0)),
    "a10g": GPU(int(22.0 * GIB), 600e9, (8, 6)),
    "a100-40gb": GPU(int(39.4 * GIB), 1555e9, (8, 0)),
    "a100-80gb": GPU(int(79.1 * GIB), 2039e9, (8, 0)),
    "l4": GPU(int(22.0 * GIB), 300e9, (8, 9)),
    "l40s": GPU(int(44.4 * GIB), 864e9, (8, 9)),
    "h100": GPU(int(79.1 * GIB), 3350e9, (9, 0)),  # SXM
    "h200": GPU(int(139.8 * GIB), 4800e9, (9, 0)),
}
"""By the names that `gptj-serve plan --device` takes."""

CONTEXT_BYTES = 512 * MIB
"""CUDA's context and the kernels that a process loads. Not measured yet."""

WORKSPACE_BYTES = 2 * 32 * MIB
"""Of cuBLAS, for two streams: what torch takes for each on Hopper, and 8 MiB before it (CUDABlas.cpp). Not measured."""

GRAPH_BYTES_PER_LAYER = 192 << 10
"""Of a captured graph, for each of its layers: nodes, their arguments, what the driver keeps. Not measured yet."""

LOGIT_BYTES = 28
"""Of each logit of a step, at most: as computed, in fp32, sorted with their ids, probabilities and their sums. Not
measured yet."""


def missing_capability(quantization: str, capability: Capability) -> str | None:
    """What a GPU lacks for the quantization; None if nothing."""
    needed = {"int8": KERNEL_CAPABILITY, "fp8": FP8_CAPABILITY}.get(quantization, (0, 0))
    if capability >= needed:
        return None
    return f"has compute capability {_dotted(capability)}, and {quantization} needs {_dotted(needed)}"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


class Overhead(NamedTuple):
    """Bytes of one stage, besides weights and KV cache."""

    context: int
    workspace: int
    graphs: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Of the largest microbatches; as in `config.SchedulerConfig`."""

    max_microbatch_tokens: int = 512
    max_num_sequences: int = 256


DEFAULT_STEP_LIMITS = StepLimits()


def overhead(
    config: GPTJConfig, span: range, limits: StepLimits, block_size: int, width: int, *, restores_weights: bool
) -> Overhead:
    """Of a stage with the layers `span` and numbers of `width` bytes.

    `restores_weights`: products of many rows have a weight back in full width, for as long as they take.
    """
    inner, dim = config.inner_dim, config.n_embd
    # of a token: the inward product, the operands of the outward one, normed and hidden states, what was and is to come
    activations = limits.max_microbatch_tokens * (8 * dim + 2 * inner) * width
    if restores_weights:
        activations += max(3 * dim + inner, config.vocab_size if span.stop == config.n_layer else 0) * dim * width
    logits = 0
    if span.stop == config.n_layer:
        logits = limits.max_num_sequences * config.vocab_size * LOGIT_BYTES
    buckets = DecodeBuckets(limits.max_num_sequences, -(-config.n_positions // block_size))
    num_graphs = len(buckets.largest_first())
    graphs = num_graphs * len(span) * GRAPH_BYTES_PER_LAYER
    return Overhead(CONTEXT_BYTES, WORKSPACE_BYTES, graphs, activations, logits)
