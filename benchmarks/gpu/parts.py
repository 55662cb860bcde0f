"""What is measured, part by part. Each figure is printed as soon as it is there, beside its bound or its peer."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.engines import Engines, Times
from benchmarks.gpu.machine import Rates, sums_as_by_torchs_default
from benchmarks.gpu.peer import Peer
from benchmarks.speed.models import Cost, Precision, decode_cost, prefill_cost
from gptj_serve.model.config import GPTJConfig

Prompts = Callable[[int, int], Sequence[list[int]]]
"""(how many, of how many tokens)"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is measured; those of the command line are for GPT-J 6B."""

    prompt: int = 128
    new: int = 128
    long_prompt: int = 2000
    long_new: int = 48
    batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    long_batches: tuple[int, ...] = (8, 32)
    peer_batch: int = 64
    num_beams: int = 4
    num_beam_requests: int = 32
    stages: tuple[int, ...] = (1, 2, 4)
    rounds: int = 3


@dataclass(slots=True)
class Bench:
    config: GPTJConfig
    precision: Precision
    dtype: torch.dtype
    device: torch.device
    rates: Rates
    engines: Engines
    prompts: Prompts
    sizes: Sizes = field(default_factory=Sizes)
    figures: dict[str, float] = field(default_factory=dict)

    def say(self, name: str, value: float, unit: str, **beside: float) -> None:
        self.figures[name] = value
        parts = [f"{label} {number:.3g}" for label, number in beside.items()]
        self.figures |= {f"{name}, {label}": number for label, number in beside.items()}
        print(f"{name}: {value:.4g} {unit}".ljust(60), "  ".join(parts), flush=True)

    def bound_s(self, cost: Cost) -> float:
        return cost.bound_s(self.rates.bytes_per_s, self.rates.operations_per_s)

    def bound_of_batch_s(self, batch: int, prompt: int, new: int) -> float:
        """All prompts, then all steps, each as fast as bytes and operations allow."""
        prefill_s = self.bound_s(prefill_cost(self.config, self.precision, batch, prompt))
        steps = (self.bound_s(decode_cost(self.config, self.precision, batch, prompt + n)) for n in range(1, new))
        return prefill_s + sum(steps)

    def batch(self, batch: int, prompt: int, new: int, **options: int) -> Times:
        """The fastest of the rounds; before them one to warm up."""
        prompts = self.prompts(batch, prompt)
        runs = [self.engines.run(prompts, new, **options) for _ in range(self.sizes.rounds + 1)]
        return min(runs[1:], key=lambda times: max(times.lasts))


def decode(bench: Bench) -> None:
    """One sequence: the bandwidth's bound."""
    sizes = bench.sizes
    step_s = bench.batch(1, sizes.prompt, sizes.new).step_s
    cost = decode_cost(bench.config, bench.precision, 1, sizes.prompt + sizes.new // 2)
    bound_s = bench.bound_s(cost)
    bench.say("batch 1, step", step_s * 1e3, "ms", **{"bound ms": bound_s * 1e3, "of bound": bound_s / step_s})


def first_token(bench: Bench) -> None:
    for prompt in (bench.sizes.prompt, bench.sizes.long_prompt):
        prompts = bench.prompts(1, prompt)
        times = [bench.engines.run(prompts, 1).firsts[0] for _ in range(2 * bench.sizes.rounds + 1)]
        first_s = statistics.median(times[1:])
        bound_s = bench.bound_s(prefill_cost(bench.config, bench.precision, 1, prompt))
        beside = {"bound ms": bound_s * 1e3, "of bound": bound_s / first_s}
        bench.say(f"first token of {prompt}", first_s * 1e3, "ms", **beside)


def throughput(bench: Bench) -> None:
    sizes = bench.sizes
    for prompt, new, batches in (
        (sizes.prompt, sizes.new, sizes.batches),
        (sizes.long_prompt, sizes.long_new, sizes.long_batches),
    ):
        best = 0.0
        for batch in batches:
            rate = bench.batch(batch, prompt, new).tokens_per_s
            bound = batch * new / bench.bound_of_batch_s(batch, prompt, new)
            best = max(best, rate)
            beside = {"bound": bound, "of bound": rate / bound}
            bench.say(f"{prompt} in, {new} out, batch {batch}", rate, "tokens/s", **beside)
        bench.say(f"{prompt} in, {new} out, best batch", best, "tokens/s")


def beams(bench: Bench) -> None:
    sizes = bench.sizes
    times = bench.batch(sizes.num_beam_requests, sizes.prompt, sizes.new, num_beams=sizes.num_beams)
    rate = sizes.num_beam_requests / max(times.lasts)
    bench.say(f"{sizes.num_beams} beams, {sizes.new} out", rate, "requests/s")


def peer(bench: Bench) -> None:
    sizes = bench.sizes
    ours = bench.batch(sizes.peer_batch, sizes.prompt, sizes.new).tokens_per_s
    them = Peer(bench.config, bench.dtype, bench.device)
    with sums_as_by_torchs_default():
        theirs = them.tokens_per_s(bench.prompts(sizes.peer_batch, sizes.prompt), sizes.new)
    print(f"transformers generates with attention: {them.attention}")
    beside = {"transformers": theirs, "ratio": ours / theirs}
    bench.say(f"{sizes.prompt} in, {sizes.new} out, batch {sizes.peer_batch}, ours", ours, "tokens/s", **beside)


def stages(bench: Bench) -> None:
    sizes, alone = bench.sizes, 0.0
    for num_stages in sizes.stages:
        bench.engines.close()
        rate = bench.batch(sizes.peer_batch, sizes.prompt, sizes.new, num_stages=num_stages).tokens_per_s
        alone = alone or rate
        handoffs = [status["handoff_s"] for status in bench.engines.pipeline(num_stages).stage_statuses()[1:]]
        beside = {"of one stage's": rate / alone}
        if handoffs:
            beside["handoff us"] = statistics.mean(handoffs) * 1e6
        bench.say(f"{num_stages} stages on the device, batch {sizes.peer_batch}", rate, "tokens/s", **beside)


PARTS: dict[str, Callable[[Bench], None]] = {
    "decode": decode,
    "first-token": first_token,
    "throughput": throughput,
    "beams": beams,
    "peer": peer,
    "stages": stages,
}
