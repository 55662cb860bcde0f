"""How the layers are split over the stages."""

from gptj_serve.errors import ConfigError

LM_HEAD_COST = 1.0
"""The LM head in layers: 206 M of parameters beside a layer's 201 M in the 6B model. The embedding lookup is free."""

LayerSpan = range
"""The layers of one stage, half-open."""


def partition(num_layers: int, num_stages: int, head_cost: float = LM_HEAD_COST) -> list[LayerSpan]:
    """Contiguous spans that cover every layer once, each with at least one, minimising the most expensive stage.

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
