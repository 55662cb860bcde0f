"""The device's sampler chooses the very tokens that `engine.sampling` does. Without a GPU its kernels run in Triton's
interpreter."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from gptj_serve.engine.sampling import sample
from gptj_serve.kernels.gpu.draw_kernels import NOT_FINITE, NOTHING_POSSIBLE, OK
from gptj_serve.kernels.gpu.sampling import DeviceSampler
from gptj_serve.kernels.gpu.sampling_parameters import SamplingMode
from gptj_serve.steps import SampledToken, SampleSpec
from gptj_serve.types import Warpers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Sampled(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]
    statuses: list[int]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(
    logits: Tensor,
    specs: Sequence[SampleSpec],
    positions: Sequence[int] | None = None,
    *,
    num_token_ids: int | None = None,
    mode: SamplingMode = SamplingMode.GREEDY,
) -> Sampled:
    """In the least mode that serves the specs, or `mode` if that is more."""
    sampler = DeviceSampler()
    parameters = torch.empty(sampler.num_fields, len(logits), dtype=torch.int64)
    least = sampler.write(parameters, specs, positions or [0] * len(specs))
    table = sampler.sample(
        logits.to(DEVICE), num_token_ids or logits.shape[1], parameters.to(DEVICE), max(mode, least)
    ).cpu()
    return Sampled(table[0].tolist(), table[1].view(torch.float32).tolist(), table[2].tolist())


def expected(logits: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int] | None = None) -> list[SampledToken]:
    results = sample(logits.clone(), specs, positions or [0] * len(specs))
    assert all(result.failure is None for result in results)
    return [result.tokens[0] for result in results]


def assert_equal(sampled: Sampled, tokens: Sequence[SampledToken]) -> None:
    assert sampled.statuses[: len(tokens)] == [OK] * len(tokens)
    assert sampled.token_ids[: len(tokens)] == [token.token_id for token in tokens]
    assert sampled.logprobs[: len(tokens)] == pytest.approx([token.logprob for token in tokens], abs=2e-5, rel=1e-6)


SIZES = [(torch.float32, n) for n in (1, 64, 65, 777, 2049)] + [(torch.bfloat16, 3000), (torch.float16, 100)]

WARPERS = [
    Warpers(),
    Warpers(temperature=1.0),
    Warpers(temperature=0.7),
    Warpers(temperature=1.0, top_k=1),
    Warpers(temperature=1.3, top_k=3),
    Warpers(temperature=1.0, top_k=40),
    Warpers(temperature=2.0, top_k=2500),
    Warpers(temperature=1.0, top_p=0.9),
    Warpers(temperature=5.0, top_p=0.5),
    Warpers(temperature=0.3, top_p=1e-9),
    Warpers(temperature=1.0, top_p=1 - 1e-6),
    Warpers(temperature=1.0, min_p=0.05),
    Warpers(temperature=1.5, min_p=1.0),
    Warpers(temperature=1.4, top_k=100, top_p=0.8, min_p=0.02),
    Warpers(temperature=0.9, top_k=7, top_p=0.99),
]


@pytest.mark.parametrize(("dtype", "num_token_ids"), SIZES)
def test_equals_the_sampler_of_the_engine(dtype: torch.dtype, num_token_ids: int):
    logits = (3 * randn(len(WARPERS), num_token_ids, seed=num_token_ids)).to(dtype)
    specs = [SampleSpec(warpers, seed=row * 2**58) for row, warpers in enumerate(WARPERS)]
    positions = [113 * row for row in range(len(WARPERS))]
    assert_equal(run(logits, specs, positions), expected(logits, specs, positions))


warpers = st.builds(
    Warpers,
    temperature=st.sampled_from([0.0, 1e-30, 1e-3, 0.7, 1.0, 3.0, 50.0, 1e37]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 31, 40, 200]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.5, 0.1, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
)


@settings(max_examples=10, deadline=None)
@given(
    warpers=st.lists(warpers, min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**31 - 2**8),
    num_token_ids=st.integers(2, 300),
    num_levels=st.sampled_from([1, 2, 5, 100, 10_000]),
    share_impossible=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_equals_the_sampler_of_the_engine_among_ties_and_impossible_tokens(
    warpers: list[Warpers], seed: int, position: int, num_token_ids: int, num_levels: int, share_impossible: float
):
    draw = random.Random(seed)
    rows = [[draw.randrange(num_levels) * 8 / num_levels - 4 for _ in range(num_token_ids)] for _ in warpers]
    logits = torch.tensor(rows)
    is_impossible = torch.tensor([[draw.random() < share_impossible for _ in row] for row in rows])
    is_impossible[:, draw.randrange(num_token_ids)] = False
    logits[is_impossible] = -torch.inf
    specs = [SampleSpec(w, seed=seed) for w in warpers]
    positions = [position + row for row in range(len(rows))]
    assert_equal(run(logits, specs, positions), expected(logits, specs, positions))


def test_a_row_of_gpt_j():
    """Of 50,400 logits 50,257 belong to tokens; those beyond are never chosen and not counted in."""
    logits = 4 * randn(3, 50_400, seed=3)
    logits[:, 50_257:] = 1e4
    specs = [SampleSpec(), SampleSpec(Warpers(temperature=0.9), seed=1), SampleSpec(Warpers(1.0, 50, 0.95), seed=2)]
    assert_equal(run(logits, specs, num_token_ids=50_257), expected(logits[:, :50_257], specs))


@pytest.mark.parametrize("mode", SamplingMode)
def test_zero_and_minus_zero_are_equal(mode: SamplingMode):
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [0.0, -0.0, -1.0, 0.0]]).repeat_interleave(3, 0)
    narrow = Warpers(temperature=1.0, top_k=1 + (mode is SamplingMode.NARROWED))
    specs = [SampleSpec(), SampleSpec(narrow, seed=2), SampleSpec(narrow, seed=3)] * 2
    assert_equal(run(logits, specs, mode=mode), expected(logits, specs))


@pytest.mark.parametrize("extra", [{}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.5}])
def test_exact_shares_of_equal_tokens(extra: dict[str, float]):
    """Sums that reach top-p exactly: one more token would be another draw."""
    logits = torch.zeros(8, 10)
    specs = [SampleSpec(Warpers(temperature=1.0, **extra), seed=seed) for seed in range(8)]
    assert_equal(run(logits, specs), expected(logits, specs))


# ------------------------------------------------------------------------------------------ rows and their failures


def test_a_rows_bits_do_not_depend_on_other_rows_or_the_mode():
    logits = 3 * randn(4, 777)
    specs = [SampleSpec(), SampleSpec(Warpers(temperature=1.0), seed=5), SampleSpec(Warpers(0.8, 9, 0.9), seed=6)]
    together = run(logits, [*specs, SampleSpec(Warpers(temperature=1.0, top_p=0.4))])
    for row, spec in enumerate(specs):
        alone = run(logits[row : row + 1], [spec])
        assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[row], together.logprobs[row])


@pytest.mark.parametrize("mode", SamplingMode)
def test_a_row_that_is_not_finite_fails_alone(mode: SamplingMode):
    logits = randn(6, 300)
    clean = logits[[0, 5]].clone()
    logits[1, 299] = torch.nan
    logits[2, 17] = torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    warpers = [Warpers(), Warpers(temperature=1.0), Warpers(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01)][mode]
    sampled = run(logits, [SampleSpec(warpers, seed=9)] * 6)
    assert sampled.statuses == [OK, NOT_FINITE, NOT_FINITE, NOTHING_POSSIBLE, NOT_FINITE, OK]
    good = expected(clean, [SampleSpec(warpers, seed=9)] * 2)
    assert [sampled.token_ids[0], sampled.token_ids[5]] == [token.token_id for token in good]
    assert [sampled.token_ids[row] for row in (1, 2, 3, 4)] == [0] * 4
    assert [sampled.logprobs[row] for row in (1, 2, 3, 4)] == [0.0] * 4


def test_padding_may_hold_anything():
    logits = torch.full((4, 130), torch.nan)
    logits[:2] = randn(2, 130)
    specs = [SampleSpec(Warpers(1.0, 5)), SampleSpec(Warpers(1.0, 0, 0.9))]
    assert_equal(run(logits, specs), expected(logits[:2], specs))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_scores_that_are_as_far_apart_as_numbers_can_be():
    logits = torch.tensor([[3e38, -3e38, 1.0, 3e38], [-3e38, -3.1e38, -2.9e38, -3e38], [1e-40, -1e-40, 0.0, 1e-45]])
    warpers = [Warpers(temperature=1.0), Warpers(1.0, 2), Warpers(1.0, 0, 0.7), Warpers(1e37), Warpers(1e37, 0, 0.6)]
    for narrowing in warpers:
        specs = [SampleSpec(narrowing, seed=seed) for seed in range(3)]
        assert run(logits, specs).token_ids == [token.token_id for token in expected(logits, specs)]


# ------------------------------------------------------------------------------------------------- without waiting

ALLOWED = {"aten::empty.memory_format", "aten::view.dtype", "aten::detach"}

INTERPRETER = {
    "aten::new_empty",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::copy_",
}
"""What Triton's interpreter does with a kernel's arguments."""


class OperatorNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", SamplingMode)
def test_nothing_waits_for_the_device(mode: SamplingMode):
    """No operator of torch runs but those that make and view tensors: none that copies, or reads a number."""
    sampler = DeviceSampler()
    logits, parameters = randn(2, 200).to(DEVICE), torch.zeros(sampler.num_fields, 2, dtype=torch.int64, device=DEVICE)
    with OperatorNames() as operators:
        sampler.sample(logits, 200, parameters, mode)
    assert operators.names <= (ALLOWED if DEVICE.type == "cuda" else ALLOWED | INTERPRETER)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("mode", SamplingMode)
def test_runs_in_a_captured_graph(mode: SamplingMode):
    sampler = DeviceSampler()
    logits = torch.zeros(4, 3000, device=DEVICE)
    parameters = torch.zeros(sampler.num_fields, 4, dtype=torch.int64, device=DEVICE)
    sampler.sample(logits, 2999, parameters, mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = sampler.sample(logits, 2999, parameters, mode)
    warpers = [Warpers(), Warpers(temperature=1.0), Warpers(temperature=1.0, top_k=50, top_p=0.9)][mode]
    specs = [SampleSpec(warpers, seed=seed) for seed in range(4)]
    for step in range(3):
        given, on_host = 2 * randn(4, 3000, seed=step), torch.empty(parameters.shape, dtype=torch.int64)
        sampler.write(on_host, specs, [step] * 4)
        logits.copy_(given)
        parameters.copy_(on_host)
        graph.replay()
        tokens = expected(given[:, :2999], specs, [step] * 4)
        assert sampled[0].tolist() == [token.token_id for token in tokens]
