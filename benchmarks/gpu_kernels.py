"""The kernels of GPT-J 6B's layers on a GPU, by tile sizes: `python -m benchmarks.gpu_kernels`.

Every figure is of a CUDA graph. Attention goes over KV of several layers in turn, and whole layers over more weights
than a cache holds, so that they come from memory. What `elements` passes over was written just before, as in a step: it
may come from a cache, and take less than its bound, which is memory's. A bound is bytes by the rate of a copy, or
operations by that of torch's product, both measured first. The choice of `kernels/gpu/tiles.py` is marked with a star.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.machine import described_sums
from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.kernels.gpu.tiles import Tile, Tiles, capability_of, choose_tiles, num_multiprocessors
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.stage_runner import sum_in_fp32

if TYPE_CHECKING:
    from gptj_serve.kernels.gpu.layers import GPULayers

BLOCK_SIZE = 16

Part = Literal["all", "decode", "chunk", "elements", "layer"]
Clock = Callable[[Callable[[], object]], float]
"""How many seconds a call takes."""

console = Console(width=120)


@dataclass(frozen=True)
class Scenarios:
    decoding: Sequence[tuple[int, int]] = ((1, 300), (1, 2000), (8, 1000), (32, 600), (128, 300))  # rows, their context
    chunks: Sequence[tuple[int, int]] = ((0, 512), (1500, 512), (0, 2048))  # start and tokens
    mixed: tuple[tuple[int, int], tuple[int, int]] = ((32, 600), (0, 512))  # one of each, for a whole layer
    num_tokens: Sequence[int] = (1, 64, 2048)  # of the kernels that pass over each number once
    decode_tiles: Sequence[Tile] = tuple(
        Tile(16, n, warps, stages) for n in (32, 64, 128) for warps in (4, 8) for stages in (3, 5)
    )
    chunk_tiles: Sequence[Tile] = (
        *(Tile(64, n, warps, stages) for n in (32, 64) for warps in (4, 8) for stages in (2, 3)),
        *(Tile(128, n, 8, stages) for n in (32, 64) for stages in (2, 3, 5)),
        Tile(128, 128, 8, 2),
    )
    elements: Sequence[int] = (512, 1024, 2048, 4096)
    cache_bytes: int = 256 << 20  # of keys and values that are read in turn: several times any cache


def main(
    part: Annotated[Part, typer.Option(help="What to measure.")] = "all",
    dtype: Annotated[Literal["bfloat16", "float16"], typer.Option()] = "bfloat16",
    heads: Annotated[int, typer.Option(min=1)] = 16,
    head_dim: Annotated[int, typer.Option(min=16)] = 256,
) -> None:
    """Time the kernels of a layer of GPT-J 6B's shape with each of the candidate tiles: some two minutes."""
    if not torch.cuda.is_available():
        typer.echo("benchmarks.gpu_kernels needs a GPU: torch.cuda.is_available() is False here", err=True)
        raise typer.Exit(1)
    sum_in_fp32()
    console.print(described_sums())
    GPUKernels(torch.device("cuda"), getattr(torch, dtype), heads, head_dim).measure(part)


class GPUKernels:
    """The device, what it can do, and the shape of a layer."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int,
        scenarios: Scenarios = Scenarios(), clock: Clock | None = None, num_probed: int = 8192,
    ) -> None:  # fmt: skip
        """`num_probed`: rows and columns of the product that shows what the device can do."""
        self.device, self.dtype, self.scenarios = device, dtype, scenarios
        self.config = GPTJConfig(n_embd=num_heads * head_dim, n_head=num_heads, n_layer=2, rotary_dim=min(64, head_dim))
        self.tiles = choose_tiles(capability_of(device), dtype, head_dim)
        self.seconds = clock or seconds_in_a_graph
        source = torch.empty(num_probed, num_probed << 3, dtype=torch.int8, device=device)
        target, square = torch.empty_like(source), torch.randn(num_probed, num_probed, device=device).to(dtype)
        self.bytes_per_s = 2 * source.nbytes / self.seconds(partial(target.copy_, source))
        self.operations_per_s = 2 * num_probed**3 / self.seconds(partial(torch.mm, square, square))
        rate, speed = self.bytes_per_s / 1e12, self.operations_per_s / 1e12
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        console.print(f"{name}, torch {torch.__version__}: a copy {rate:.2f} TB/s, a product {speed:.0f} TFLOP/s")

    @torch.inference_mode()
    def measure(self, part: Part) -> None:
        measures = {"decode": self.decode, "chunk": self.chunk, "elements": self.elements, "layer": self.layer}
        for name, measure in measures.items():
            if part in ("all", name):
                measure()

    def decode(self) -> None:
        """Rows of one token: bound by reading their contexts."""
        num_bytes = [
            rows * context * 2 * self.config.n_embd * self.dtype.itemsize for rows, context in self.scenarios.decoding
        ]
        bounds = [n / self.bytes_per_s for n in num_bytes]
        names = [f"{rows} x {context}" for rows, context in self.scenarios.decoding]
        rows = [self.rows([(context - 1, 1)] * n) for n, context in self.scenarios.decoding]
        candidates = {tile: Tiles(tile, self.tiles.chunk) for tile in self.scenarios.decode_tiles}
        self.attention("attention, rows x context", names, rows, bounds, candidates, self.tiles.decode)

    def chunk(self) -> None:
        """Bound by products: 4 * Dh operations for each head, query and visible key."""
        pairs = [tokens * (start + (tokens + 1) / 2) for start, tokens in self.scenarios.chunks]
        bounds = [4 * self.config.n_embd * n / self.operations_per_s for n in pairs]
        names = [f"{start} + {tokens}" for start, tokens in self.scenarios.chunks]
        rows = [self.rows([chunk]) for chunk in self.scenarios.chunks]
        candidates = {tile: Tiles(self.tiles.decode, tile) for tile in self.scenarios.chunk_tiles}
        self.attention("attention, start + tokens", names, rows, bounds, candidates, self.tiles.chunk)

    def attention(
        self, title: str, names: Sequence[str], microbatches: Sequence[DeviceRows], bounds: Sequence[float],
        candidates: dict[Tile, Tiles], chosen: Tile,
    ) -> None:  # fmt: skip
        columns = [self.attention_seconds(rows, list(candidates.values())) for rows in microbatches]
        table = Table(title, *(f"{name} µs" for name in names), "of bound")
        for tile, taken in zip(candidates, zip(*columns, strict=True), strict=True):
            cells = ["does not fit" if t is None else f"{t * 1e6:.1f}" for t in taken]
            shares = ["-" if t is None else f"{bound / t:.2f}" for t, bound in zip(taken, bounds, strict=True)]
            star = " *" if tile == chosen else ""
            name = f"{tile.m}x{tile.n} warps {tile.num_warps} stages {tile.num_stages}{star}"
            table.add_row(name, *cells, " ".join(shares))
        table.add_row("bound", *(f"{bound * 1e6:.1f}" for bound in bounds), "")
        console.print(table)

    def attention_seconds(self, rows: DeviceRows, candidates: Sequence[Tiles]) -> list[float | None]:
        """Of one layer, with each; None for what the device refuses."""
        from triton.runtime.errors import OutOfResources

        from gptj_serve.kernels.gpu.attention import Attention

        num_heads, head_dim, width = self.config.n_head, self.config.head_dim, self.config.n_embd
        num_blocks = 1 + int(rows.block_tables.max())
        layer_bytes = 2 * num_blocks * BLOCK_SIZE * width * self.dtype.itemsize
        num_layers = max(2, -(-self.scenarios.cache_bytes // layer_bytes))
        shape = (num_layers, num_blocks, num_heads, BLOCK_SIZE, head_dim)
        keys, values = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(2))
        q = torch.randn(rows.num_tokens, width, device=self.device).to(self.dtype)
        out, num_sms = torch.empty_like(q), num_multiprocessors(self.device)
        taken: list[float | None] = []
        for tiles in candidates:
            attention = Attention(rows, num_heads, head_dim, BLOCK_SIZE, tiles, num_sms)

            def all_layers(attention: Attention = attention) -> None:
                for layer in range(num_layers):
                    attention(q, keys[layer], values[layer], out)

            try:
                taken.append(self.seconds(all_layers) / num_layers)
            except OutOfResources:
                taken.append(None)
        return taken

    def elements(self) -> None:
        """The two kernels that pass over each number once."""
        from gptj_serve.kernels.gpu.inward import InwardShape, finish_inward
        from gptj_serve.kernels.gpu.norm import add_and_norm
        from gptj_serve.model.block import RotaryTable

        config, device, dtype = self.config, self.device, self.dtype
        shape = InwardShape(
            config.n_head, config.head_dim, config.rotated_dim, config.inner_dim, BLOCK_SIZE, config.activation_function
        )
        rotary, width, inner = RotaryTable(config, device), config.n_embd, config.inner_dim
        vector = torch.zeros(inner, dtype=dtype, device=device)
        table = Table(
            "other kernels, tokens",
            *(f"{n} {name} µs" for n in self.scenarios.num_tokens for name in ("norm", "inward")),
        )
        bounds = [
            n * count * dtype.itemsize / self.bytes_per_s
            for n in self.scenarios.num_tokens
            for count in (4 * width, 6 * width + 2 * inner)
        ]
        for elements in self.scenarios.elements:
            cells = []
            for num_tokens in self.scenarios.num_tokens:
                rows = self.rows([(0, num_tokens)])
                hidden, addend, out = (torch.randn(num_tokens, width, device=device).to(dtype) for _ in range(3))
                product = torch.randn(num_tokens, 3 * width + inner, device=device).to(dtype)
                operands = torch.empty(num_tokens, width + inner, dtype=dtype, device=device)
                cache = (int(rows.block_tables.max()) + 1, config.n_head, BLOCK_SIZE, config.head_dim)
                keys, values = (torch.zeros(cache, dtype=dtype, device=device) for _ in range(2))
                norm = partial(add_and_norm, hidden, addend, vector, hidden, vector, vector, 1e-5, out, elements)
                tables = (rotary.sin, rotary.cos)
                inward = partial(finish_inward, product, rows, shape, vector, *tables, keys, values, operands, elements)
                cells += [f"{self.seconds(call) * 1e6:.1f}" for call in (norm, inward)]
            table.add_row(f"{elements}{' *' if elements == self.tiles.elements else ''}", *cells)
        table.add_row("bound", *(f"{bound * 1e6:.1f}" for bound in bounds))
        console.print(table)

    def layer(self) -> None:
        """A whole layer, bound by its weights and KV or by its operations."""
        decoding = {f"decode {n} x {context}": [(context - 1, 1)] * n for n, context in self.scenarios.decoding}
        chunks = {f"chunk {start} + {tokens}": [(start, tokens)] for start, tokens in self.scenarios.chunks}
        (n, context), chunk = self.scenarios.mixed
        mixed = {f"decode {n} x {context} and chunk {chunk[0]} + {chunk[1]}": [(context - 1, 1)] * n + [chunk]}
        microbatches = {**decoding, **chunks, **mixed}
        described = {name: self.rows(spans) for name, spans in microbatches.items()}
        layers = self.random_layers(1 + max(int(rows.block_tables.max()) for rows in described.values()))
        weights = layers.weight_bytes / self.config.n_layer
        table = Table("a layer", "ours µs", "bound µs", "of bound")
        for name, spans in microbatches.items():
            rows = described[name]
            hidden = torch.randn(rows.num_tokens, self.config.n_embd, device=self.device).to(self.dtype)
            taken = self.seconds(partial(layers.run, hidden, rows)) / self.config.n_layer
            context = sum(start + tokens for start, tokens in spans)
            pairs = sum(tokens * (start + (tokens + 1) / 2) for start, tokens in spans)
            num_bytes = weights + 2 * context * self.config.n_embd * self.dtype.itemsize
            operations = 2 * weights / self.dtype.itemsize * rows.num_tokens + 4 * self.config.n_embd * pairs
            bound = max(num_bytes / self.bytes_per_s, operations / self.operations_per_s)
            table.add_row(name, f"{taken * 1e6:.1f}", f"{bound * 1e6:.1f}", f"{bound / taken:.2f}")
        console.print(table)

    def random_layers(self, num_blocks: int) -> "GPULayers":
        from gptj_serve.kernels.gpu.layers import GPULayers
        from gptj_serve.kernels.gpu.weights import GPUBlock
        from gptj_serve.model.block import GPTJBlock

        with self.device:
            blocks = [GPUBlock(GPTJBlock(self.config).to(self.dtype)) for _ in range(self.config.n_layer)]
        return GPULayers(self.config, blocks, num_blocks, BLOCK_SIZE, self.dtype, self.device)

    def rows(self, spans: Sequence[tuple[int, int]]) -> DeviceRows:
        """(start, tokens) of each row; no two share a block."""
        max_blocks = max(-(-(start + tokens) // BLOCK_SIZE) for start, tokens in spans)
        positions = torch.cat([torch.arange(start, start + tokens) for start, tokens in spans])
        row = torch.cat([torch.full((tokens,), index) for index, (_, tokens) in enumerate(spans)])
        tables = torch.randperm(len(spans) * max_blocks).view(len(spans), max_blocks)
        slots = tables[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = torch.tensor([0, *(tokens for _, tokens in spans)]).cumsum(0)
        contexts = torch.tensor([start + tokens for start, tokens in spans])
        tensors = (torch.zeros_like(positions), positions, slots, starts, contexts, tables)
        return DeviceRows(*(part.to(self.device, torch.int32) for part in tensors), max(n for _, n in spans))


def seconds_in_a_graph(call: Callable[[], object]) -> float:
    """Median of its runs."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=20, return_mode="median") / 1e3


if __name__ == "__main__":
    typer.run(main)
