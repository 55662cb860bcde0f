"""`plan`: what a pipeline needs and what fits, by arithmetic over shapes alone. Needs no weights and no torch.

`gptj-serve plan` prints it; the service takes its partition and its KV pool from it (`plan_service`), so what is
printed is what runs. Bytes are bytes, a GiB is 2**30 of them; bandwidth is in bytes per second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from gptj_serve.config import PipelineConfig
from gptj_serve.errors import ConfigError
from gptj_serve.gpus import (
    ASSUMED_CAPABILITY,
    BFLOAT16_CAPABILITY,
    DEFAULT_STEP_LIMITS,
    Capability,
    Overhead,
    StepLimits,
    missing_capability,
    overhead,
)
from gptj_serve.model.checkpoint import Checkpoint, backbone_shapes, head_shapes
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.partition import head_cost, partition

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZATIONS = ("none", "int8", "fp8")
DEFAULT_KV_SEQUENCES = 8
"""The KV pool's default capacity where no memory is given, in sequences of full length."""

NAMED_CONFIGS = {"gpt-j-6b": GPTJConfig()}


@dataclass(frozen=True, slots=True)
class Model:
    """What is to be served."""

    config: GPTJConfig
    heads: tuple[str, ...] = ("lm_head",)

    @property
    def num_parameters(self) -> int:
        return sum(map(prod, self.shapes(range(self.config.n_layer)).values()))

    def shapes(self, span: range) -> dict[str, tuple[int, ...]]:
        """Name → shape of all that a stage with the layers `span` holds; a tied LM head is a second copy there."""
        is_first, is_last = span.start == 0, span.stop == self.config.n_layer
        prefixes = tuple(f"h.{layer}." for layer in span) + ("wte.",) * is_first + ("ln_f.",) * is_last
        shapes = {name: s for name, s in backbone_shapes(self.config).items() if name.startswith(prefixes)}
        if is_last:
            for head in self.heads:
                shapes |= head_shapes(self.config, head)
            if "lm_head" in self.heads:
                shapes["lm_head.weight"] = (self.config.vocab_size, self.config.n_embd)
        return shapes


@dataclass(frozen=True, slots=True)
class Resources:
    """What it is to be served with. `num_kv_tokens` or else `device_memory_bytes` sets the KV pool's size."""

    num_stages: int = 1
    dtype: str = "float16"
    quantization: str = "none"
    block_size: int = 16
    num_kv_tokens: int | None = None
    device_memory_bytes: int | None = None
    memory_utilization: float = 0.9  # what a stage may use of it
    bandwidth_bytes_s: float | None = None  # of one device's memory
    capability: Capability | None = None  # of a GPU; None: on CPUs. GPUs hold more than weights and KV: `Overhead`
    step_limits: StepLimits = DEFAULT_STEP_LIMITS

    @property
    def on_gpu(self) -> bool:
        return self.capability is not None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage. `num_kv_tokens` is what would fit beside all else; None where the memory isn't known."""

    stage_index: int
    layers: range
    weight_bytes: int
    read_bytes: int  # weights that a decode step reads: all but the embedding, of which it reads one row
    kv_bytes_per_token: int
    num_kv_tokens: int | None
    overhead: Overhead  # forecast; all 0 on a CPU

    @property
    def fixed_bytes(self) -> int:
        """All but the KV cache."""
        return self.weight_bytes + self.overhead.total


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline: its stages and the pool that all of them share. Lengths are in tokens."""

    resources: Resources
    num_parameters: int
    stages: tuple[StagePlan, ...]
    num_kv_blocks: int
    context: int

    @property
    def weight_bytes(self) -> int:
        return sum(stage.weight_bytes for stage in self.stages)

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(stage.kv_bytes_per_token for stage in self.stages)

    @property
    def num_kv_tokens(self) -> int:
        return self.num_kv_blocks * self.resources.block_size

    @property
    def fits(self) -> bool:
        """Every stage's weights, and the KV of at least one sequence of `context` tokens."""
        return self.max_batch(self.context) >= 1 and all(
            stage.num_kv_tokens is None or stage.num_kv_tokens >= self.num_kv_tokens for stage in self.stages
        )

    @property
    def min_token_latency_s(self) -> float | None:
        """No sequence gets tokens faster: each has to pass every stage, which reads its weights for it."""
        bandwidth = self.resources.bandwidth_bytes_s
        return None if bandwidth is None else sum(stage.read_bytes for stage in self.stages) / bandwidth

    @property
    def min_step_interval_s(self) -> float | None:
        """No pipeline finishes microbatches faster: the slowest stage reads its weights for each."""
        bandwidth = self.resources.bandwidth_bytes_s
        return None if bandwidth is None else max(stage.read_bytes for stage in self.stages) / bandwidth

    def kv_pool_bytes(self, stage: StagePlan) -> int:
        """A stage's KV tensors: the pool and one block of padding."""
        return (self.num_kv_blocks + 1) * self.resources.block_size * stage.kv_bytes_per_token

    def max_batch(self, num_tokens: int) -> int:
        """Sequences of `num_tokens` each that the KV pool holds at the same time."""
        return self.num_kv_blocks // -(-num_tokens // self.resources.block_size)


def plan(model: Model, resources: Resources, context: int | None = None) -> Plan:
    """Split the model over the stages and size the KV pool. Raises `ConfigError` for values that can't work."""
    config = model.config
    context = config.n_positions if context is None else context
    if not 1 <= context <= config.n_positions:
        raise ConfigError(f"context={context}: must be from 1 to the model's n_positions={config.n_positions}")
    if resources.dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype={resources.dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")
    _check_quantization(resources)
    spans = partition(config.n_layer, resources.num_stages, head_cost(config))
    stages = tuple(_stage_plan(model, resources, index, span) for index, span in enumerate(spans))
    if resources.num_kv_tokens is not None:
        num_kv_tokens = resources.num_kv_tokens
    elif resources.device_memory_bytes is not None:
        num_kv_tokens = min(stage.num_kv_tokens or 0 for stage in stages)
    else:
        num_kv_tokens = DEFAULT_KV_SEQUENCES * config.n_positions
    num_kv_blocks = -(-num_kv_tokens // resources.block_size)
    return Plan(resources, model.num_parameters, stages, num_kv_blocks, context)


def plan_service(config: PipelineConfig, checkpoint: Checkpoint) -> Plan:
    """The plan by which a pipeline of the service runs. Raises `ConfigError`.

    Where stages are on GPUs, `dtype: auto` is planned as bfloat16; float16, which they may choose, takes as many bytes.
    If they size the KV pool too (`PipelineConfig.sizes_kv_pool_from_memory`), the plan's is the default of CPUs.
    """
    capability = ASSUMED_CAPABILITY if config.stage.num_gpus > 0 else None
    resources = Resources(
        num_stages=config.num_stages,
        dtype=resolve_dtype(config.dtype, [] if capability is None else [capability]),
        quantization=config.quantization,
        block_size=config.kv_cache.block_size,
        num_kv_tokens=config.kv_cache.num_tokens,
        capability=capability,
        step_limits=StepLimits(config.scheduler.max_microbatch_tokens, config.scheduler.max_num_sequences),
    )
    return plan(Model(checkpoint.config, checkpoint.heads), resources)


def resolve_dtype(requested: str, capabilities: Sequence[Capability] = ()) -> str:
    """`auto` is float32 on CPUs, where greedy tokens are then transformers'. On GPUs, of which `capabilities` has each
    one's compute capability, it is bfloat16 if all have it, else float16."""
    if requested != "auto":
        return requested
    if not capabilities:
        return "float32"
    return "bfloat16" if min(map(tuple, capabilities)) >= BFLOAT16_CAPABILITY else "float16"


def _check_quantization(resources: Resources) -> None:
    """Raises `ConfigError` for what no kernels are for."""
    quantization, dtype = resources.quantization, resources.dtype
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization={quantization!r}: must be one of {', '.join(QUANTIZATIONS)}")
    missing = None if resources.capability is None else missing_capability(quantization, resources.capability)
    if missing is not None:
        raise ConfigError(f"quantization={quantization!r}: the GPU {missing}")
    if quantization == "fp8" and (not resources.on_gpu or dtype != "bfloat16"):
        raise ConfigError(f"quantization='fp8': is for GPUs, with dtype bfloat16, not {dtype}")
    if quantization == "int8" and dtype == ("float32" if resources.on_gpu else "float16"):
        where = "GPUs it goes with dtype bfloat16 or float16" if resources.on_gpu else "CPUs with float32 or bfloat16"
        raise ConfigError(f"quantization='int8': on {where}, not {dtype}")


def _stage_plan(model: Model, resources: Resources, index: int, span: range) -> StagePlan:
    width = DTYPE_BYTES[resources.dtype]
    num_bytes = {name: _num_bytes(name, shape, resources) for name, shape in model.shapes(span).items()}
    idle = ("wte.", "score.", "qa_outputs.")
    other = Overhead(0, 0, 0, 0, 0)
    if resources.on_gpu:
        restores_weights = resources.quantization == "int8"
        limits, block_size = resources.step_limits, resources.block_size
        other = overhead(model.config, span, limits, block_size, width, restores_weights=restores_weights)
    kv_bytes_per_token = 2 * len(span) * model.config.n_embd * width
    stage = StagePlan(
        stage_index=index,
        layers=span,
        weight_bytes=sum(num_bytes.values()),
        read_bytes=sum(size for name, size in num_bytes.items() if not name.startswith(idle)),
        kv_bytes_per_token=kv_bytes_per_token,
        num_kv_tokens=None,
        overhead=other,
    )
    if resources.device_memory_bytes is None:
        return stage
    room = int(resources.device_memory_bytes * resources.memory_utilization) - stage.fixed_bytes
    num_blocks = max(0, room // (kv_bytes_per_token * resources.block_size) - 1)  # one block is padding
    return replace(stage, num_kv_tokens=num_blocks * resources.block_size)


def _num_bytes(name: str, shape: tuple[int, ...], resources: Resources) -> int:
    """Of a tensor as it is kept. In 8 bits: the LM head and the layers' matrices, with a scale per output, and on CPUs
    a sum."""
    is_quantized = name == "lm_head.weight" or (name.startswith("h.") and len(shape) == 2)
    if resources.quantization != "none" and is_quantized:
        return prod(shape) + shape[0] * (4 if resources.on_gpu else 8)
    return prod(shape) * DTYPE_BYTES[resources.dtype]
