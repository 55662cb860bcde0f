"""How the layers are split over the stages."""

from itertools import accumulate

from gptj_serve.errors import ConfigError
from gptj_serve.model.config import GPTJConfig


def head_cost(config: GPTJConfig) -> float:
    """The LM head's cost in layers, by parameters: about 1 for the 6B model. The embedding lookup is free."""
    layer = 4 * config.n_embd**2 + 2 * config.n_embd * config.inner_dim
    return config.vocab_size * config.n_embd / layer


def partition(num_layers: int, num_stages: int, head_cost: float) -> list[range]:
    """Contiguous half-open spans that cover every layer once, none empty, with the dearest stage as cheap as can be.

    The last stage also pays `head_cost` (in layers). Among the splits with the same dearest stage the most even one
    is taken. Raises `ConfigError` when there are more stages than layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"num_stages={num_stages}: must be from 1 to the model's {num_layers} layers")

    def sizes(num_last: int) -> list[int]:
        if num_stages == 1:
            return [num_layers]
        base, extra = divmod(num_layers - num_last, num_stages - 1)
        return [base + (stage < extra) for stage in range(num_stages - 1)] + [num_last]

    def dearest_and_spread(sizes: list[int]) -> tuple[float, float]:
        costs = [*sizes[:-1], sizes[-1] + head_cost]
        return max(costs), sum(cost**2 for cost in costs)

    best = min((sizes(num_last) for num_last in range(1, num_layers - num_stages + 2)), key=dearest_and_spread)
    ends = list(accumulate(best))
    return [range(end - size, end) for size, end in zip(best, ends, strict=True)]
