from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.errors import ConfigError
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.partition import head_cost, partition


@st.composite
def layers_and_stages(draw: st.DrawFn, max_layers: int) -> tuple[int, int]:
    num_layers = draw(st.integers(1, max_layers))
    return num_layers, draw(st.integers(1, num_layers))


def most_expensive(sizes: list[int], cost_of_head: float) -> float:
    return max([*sizes[:-1], sizes[-1] + cost_of_head])


@given(sizes=layers_and_stages(100), cost_of_head=st.floats(0, 50))
def test_every_layer_is_owned_once_and_every_stage_owns_some(sizes: tuple[int, int], cost_of_head: float):
    num_layers, num_stages = sizes
    spans = partition(num_layers, num_stages, cost_of_head)
    assert len(spans) == num_stages
    assert all(len(span) > 0 and span.step == 1 for span in spans)
    assert [layer for span in spans for layer in span] == list(range(num_layers))


@given(sizes=layers_and_stages(9), cost_of_head=st.floats(0, 12))
def test_no_split_has_a_cheaper_most_expensive_stage(sizes: tuple[int, int], cost_of_head: float):
    num_layers, num_stages = sizes
    cuts = combinations(range(1, num_layers), num_stages - 1)
    bounds = [(0, *cut, num_layers) for cut in cuts]
    best = min(most_expensive([b - a for a, b in pairwise(c)], cost_of_head) for c in bounds)
    spans = partition(num_layers, num_stages, cost_of_head)
    assert most_expensive([len(span) for span in spans], cost_of_head) == best


@given(sizes=layers_and_stages(60), cost_of_head=st.floats(0, 5))
def test_earlier_stages_get_the_larger_share(sizes: tuple[int, int], cost_of_head: float):
    shares = [len(span) for span in partition(*sizes, cost_of_head)[:-1]]
    assert shares == sorted(shares, reverse=True)
    assert not shares or shares[0] - shares[-1] <= 1


@pytest.mark.parametrize(
    ("num_stages", "sizes"), [(1, [28]), (2, [15, 13]), (3, [10, 10, 8]), (4, [8, 7, 7, 6]), (28, [1] * 28)]
)
def test_the_6b_model(num_stages: int, sizes: list[int]):
    """Its LM head costs about one layer, so the last stage takes about one layer less."""
    cost = head_cost(GPTJConfig())
    assert 1.0 < cost < 1.1
    assert [len(span) for span in partition(28, num_stages, cost)] == sizes


def test_head_cost_counts_parameters():
    assert head_cost(GPTJConfig(n_embd=32, n_head=4, rotary_dim=4, n_inner=64, vocab_size=1024)) == 1024 * 32 / 8192


@pytest.mark.parametrize("num_stages", [0, -1, 7])
def test_impossible_number_of_stages(num_stages: int):
    with pytest.raises(ConfigError, match=f"num_stages={num_stages}: .* 6 layers"):
        partition(6, num_stages, 1.0)
