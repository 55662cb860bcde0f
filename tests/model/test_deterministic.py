"""The deterministic mode: a token's hidden state, keys, values and logits are bit for bit a function of its prefix.

Run as a program with a dtype's name it checks that dtype alone: for bfloat16 oneDNN may have to be told, before torch
is loaded, which of the machine's instructions work.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from gptj_serve.config import PipelineConfig
from gptj_serve.errors import ConfigError
from gptj_serve.model.attention import AttentionPlan, KVCache, PagedAttention, PagedRow
from gptj_serve.model.bit_equality import NUM_ROWS, REFERENCE, agreeing_num_rows
from gptj_serve.model.block import ACTIVATIONS
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.deterministic import Conversion, Fused, make_deterministic
from gptj_serve.model.deterministic_attention import TILE
from gptj_serve.model.stage import GPTJStage, load_stage
from tests.threads import torch_threads

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
HEADS = ("lm_head", "score", "qa_outputs")
BASE = {
    "vocab_size": 97,
    "n_positions": 1600,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "rotary_dim": 4,
    "num_labels": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "odd sizes": {"n_embd": 36, "n_head": 3, "n_inner": 50, "vocab_size": 131, "rotary_dim": 10},
    "one wide head": {"n_embd": 256, "n_head": 1, "rotary_dim": 64, "n_layer": 2},
    "heads of 80": {"n_embd": 160, "n_head": 2, "rotary_dim": 32, "n_layer": 2, "activation_function": "quick_gelu"},
}
NOT_SUPPORTED = 3  # exit status
Span = tuple[int, int]  # (sequence, number of its next tokens)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Computed:
    """What stages made of one sequence of T tokens."""

    keys: Tensor  # [layers, T, H, Dh]
    values: Tensor
    hidden: Tensor  # [T, D], ln_f applied
    heads: list[Tensor]  # logits [T, .] of each head

    def assert_same_bits(self, other: "Computed") -> None:
        pairs = [(self.keys, other.keys), (self.values, other.values), (self.hidden, other.hidden)]
        for mine, others in [*pairs, *zip(self.heads, other.heads, strict=True)]:
            assert mine.isfinite().all()
            assert torch.equal(mine, others), f"{(mine != others).sum()} of {mine.numel()} numbers differ"


class Chain:
    """Consecutive stages, run like a pipeline."""

    def __init__(self, stages: Sequence[GPTJStage], *, deterministic: bool = True) -> None:
        self.stages = stages
        self.dtype = next(stages[0].parameters()).dtype
        self.plans: list[AttentionPlan | None] = [None for _ in stages]
        if deterministic:
            self.plans = [make_deterministic(stage)[0] for stage in stages]

    def alone(self, token_ids: Tensor) -> Computed:
        return self.run([token_ids], [[(0, len(token_ids))]])[0]

    @torch.inference_mode()
    def run(
        self, sequences: Sequence[Tensor], microbatches: Sequence[Sequence[Span]], block_size: int = 16, seed: int = 0
    ) -> list[Computed]:
        """Compute all sequences as the microbatches say, in blocks that lie anywhere and hold NaN."""
        num_blocks = 2 + sum(-(-len(ids) // block_size) for ids in sequences)
        free = random.Random(seed).sample(range(num_blocks), num_blocks)
        tables = [[free.pop() for _ in range(-(-len(ids) // block_size))] for ids in sequences]
        caches = [KVCache(s.config, len(s.span), num_blocks, block_size, self.dtype, CPU) for s in self.stages]
        for kv_cache in caches:
            kv_cache.keys[:, :num_blocks] = torch.nan
            kv_cache.values[:, :num_blocks] = torch.nan
        hidden: list[list[Tensor]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        for spans in microbatches:
            rows = [PagedRow(done[i], n, tables[i][: -(-(done[i] + n) // block_size)]) for i, n in spans]
            x = torch.cat([sequences[i][done[i] : done[i] + n] for i, n in spans])
            for stage, plan, kv_cache in zip(self.stages, self.plans, caches, strict=True):
                attention = PagedAttention(rows, kv_cache, plan)
                x = stage(x, attention.positions, attention.layer)
            for (i, n), part in zip(spans, x.split([n for _, n in spans]), strict=True):
                hidden[i].append(part)
                done[i] += n
        assert done == [len(ids) for ids in sequences]
        return [self._computed(torch.cat(parts), table, caches) for parts, table in zip(hidden, tables, strict=True)]

    def _computed(self, hidden: Tensor, table: list[int], caches: Sequence[KVCache]) -> Computed:
        keys, values = (
            torch.cat([getattr(kv_cache, part)[:, table].flatten(1, 2)[:, : len(hidden)] for kv_cache in caches])
            for part in ("keys", "values")
        )
        return Computed(keys, values, hidden, [getattr(self.stages[-1], name)(hidden) for name in HEADS])


def random_stages(cuts: Sequence[int], dtype: torch.dtype, **config: Any) -> list[GPTJStage]:
    """A random model, cut before the layers `cuts`; its weights don't depend on them."""
    gptj_config = GPTJConfig(**{**BASE, **config})
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, parameter in GPTJStage(gptj_config, range(gptj_config.n_layer), HEADS).named_parameters():
        scale = 1 if name == "wte.weight" else 2 / parameter.shape[-1] ** 0.5
        weights[name] = torch.randn(parameter.shape, generator=generator) * scale
    stages = []
    for start, stop in zip([0, *cuts], [*cuts, gptj_config.n_layer], strict=True):
        stage = GPTJStage(gptj_config, range(start, stop), HEADS)
        stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
        stage.attach_rotary(CPU)
        stages.append(stage.to(dtype).requires_grad_(False).eval())
    return stages


@cache
def random_chain(name: str, cuts: tuple[int, ...], dtype: torch.dtype, num_threads: int = 1) -> Chain:
    with torch_threads(num_threads):
        return Chain(random_stages(cuts, dtype, **CONFIGS[name]))


@cache
def demo_chain(cuts: tuple[int, ...], dtype: torch.dtype, *, deterministic: bool = True) -> Chain:
    checkpoint = Checkpoint.open(Path(str(files("gptj_serve") / "demo")))
    spans = [range(*ends) for ends in zip([0, *cuts], [*cuts, checkpoint.config.n_layer], strict=True)]
    return Chain([load_stage(checkpoint, span, dtype, CPU) for span in spans], deterministic=deterministic)


def random_ids(num_tokens: int, seed: int) -> Tensor:
    return torch.randint(0, BASE["vocab_size"] - 1, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def random_schedule(lengths: Sequence[int], rng: random.Random) -> list[list[Span]]:
    """Every sequence's tokens in order: often one, or few, or all that are left."""
    left = list(lengths)
    microbatches = []
    while any(left):
        waiting = [i for i, n in enumerate(left) if n]
        riders = rng.sample(waiting, rng.randint(1, len(waiting)))
        microbatch = [(i, rng.choice([1, min(3, left[i]), rng.randint(1, left[i]), left[i]])) for i in riders]
        for i, n in microbatch:
            left[i] -= n
        microbatches.append(microbatch)
    return microbatches


def check_any_schedule(chain: Chain, cut: Chain, lengths: Sequence[int], seed: int) -> None:
    """Alone in one piece on one stage = in company, in pieces, in other blocks, over stages."""
    rng = random.Random(seed)
    sequences = [random_ids(length, seed + i) for i, length in enumerate(lengths)]
    expected = [chain.alone(ids) for ids in sequences]
    computed = cut.run(sequences, random_schedule(lengths, rng), block_size=rng.randint(1, 20), seed=seed)
    for mine, others in zip(computed, expected, strict=True):
        mine.assert_same_bits(others)


def check_decoding(chain: Chain, cut: Chain) -> None:
    """A sequence that grows one by one, across a tile's end, while others come and go, 520 tokens among them."""
    ids, prompts = random_ids(TILE + 6, 0), [random_ids(n, n) for n in (520, 37, 1, 64, 2)]
    expected = [chain.alone(ids) for ids in (ids, *prompts)]
    microbatches: list[list[Span]] = [[(0, 1)] for _ in ids]
    for place, (i, prompt) in zip((1, 12, 20, 40, 41), enumerate(prompts, start=1), strict=True):
        microbatches[place].insert(i % 2, (i, len(prompt)))
    for mine, others in zip(cut.run([ids, *prompts], microbatches), expected, strict=True):
        mine.assert_same_bits(others)


def check_with_two_threads(name: str, dtype: torch.dtype) -> None:
    """Stages with two threads = stages with one, in any schedule."""
    sequences = [random_ids(length, length) for length in (90, 3, 17)]
    expected = [random_chain(name, (), dtype).alone(ids) for ids in sequences]
    with torch_threads(2):
        chain = random_chain(name, (1,), dtype, num_threads=2)
        schedule = random_schedule([len(ids) for ids in sequences], random.Random(2))
        computed = [*chain.run(sequences, schedule), chain.alone(sequences[0])]
    for mine, others in zip(computed, [*expected, expected[0]], strict=True):
        mine.assert_same_bits(others)


def check_dtype(dtype: torch.dtype) -> None:
    """What the tests below check of float32, in fewer examples."""
    torch.set_num_threads(1)
    check_decoding(demo_chain((), dtype), demo_chain((2, 4), dtype))
    for name in CONFIGS:
        check_any_schedule(random_chain(name, (), dtype), random_chain(name, (1,), dtype), [150, 1, 70, 23], 3)
    check_with_two_threads("odd sizes", dtype)


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    cuts=st.sampled_from([(), (1,)]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_depend_on_the_prefix_alone(name: str, cuts: tuple[int, ...], lengths: list[int], seed: int):
    check_any_schedule(random_chain(name, (), torch.float32), random_chain(name, cuts, torch.float32), lengths, seed)


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_depend_on_the_prefix_alone_with_two_threads(name: str):
    check_with_two_threads(name, torch.float32)


@pytest.mark.parametrize("cuts", [(), (2, 4)], ids=["one stage", "three stages"])
def test_decoding_the_demo_checkpoint(cuts: tuple[int, ...]):
    check_decoding(demo_chain((), torch.float32), demo_chain(cuts, torch.float32))


def test_a_long_context():
    chain = random_chain("default", (), torch.float32)
    long, short = random_ids(1500, 0), random_ids(60, 1)
    pieces = [700, 1, 512, 7, 230]
    microbatches = [[(0, n)] for n in pieces] + [[(0, 1), (1, 1)] for _ in range(1500 - sum(pieces))] + [[(1, 10)]]
    for mine, ids in zip(chain.run([long, short], microbatches), (long, short), strict=True):
        mine.assert_same_bits(chain.alone(ids))


def test_nan_stays_with_its_row():
    chain = Chain(random_stages((), torch.float32))
    sequences = [random_ids(40, 0), torch.tensor([96] * 70), random_ids(90, 1), random_ids(1, 2)]
    expected = [chain.alone(ids) for ids in sequences]
    assert isinstance(chain.stages[0].wte, nn.Embedding)
    chain.stages[0].wte.weight[96] = torch.nan
    schedule = [[(0, 1), (1, 1), (2, 1), (3, 1)], [(2, 60), (1, 60), (0, 39)], [(1, 9), (2, 29)]]
    computed = chain.run(sequences, schedule)
    assert computed[1].hidden.isnan().all()
    for i in (0, 2, 3):
        computed[i].assert_same_bits(expected[i])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_the_normal_mode(activation: str):
    stages = [random_stages((1,), torch.float32, activation_function=activation, n_inner=50) for _ in range(2)]
    normal, deterministic = Chain(stages[0], deterministic=False), Chain(stages[1])
    assert_close(deterministic.alone(random_ids(150, 0)), normal.alone(random_ids(150, 0)))


def test_agrees_with_the_normal_mode_on_the_demo_checkpoint():
    ids = random_ids(200, 0)
    normal = demo_chain((), torch.float32, deterministic=False)
    assert_close(demo_chain((), torch.float32).alone(ids), normal.alone(ids))


def assert_close(actual: Computed, expected: Computed) -> None:
    torch.testing.assert_close(actual.hidden, expected.hidden, rtol=0, atol=1e-4)
    for mine, others in zip(actual.heads, expected.heads, strict=True):
        torch.testing.assert_close(mine, others, rtol=0, atol=1e-4)


def test_bfloat16():
    """In a process of its own: where AMX is announced and doesn't work, bfloat16 products end the process."""
    if _run("bfloat16", "probe").returncode in (NOT_SUPPORTED, -signal.SIGILL):
        pytest.skip("oneDNN has no bfloat16 kernels that run on this machine")
    finished = _run("bfloat16", "check")
    assert finished.returncode == 0, finished.stderr


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", **os.environ, "PYTHONPATH": path}
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_linear_layer_keeps_bits_and_shapes():
    torch.manual_seed(0)
    linear = Conversion(torch.float32, CPU).linear(nn.Linear(50, 33).requires_grad_(False))
    x = torch.randn(300, 50)
    expected = linear(x)
    for num_rows in (1, 2, 3, 5, 17, 100, 128, 129, 257, 300):
        for first in {0, 7, 300 - num_rows}:
            part = slice(first, first + num_rows)
            assert torch.equal(linear(x[part]), expected[part])
    assert torch.equal(linear(x[5]), expected[5])
    assert torch.equal(linear(x.view(3, 100, 50)), expected.view(3, 100, 33))


@pytest.mark.parametrize(("operation", "algorithm", "function"), [("swish", "", F.silu), ("gelu", "none", F.gelu)])
def test_a_fused_activation(operation: str, algorithm: str, function: Any):
    linear = nn.Linear(20, 70).requires_grad_(False)
    fused = Conversion(torch.float32, CPU).linear(linear, Fused(operation, algorithm))
    x = torch.randn(9, 20) * 3
    torch.testing.assert_close(fused(x), function(linear(x)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_what_is_left_to_torch_does_not_depend_on_place(num_threads: int):
    """Single elements and rows, on which the mode relies; and what the sampler does with rows of logits."""
    torch.manual_seed(0)
    with torch_threads(num_threads):
        x = torch.randn(40_000) * 3
        for function in (torch.exp, torch.log, torch.sin):
            expected = function(x.abs())
            for first, num_elements in ((0, 1), (1, 15), (3, 33), (100, 33_333)):
                part = slice(first, first + num_elements)
                assert torch.equal(function(x.abs()[part]), expected[part])
        rows = torch.randn(9, 50_257)
        for row_function in (
            lambda x: F.layer_norm(x[:, :1000], (1000,)),
            lambda x: x[:, :TILE].sum(dim=-1),
            lambda x: x.expand(max(2, len(x)), -1).logsumexp(dim=-1)[: len(x)],  # a lone row's sum is cut for threads
            lambda x: x.log_softmax(dim=-1),
        ):
            expected = row_function(rows)
            assert torch.equal(torch.cat([row_function(row[None]) for row in rows]), expected)


def test_numbers_of_rows_that_give_other_bits_are_out():
    def product(x: Tensor) -> Tensor:
        return x * 3 if len(x) not in (2, 64) else x * 3.000001

    assert agreeing_num_rows([product], 5, torch.float32, "it") == tuple(n for n in NUM_ROWS if n not in (2, 64))
    assert agreeing_num_rows([product, lambda x: x * (3 if len(x) == REFERENCE else 4)], 5, torch.float32, "it") == (
        REFERENCE,
    )


def test_a_machine_whose_bits_depend_on_place_is_refused():
    def product(x: Tensor) -> Tensor:
        return torch.cat([x[:-1], x[-1:] * 1.000001])

    with pytest.raises(ConfigError, match="of the product depend on a row's place"):
        agreeing_num_rows([product], 5, torch.float32, "the product")


def test_a_machine_whose_bits_depend_on_the_threads_is_refused():
    with torch_threads(2), pytest.raises(ConfigError, match="threads, which is 2 here"):
        agreeing_num_rows([lambda x: x / torch.get_num_threads()], 5, torch.float32, "the product")


def test_other_dtypes_and_devices_are_refused():
    with pytest.raises(ConfigError, match="float16 on cpu"):
        make_deterministic(random_stages((), torch.float16)[0])
    with pytest.raises(ConfigError, match="float32 on meta"):
        Conversion(torch.float32, torch.device("meta"))
    for wrong in ({"stage": {"num_gpus": 1}}, {"dtype": "float16"}):
        with pytest.raises(ValidationError, match="deterministic is for stages on CPU"):
            PipelineConfig.model_validate({"deterministic": True, **wrong})


def test_weights_are_counted_and_converted_once():
    stage = random_stages((), torch.float32)[0]
    num_bytes = sum(parameter.nbytes for parameter in stage.parameters())
    make_deterministic(stage)
    weights = list(stage.parameters())
    assert sum(parameter.nbytes for parameter in weights) == num_bytes
    make_deterministic(stage)
    assert all(before is after for before, after in zip(weights, stage.parameters(), strict=True))


if __name__ == "__main__":
    dtype_name, what = sys.argv[1:]
    wanted = getattr(torch, dtype_name)
    if what == "check":
        check_dtype(wanted)
    elif wanted is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        sys.exit(NOT_SUPPORTED)
    else:
        F.linear(torch.ones(4, 64, dtype=wanted), torch.ones(64, 64, dtype=wanted))
