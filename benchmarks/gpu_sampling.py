"""The choice of tokens on a GPU: `python -m benchmarks.gpu_sampling`.

Times are those of CUDA graphs of the sampler alone, over the same logits again: in service too they have just been
written, and those of some rows are in the cache. The bound is reading them once from memory, at the rate of a copy.
`engine.sampling` on the same device, and the sampler for edited rows, are timed by the clock, since the host waits in
them. Then tokens are compared with those that the engine chooses on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gpu.machine import fastest_s, measure_rates
from benchmarks.gpu_kernels import Clock, seconds_in_a_graph
from gptj_serve.engine.sampling import sample
from gptj_serve.steps import LogitEdits, SampleSpec
from gptj_serve.types import Warpers

WARPERS = {
    "greedy": Warpers(),
    "temperature 0.8": Warpers(temperature=0.8),
    "top-k 50": Warpers(temperature=0.8, top_k=50),
    "top-p 0.9": Warpers(temperature=0.8, top_p=0.9),
    "top-p 0.99 at temperature 1.5": Warpers(temperature=1.5, top_p=0.99),
    "top-k 50 and top-p 0.9": Warpers(temperature=0.8, top_k=50, top_p=0.9),
    "min-p 0.05": Warpers(temperature=0.8, min_p=0.05),
}

DTYPES = (torch.bfloat16, torch.float32)

console = Console(width=120)


@dataclass(frozen=True)
class Shapes:
    width: int = 50_400
    num_token_ids: int = 50_257
    num_rows: Sequence[int] = (1, 8, 32, 128, 256)
    num_edited_rows: Sequence[int] = (1, 8, 32)
    num_seen: int = 500  # tokens of a row that a repetition penalty applies to
    num_compared_rows: int = 64
    copied_bytes: int = 4 << 30


def main(num_steps: Annotated[int, typer.Option(min=1, help="Of 64 rows to be compared, for each kind.")] = 20) -> None:
    """Time the sampler, and compare its tokens with the engine's on the CPU: some minutes."""
    if not torch.cuda.is_available():
        typer.echo("benchmarks.gpu_sampling needs a GPU: torch.cuda.is_available() is False here", err=True)
        raise typer.Exit(1)
    GPUSampling(torch.device("cuda"), Shapes(), seconds_in_a_graph).measure(num_steps)


class GPUSampling:
    def __init__(self, device: torch.device, shapes: Shapes, clock: Clock) -> None:
        from gptj_serve.kernels.gpu.sampling import DeviceSampler

        self._device, self._shapes, self._seconds = device, shapes, clock
        self._sampler = DeviceSampler()

    @torch.inference_mode()
    def measure(self, num_steps: int) -> None:
        bytes_per_s = measure_rates(self._device, torch.float32, self._shapes.copied_bytes, 64).bytes_per_s
        console.print(f"reads {bytes_per_s / 1e12:.2f} TB/s")
        for dtype in DTYPES:
            self.time(dtype, bytes_per_s)
        self.time_edited()
        different = self.count_different(num_steps)
        table = Table("tokens that differ from the CPU's", *map(str, DTYPES), "of each")
        for name, counts in different.items():
            table.add_row(name, *map(str, counts), str(num_steps * self._shapes.num_compared_rows))
        console.print(table)

    def time(self, dtype: torch.dtype, bytes_per_s: float) -> None:
        table = Table(f"{dtype}, rows", *(f"{n} µs" for n in self._shapes.num_rows))
        for name, warpers in WARPERS.items():
            taken = [self._seconds_of(warpers, num_rows, dtype) for num_rows in self._shapes.num_rows]
            table.add_row(name, *(f"{t * 1e6:.1f}" for t in taken))
        row_s = self._shapes.width * dtype.itemsize / bytes_per_s
        table.add_row("bound", *(f"{n * row_s * 1e6:.1f}" for n in self._shapes.num_rows))
        console.print(table)

    def _seconds_of(self, warpers: Warpers, num_rows: int, dtype: torch.dtype) -> float:
        logits, specs = self._logits(num_rows, dtype, 0), _specs(warpers, num_rows)
        parameters, mode = self._described(specs, 0)
        return self._seconds(lambda: self._sampler.sample(logits, self._shapes.num_token_ids, parameters, mode))

    def time_edited(self) -> None:
        from gptj_serve.kernels.gpu.edited_sampling import sample_on_gpu

        num_token_ids = self._shapes.num_token_ids
        seen = list(range(0, num_token_ids, max(1, num_token_ids // self._shapes.num_seen)))
        edits = LogitEdits(repetition_penalty=1.1, seen_token_ids=seen, banned_token_ids=[0])
        table = Table("rows with edits and top-p 0.9, waited for", "engine.sampling ms", "sample_on_gpu ms")
        for num_rows in self._shapes.num_edited_rows:
            logits = self._logits(num_rows, torch.bfloat16, 0)[:, :num_token_ids]
            specs = [SampleSpec(WARPERS["top-p 0.9"], edits=edits, num_top_logprobs=5)] * num_rows
            engines = fastest_s(self._device, lambda: sample(logits, specs, [0] * len(specs)))  # noqa: B023
            ours = fastest_s(self._device, lambda: sample_on_gpu(logits, specs, [0] * len(specs)))  # noqa: B023
            table.add_row(str(num_rows), f"{engines * 1e3:.2f}", f"{ours * 1e3:.2f}")
        console.print(table)

    def count_different(self, num_steps: int) -> dict[str, list[int]]:
        """By kind of draw, for each dtype."""
        num_rows = self._shapes.num_compared_rows
        return {
            name: [
                sum(self._num_different(_specs(warpers, num_rows), dtype, step) for step in range(num_steps))
                for dtype in DTYPES
            ]
            for name, warpers in WARPERS.items()
        }

    def _num_different(self, specs: Sequence[SampleSpec], dtype: torch.dtype, step: int) -> int:
        num_token_ids = self._shapes.num_token_ids
        logits = self._logits(len(specs), dtype, step)
        parameters, mode = self._described(specs, step)
        ours = self._sampler.sample(logits, num_token_ids, parameters, mode)[0].tolist()
        wanted = sample(logits[:, :num_token_ids].cpu(), specs, [step] * len(specs))
        return sum(result.tokens[0].token_id != token_id for result, token_id in zip(wanted, ours, strict=True))

    def _described(self, specs: Sequence[SampleSpec], position: int) -> tuple[Tensor, int]:
        parameters = torch.empty(self._sampler.num_fields, len(specs), dtype=torch.int64)
        mode = self._sampler.write(parameters, specs, [position] * len(specs))
        return parameters.to(self._device), mode

    def _logits(self, num_rows: int, dtype: torch.dtype, seed: int) -> Tensor:
        """Probabilities fall with the rank as in a text, in another order of tokens for each row."""
        generator = torch.Generator(self._device).manual_seed(seed)
        shape = (num_rows, self._shapes.width)
        ranks = torch.rand(shape, generator=generator, device=self._device).argsort(dim=-1)
        noise = torch.randn(shape, generator=generator, device=self._device)
        return (10 - 1.2 * (1 + ranks).log() + 0.3 * noise).to(dtype)


def _specs(warpers: Warpers, num_rows: int) -> list[SampleSpec]:
    return [SampleSpec(warpers, seed=seed) for seed in range(num_rows)]


if __name__ == "__main__":
    typer.run(main)
