"""The models that are measured, and what a step of them costs at least: bytes that are read, operations that are done.

A multiplication and an addition are two operations. Bytes are those of weights and KV alone.
"""

from dataclasses import dataclass
from math import prod

from benchmarks.random_model import M405
from gptj_serve.model.config import GPTJConfig
from gptj_serve.planner import Model

TINY = GPTJConfig(n_layer=4, n_embd=128, n_head=4, rotary_dim=16, vocab_size=512, n_positions=256)
MODELS = {"tiny": TINY, "405m": M405, "6b": GPTJConfig()}

STORED_DTYPES = {"tiny": "float32", "405m": "float32", "6b": "bfloat16"}
"""Of the checkpoints."""


@dataclass(frozen=True, slots=True)
class Precision:
    """`name` is that of the operation rate: fp32, bf16 or int8; widths are in bytes."""

    name: str
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    num_bytes: float
    num_operations: float

    def bound_s(self, bytes_per_s: float, operations_per_s: float) -> float:
        """No machine with these rates is faster."""
        return max(self.num_bytes / bytes_per_s, self.num_operations / operations_per_s)


def weight_bytes(config: GPTJConfig, precision: Precision) -> int:
    """All weights, as held: matrices in the precision, and what is no matrix, and the embedding, in the KV's dtype."""
    return sum(
        prod(shape) * (precision.weight_bytes if _is_multiplied(name, shape) else precision.kv_bytes)
        for name, shape in _shapes(config).items()
    )


def kv_bytes_per_token(config: GPTJConfig, precision: Precision) -> int:
    return 2 * config.n_layer * config.n_embd * precision.kv_bytes


def decode_cost(config: GPTJConfig, precision: Precision, batch: int, context: int) -> Cost:
    """One token of each of `batch` sequences with `context` tokens."""
    multiplied = _num_multiplied(config)
    attention = 4 * config.n_layer * config.n_embd * context
    return Cost(
        multiplied * precision.weight_bytes + batch * context * kv_bytes_per_token(config, precision),
        batch * (2 * multiplied + attention),
    )


def prefill_cost(config: GPTJConfig, precision: Precision, batch: int, num_tokens: int) -> Cost:
    """Prompts of `num_tokens` tokens each; the LM head is for the last token only, attention is causal."""
    head = config.n_embd * config.vocab_size
    layers = _num_multiplied(config) - head
    attention = 2 * config.n_layer * config.n_embd * num_tokens**2
    return Cost((layers + head) * precision.weight_bytes, batch * (2 * layers * num_tokens + 2 * head + attention))


def _num_multiplied(config: GPTJConfig) -> int:
    return sum(prod(shape) for name, shape in _shapes(config).items() if _is_multiplied(name, shape))


def _is_multiplied(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not name.startswith("wte.")


def _shapes(config: GPTJConfig) -> dict[str, tuple[int, ...]]:
    return Model(config).shapes(range(config.n_layer))
