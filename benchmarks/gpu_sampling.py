"""The choice of tokens on a GPU: `python -m benchmarks.gpu_sampling`.

Times are those of CUDA graphs of the sampler alone, over the same logits again: in service too they have just been
written, and those of some rows are in the cache. The bound is reading them once from memory, at the rate of a copy.
`engine.sampling` on the same device, and the sampler for edited rows, are timed by the clock, since the host waits in
them. Then tokens are compared with those that the engine chooses on the CPU.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gpu_kernels import copy_rate, seconds
from gptj_serve.engine.sampling import sample
from gptj_serve.steps import LogitEdits, SampleSpec
from gptj_serve.types import Warpers

WIDTH, NUM_TOKEN_IDS = 50_400, 50_257
NUM_ROWS = (1, 8, 32, 128, 256)

WARPERS = {
    "greedy": Warpers(),
    "temperature 0.8": Warpers(temperature=0.8),
    "top-k 50": Warpers(temperature=0.8, top_k=50),
    "top-p 0.9": Warpers(temperature=0.8, top_p=0.9),
    "top-p 0.99 at temperature 1.5": Warpers(temperature=1.5, top_p=0.99),
    "top-k 50 and top-p 0.9": Warpers(temperature=0.8, top_k=50, top_p=0.9),
    "min-p 0.05": Warpers(temperature=0.8, min_p=0.05),
}

EDITED = LogitEdits(repetition_penalty=1.1, seen_token_ids=list(range(0, 50_000, 100)), banned_token_ids=[50_256])

console = Console(width=120)


def main(
    num_compared: Annotated[int, typer.Option(min=1, help="Steps of 64 rows, for each kind of draw.")] = 20,
) -> None:
    """Time the sampler, and compare its tokens with the engine's: some three minutes."""
    if not torch.cuda.is_available():
        typer.echo("benchmarks.gpu_sampling needs a GPU: torch.cuda.is_available() is False here", err=True)
        raise typer.Exit(1)
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            time_graphs(dtype, copy_rate(torch.device("cuda")))
        time_calls()
        compare(num_compared)


def logits_of(num_rows: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[num_rows, WIDTH]: probabilities fall with the rank as in a text, in another order of tokens for each row."""
    generator = torch.Generator("cuda").manual_seed(seed)
    ranks = torch.rand(num_rows, WIDTH, generator=generator, device="cuda").argsort(dim=-1)
    noise = torch.randn(num_rows, WIDTH, generator=generator, device="cuda")
    return (10 - 1.2 * (1 + ranks).log() + 0.3 * noise).to(dtype)


def specs_of(warpers: Warpers, num_rows: int) -> list[SampleSpec]:
    return [SampleSpec(warpers, seed=seed) for seed in range(num_rows)]


def time_graphs(dtype: torch.dtype, bytes_per_s: float) -> None:
    from gptj_serve.kernels.gpu.sampling import DeviceSampler

    sampler = DeviceSampler()
    table = Table(f"{dtype}, rows", *(f"{n} µs" for n in NUM_ROWS))
    for name, warpers in WARPERS.items():
        cells = []
        for num_rows in NUM_ROWS:
            logits = logits_of(num_rows, dtype, 0)
            parameters = torch.empty(sampler.num_fields, num_rows, dtype=torch.int64)
            mode = sampler.write(parameters, specs_of(warpers, num_rows), [100] * num_rows)
            on_device = parameters.cuda()

            taken = seconds(lambda: sampler.sample(logits, NUM_TOKEN_IDS, on_device, mode))  # noqa: B023
            cells.append(f"{taken * 1e6:.1f}")
        table.add_row(name, *cells)
    table.add_row("bound", *(f"{n * WIDTH * dtype.itemsize / bytes_per_s * 1e6:.1f}" for n in NUM_ROWS))
    console.print(table)


def time_calls() -> None:
    from gptj_serve.kernels.gpu.edited_sampling import sample_on_gpu

    table = Table("rows with edits and top-p 0.9, waited for", "engine.sampling ms", "sample_on_gpu ms")
    for num_rows in (1, 8, 32):
        logits = logits_of(num_rows, torch.bfloat16, 0)[:, :NUM_TOKEN_IDS]
        specs = [SampleSpec(WARPERS["top-p 0.9"], edits=EDITED, num_top_logprobs=5) for _ in range(num_rows)]
        calls = [lambda call=call: call(logits, specs, [100] * num_rows) for call in (sample, sample_on_gpu)]  # noqa: B023
        table.add_row(str(num_rows), *(f"{1e3 * by_the_clock(call):.2f}" for call in calls))
    console.print(table)


def by_the_clock(call: Callable[[], object], num_runs: int = 30) -> float:
    for _ in range(5):
        call()
    taken = []
    for _ in range(num_runs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def compare(num_steps: int) -> None:
    from gptj_serve.kernels.gpu.sampling import DeviceSampler

    sampler = DeviceSampler()
    table = Table("tokens that differ from the CPU's", "bfloat16", "float32", "of")
    for name, warpers in WARPERS.items():
        cells = []
        for dtype in (torch.bfloat16, torch.float32):
            num_different = 0
            for step in range(num_steps):
                logits, specs = logits_of(64, dtype, step), specs_of(warpers, 64)
                parameters = torch.empty(sampler.num_fields, 64, dtype=torch.int64)
                mode = sampler.write(parameters, specs, [step] * 64)
                ours = sampler.sample(logits, NUM_TOKEN_IDS, parameters.cuda(), mode)[0].tolist()
                wanted = sample(logits[:, :NUM_TOKEN_IDS].cpu(), specs, [step] * 64)
                num_different += sum(
                    result.tokens[0].token_id != ours_of for result, ours_of in zip(wanted, ours, strict=True)
                )
            cells.append(str(num_different))
        table.add_row(name, *cells, str(64 * num_steps))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
