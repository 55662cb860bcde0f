"""How the layers are split over the stages."""

from gptj_serve.errors import ConfigError
from gptj_serve.model.config import GPTJConfig


def head_cost(config: GPTJConfig) -> float:
    """The LM head's cost in layers, by parameters: about 1 for the 6B model. The embedding lookup is free."""
    layer = 4 * config.n_embd**2 + 2 * config.n_embd * config.inner_dim
    return config.vocab_size * config.n_embd / layer


def partition(num_layers: int, num_stages: int, head_cost: float) -> list[range]:
    """Contiguous half-open spans that cover every layer once, each with at least one, minimising the most expensive stage.

    The last stage also pays `head_cost` (in layers). Among the splits with the lowest maximum, earlier stages get
    the larger share. Raises `ConfigError` when there are more stages than layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"num_stages={num_stages}: must be from 1 to the model's {num_layers} layers")
    if num_stages == 1:
        return [range(num_layers)]

    def cost(num_last: int) -> float:
        others = num_layers - num_last
        return max(-(-others // (num_stages - 1)), num_last + head_cost)

    num_last = min(range(1, num_layers - num_stages + 2), key=lambda n: (cost(n), n))
    base, extra = divmod(num_layers - num_last, num_stages - 1)
    sizes = [base + (stage < extra) for stage in range(num_stages - 1)] + [num_last]
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
