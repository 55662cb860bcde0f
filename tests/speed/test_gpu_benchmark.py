"""`python -m benchmarks.gpu`: what it does without a GPU, and each part with a tiny model on the fake device."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.demo import Comparison, compare
from benchmarks.gpu.engines import Engines, Setup, Times
from benchmarks.gpu.machine import Rates, measure_rates
from benchmarks.gpu.parts import PARTS, Bench, Sizes
from benchmarks.gpu.random_stages import random_prompts, random_stages
from benchmarks.speed.models import Precision, decode_cost, prefill_cost
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.sampler import GreedySampler
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import TokenEvent
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.reference_layers import ReferenceLayers

ROOT = Path(__file__).parents[2]
TINY = GPTJConfig(n_layer=4, n_embd=16, n_head=2, rotary_dim=4, vocab_size=64, n_positions=64)
SIZES = Sizes(
    prompt=5, new=4, long_prompt=20, long_new=3, batches=(1, 3), long_batches=(2,), peer_batch=3, num_beam_requests=2,
    num_beams=2, stages=(1, 2), rounds=1,
)  # fmt: skip
SETUP = Setup(TINY, num_kv_blocks=64, block_size=4, max_num_sequences=4, max_microbatch_tokens=32)


def fake_runners(num_stages: int) -> list[StageRunner]:
    device = FakeDevice()
    runners: list[StageRunner] = []
    for stage in random_stages(TINY, num_stages, torch.float32, device.torch_device):
        spec = StageSpec(
            stage.span, SETUP.num_kv_blocks, SETUP.block_size, torch.float32, device.torch_device, TINY.vocab_size,
            max_num_sequences=SETUP.max_num_sequences, max_microbatch_tokens=SETUP.max_microbatch_tokens,
        )  # fmt: skip
        layers = ReferenceLayers(stage, SETUP.num_kv_blocks, SETUP.block_size)
        runners.append(GPUStageRunner(stage, spec, layers, device, GreedySampler()))
    return runners


@pytest.fixture
def bench(one_torch_thread: None):
    prompts = partial(random_prompts, vocab_size=TINY.vocab_size)
    engines = Engines(SETUP, fake_runners)
    cpu = torch.device("cpu")
    yield Bench(TINY, Precision("float32", 4, 4), torch.float32, cpu, Rates(1e9, 1e9), engines, prompts, SIZES)
    engines.close()


@pytest.mark.parametrize("part", PARTS)
def test_each_part_measures_something(part: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    PARTS[part](bench)
    assert bench.figures
    assert all(value > 0 for value in bench.figures.values())
    printed = capsys.readouterr().out
    assert all(name.split(",")[0] in printed for name in bench.figures)


def test_figures_stand_beside_their_bounds(bench: Bench) -> None:
    PARTS["decode"](bench)
    cost = decode_cost(TINY, bench.precision, 1, SIZES.prompt + SIZES.new // 2)
    assert bench.figures["batch 1, step, bound ms"] == pytest.approx(cost.bound_s(1e9, 1e9) * 1e3)
    ratio = bench.figures["batch 1, step, bound ms"] / bench.figures["batch 1, step"]
    assert bench.figures["batch 1, step, of bound"] == pytest.approx(ratio)


def test_the_bound_of_a_batch_is_that_of_its_prompts_and_steps(bench: Bench) -> None:
    prefill_s = prefill_cost(TINY, bench.precision, 3, 5).bound_s(1e9, 1e9)
    steps_s = sum(decode_cost(TINY, bench.precision, 3, context).bound_s(1e9, 1e9) for context in (6, 7, 8))
    assert bench.bound_of_batch_s(3, 5, 4) == pytest.approx(prefill_s + steps_s)


def test_times_of_a_batch() -> None:
    times = Times(firsts=[1.0, 2.0, 2.0], lasts=[5.0, 6.0, 10.0], num_tokens=15)
    assert times.tokens_per_s == 1.5
    assert times.step_s == 1.0


def test_random_weights_are_the_same_however_they_are_split() -> None:
    whole, halves = (random_stages(TINY, n, torch.float32, torch.device("cpu")) for n in (1, 2))
    named = dict(whole[0].named_parameters())
    split = {name: parameter for stage in halves for name, parameter in stage.named_parameters()}
    assert named.keys() == split.keys()
    assert all(torch.equal(parameter, split[name]) for name, parameter in named.items())
    assert 0.015 < named["lm_head.weight"].std() < 0.025
    assert 0.9 < named["h.1.ln_1.weight"].mean() < 1.1


def test_rates_are_those_of_the_device() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32, 1 << 20, 64)
    assert 1e6 < rates.bytes_per_s < 1e13
    assert 1e6 < rates.operations_per_s < 1e14


def test_sequences_are_compared_up_to_their_first_difference() -> None:
    def event(token_id: int, *best: int) -> TokenEvent:
        return TokenEvent("", 0, token_id, -1.0, top_logprobs=[(other, -1.0) for other in best])

    expected = [[event(1, 1, 2), event(3, 3, 4)], [event(1, 1, 2)], [event(1, 1, 2), event(9, 9)], [event(1, 1, 2)]]
    found = [[event(1, 1, 2), event(3, 3, 4)], [event(2, 2, 1)], [event(2, 2, 1), event(5, 5)], [event(8, 8, 1)]]
    assert compare(expected, found) == (1, 3, 2)


def test_the_demos_tokens_are_chosen_on_the_device_with_steps_scheduled_ahead(one_torch_thread: None) -> None:
    (stage,) = random_stages(TINY, 1, torch.float32, torch.device("cpu"))
    spec = StageSpec(
        stage.span, 64, 4, torch.float32, torch.device("cpu"), TINY.vocab_size,
        max_num_sequences=64, max_microbatch_tokens=512,
    )  # fmt: skip
    device = FakeDevice()
    on_device = GPUStageRunner(stage, spec, ReferenceLayers(stage, 64, 4), device, GreedySampler())
    prompts = list(random_prompts(3, 5, TINY.vocab_size))
    comparison = Comparison(StageRunner(stage, spec), prompts, 6)
    num_replayed = device.num_replayed
    found = comparison.of(on_device)
    assert found._replace(rows_ahead=0) == (3, 3, 3, 0, 0, 0)
    assert found.rows_ahead > 0
    assert device.num_replayed > num_replayed + 10
    with torch.no_grad():
        stage.lm_head.weight.neg_()
    changed = comparison.of(on_device)
    assert (changed.greedy_same, changed.different_again) == (0, 3)
    assert changed.drawn_same < 3


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line() -> None:
    done = run("--only", "decode")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "There is no CUDA device here: all parts but filling need one (--only filling).\n"


def test_help_and_filling_need_no_gpu(tmp_path: Path) -> None:
    assert "first-token" in run("--help").stdout
    done = run("--only", "filling", "--output", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {
        f"filling a step of {rows} rows of {blocks} blocks" for rows in (1, 32, 256) for blocks in (16, 64)
    }


def test_an_unknown_part_is_named() -> None:
    assert "decoding" in run("--only", "decoding").stderr
