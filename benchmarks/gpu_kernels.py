"""The kernels of GPT-J 6B's layers on a GPU, by tile sizes: `python -m benchmarks.gpu_kernels`.

Every figure is of a CUDA graph, over KV of several layers in turn, so that it comes from memory and not from a cache.
A bound is bytes by the rate of a copy, or operations by that of torch's product, both measured first. The choice of
`kernels/gpu/tiles.py` is marked with a star.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.kernels.gpu.tiles import Tile, Tiles, capability_of, choose_tiles, num_multiprocessors
from gptj_serve.model.config import GPTJConfig

if TYPE_CHECKING:
    from gptj_serve.kernels.gpu.layers import GPULayers

BLOCK_SIZE = 16
CACHE_BYTES = 256 << 20
"""Of keys and values that are read in turn: several times any cache."""

DECODE_TILES = [Tile(16, n, warps, stages) for n in (32, 64, 128) for warps in (4, 8) for stages in (3, 5)]
CHUNK_TILES = [
    *(Tile(64, n, warps, stages) for n in (32, 64) for warps in (4, 8) for stages in (2, 3)),
    *(Tile(128, n, 8, stages) for n in (32, 64) for stages in (2, 3, 5)),
    Tile(128, 128, 8, 2),
]
ELEMENTS = [512, 1024, 2048, 4096]

DECODING = [(1, 300), (1, 2000), (8, 1000), (32, 600), (128, 300)]
"""(rows, context of each)"""

CHUNKS = [(0, 512), (1500, 512), (0, 2048)]
"""(start, tokens) of a prompt's chunk"""

Part = Literal["all", "decode", "chunk", "elements", "layer"]
console = Console(width=120)


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
    GPUKernels(getattr(torch, dtype), heads, head_dim).measure(part)


class GPUKernels:
    """The device, what it can do, and the shape of a layer."""

    def __init__(self, dtype: torch.dtype, num_heads: int, head_dim: int) -> None:
        self.device = torch.device("cuda")
        self.dtype = dtype
        self.config = GPTJConfig(n_embd=num_heads * head_dim, n_head=num_heads, n_layer=2, rotary_dim=min(64, head_dim))
        self.tiles = choose_tiles(capability_of(self.device), dtype, head_dim)
        self.bytes_per_s, self.operations_per_s = copy_rate(self.device), product_rate(self.device, dtype)
        name, rate, speed = torch.cuda.get_device_name(), self.bytes_per_s / 1e12, self.operations_per_s / 1e12
        console.print(f"{name}, torch {torch.__version__}: a copy {rate:.2f} TB/s, a product {speed:.0f} TFLOP/s")

    @torch.inference_mode()
    def measure(self, part: Part) -> None:
        measures = {"decode": self.decode, "chunk": self.chunk, "elements": self.elements, "layer": self.layer}
        for name, measure in measures.items():
            if part in ("all", name):
                measure()

    def decode(self) -> None:
        """Rows of one token: bound by reading their contexts."""
        num_bytes = [rows * context * 2 * self.config.n_embd * self.dtype.itemsize for rows, context in DECODING]
        bounds = [n / self.bytes_per_s for n in num_bytes]
        names = [f"{rows} x {context}" for rows, context in DECODING]
        rows = [self.rows([(context - 1, 1)] * n) for n, context in DECODING]
        candidates = {tile: Tiles(tile, self.tiles.chunk) for tile in DECODE_TILES}
        self.attention("attention, rows x context", names, rows, bounds, candidates, self.tiles.decode)

    def chunk(self) -> None:
        """Bound by products: 4 * Dh operations for each head, query and visible key."""
        pairs = [tokens * (start + (tokens + 1) / 2) for start, tokens in CHUNKS]
        bounds = [4 * self.config.n_embd * n / self.operations_per_s for n in pairs]
        names = [f"{start} + {tokens}" for start, tokens in CHUNKS]
        rows = [self.rows([chunk]) for chunk in CHUNKS]
        candidates = {tile: Tiles(self.tiles.decode, tile) for tile in CHUNK_TILES}
        self.attention("attention, start + tokens", names, rows, bounds, candidates, self.tiles.chunk)

    def attention(
        self, title: str, names: Sequence[str], microbatches: Sequence[DeviceRows], bounds: Sequence[float],
        candidates: dict[Tile, Tiles], chosen: Tile,
    ) -> None:  # fmt: skip
        from gptj_serve.kernels.gpu.attention import Attention

        num_heads, head_dim, width = self.config.n_head, self.config.head_dim, self.config.n_embd
        num_blocks = 1 + max(int(rows.block_tables.max()) for rows in microbatches)
        block_bytes = 2 * BLOCK_SIZE * width * self.dtype.itemsize
        num_layers = max(2, -(-CACHE_BYTES // (num_blocks * block_bytes)))
        shape = (num_layers, num_blocks, num_heads, BLOCK_SIZE, head_dim)
        keys, values = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(2))
        table = Table(title, *(f"{name} µs" for name in names), "of bound")
        for tile, tiles in candidates.items():
            cells, shares = [], []
            for rows, bound in zip(microbatches, bounds, strict=True):
                q = torch.randn(rows.num_tokens, width, device=self.device).to(self.dtype)
                out = torch.empty_like(q)
                num_sms = num_multiprocessors(self.device)
                attention = Attention(rows, num_heads, head_dim, BLOCK_SIZE, tiles, num_sms)

                def all_layers(attention: Attention = attention, q: torch.Tensor = q, out: torch.Tensor = out) -> None:
                    for layer in range(num_layers):
                        attention(q, keys[layer], values[layer], out)

                taken = seconds_if_it_fits(all_layers)
                cells.append("does not fit" if taken is None else f"{taken / num_layers * 1e6:.1f}")
                shares.append("" if taken is None else f"{bound * num_layers / taken:.2f}")
            star = " *" if tile == chosen else ""
            table.add_row(
                f"{tile.m}x{tile.n} warps {tile.num_warps} stages {tile.num_stages}{star}", *cells, " ".join(shares)
            )
        table.add_row("bound", *(f"{bound * 1e6:.1f}" for bound in bounds), "")
        console.print(table)

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
            "other kernels, tokens", *(f"{n} {name} µs" for n in (1, 64, 2048) for name in ("norm", "inward"))
        )
        bounds = [
            n * count * dtype.itemsize / self.bytes_per_s
            for n in (1, 64, 2048)
            for count in (4 * width, 6 * width + 2 * inner)
        ]
        for elements in ELEMENTS:
            cells = []
            for num_tokens in (1, 64, 2048):
                rows = self.rows([(0, num_tokens)])
                hidden, addend, out = (torch.randn(num_tokens, width, device=device).to(dtype) for _ in range(3))
                product = torch.randn(num_tokens, 3 * width + inner, device=device).to(dtype)
                operands = torch.empty(num_tokens, width + inner, dtype=dtype, device=device)
                cache = (int(rows.block_tables.max()) + 1, config.n_head, BLOCK_SIZE, config.head_dim)
                keys, values = (torch.zeros(cache, dtype=dtype, device=device) for _ in range(2))
                norm = lambda: add_and_norm(  # noqa: E731
                    hidden, addend, vector, hidden, vector, vector, 1e-5, out, elements  # noqa: B023
                )  # fmt: skip
                inward = lambda: finish_inward(  # noqa: E731
                    product, rows, shape, vector, rotary.sin, rotary.cos, keys, values, operands, elements  # noqa: B023
                )  # fmt: skip
                cells += [f"{seconds(call) * 1e6:.1f}" for call in (norm, inward)]
            table.add_row(f"{elements}{' *' if elements == self.tiles.elements else ''}", *cells)
        table.add_row("bound", *(f"{bound * 1e6:.1f}" for bound in bounds))
        console.print(table)

    def layer(self) -> None:
        """A whole layer, bound by its weights and KV or by its operations."""
        layers = self.random_layers()
        table = Table("a layer", "ours µs", "bound µs", "of bound")
        weights = layers.weight_bytes / self.config.n_layer
        scenarios = [*((f"decode {n} x {c}", [(c - 1, 1)] * n) for n, c in DECODING)]
        scenarios += [(f"chunk {start} + {tokens}", [(start, tokens)]) for start, tokens in CHUNKS]
        scenarios += [("32 x 600 and a chunk 0 + 512", [*[(599, 1)] * 32, (0, 512)])]
        for name, spans in scenarios:
            rows = self.rows(spans)
            hidden = torch.randn(rows.num_tokens, self.config.n_embd, device=self.device).to(self.dtype)
            taken = seconds(lambda: layers.run(hidden, rows)) / self.config.n_layer  # noqa: B023
            context = sum(start + tokens for start, tokens in spans)
            pairs = sum(tokens * (start + (tokens + 1) / 2) for start, tokens in spans)
            num_bytes = weights + 2 * context * self.config.n_embd * self.dtype.itemsize
            operations = 2 * weights / self.dtype.itemsize * rows.num_tokens + 4 * self.config.n_embd * pairs
            bound = max(num_bytes / self.bytes_per_s, operations / self.operations_per_s)
            table.add_row(name, f"{taken * 1e6:.1f}", f"{bound * 1e6:.1f}", f"{bound / taken:.2f}")
        console.print(table)

    def random_layers(self) -> "GPULayers":
        from gptj_serve.kernels.gpu.layers import GPULayers
        from gptj_serve.kernels.gpu.weights import GPUBlock
        from gptj_serve.model.block import GPTJBlock

        with self.device:
            blocks = [GPUBlock(GPTJBlock(self.config).to(self.dtype)) for _ in range(self.config.n_layer)]
        num_blocks = 1 + max(int(self.rows([(context - 1, 1)] * n).block_tables.max()) for n, context in DECODING)
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


def copy_rate(device: torch.device) -> float:
    """Bytes read and written in a second."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations in a second; a multiplication and an addition are two."""
    square = torch.randn(8192, 8192, device=device).to(dtype)
    return 2 * 8192**3 / seconds(lambda: torch.mm(square, square))


def seconds(call: Callable[[], object]) -> float:
    """Median of its runs in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=20, return_mode="median") / 1e3


def seconds_if_it_fits(call: Callable[[], object]) -> float | None:
    from triton.runtime.errors import OutOfResources

    try:
        return seconds(call)
    except OutOfResources:
        return None


if __name__ == "__main__":
    typer.run(main)
