"""What fewer bits cost in quality: perplexity of texts by dtype and quantization: `python -m benchmarks.quantization`.

python -m benchmarks.quantization [--checkpoint DIRECTORY] [--last-chars N] TEXT...

Of each text (its last N characters, if so told) windows of n_positions tokens are scored, each token but a window's
first. Everything runs in this process, with the kernels and the stage of the service. "GPU" runs on the CPU too:
PyTorch's kernels around the products of a GPU's stage, with their weights and what they round, but not their order of
sums.
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gptj_serve.config import Kernels, Quantization, ServiceConfig
from gptj_serve.kernels.gpu.linear import GPULinear, LinearKind
from gptj_serve.kernels.gpu.weights import GPUBlock
from gptj_serve.model.block import AttentionFn, GPTJBlock, rotate
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, Row, StepOutput
from gptj_serve.tokenizer import Tokenizer

BLOCK_SIZE = 16
CHUNK = 256
console = Console(width=110)


class Mode(NamedTuple):
    name: str
    dtype: torch.dtype
    quantization: Quantization = "none"
    kernels: Kernels = "auto"
    on_gpu: LinearKind | None = None


MODES = [
    Mode("float32, PyTorch's kernels", torch.float32, kernels="torch"),
    Mode("float32", torch.float32),
    Mode("bfloat16", torch.bfloat16),
    Mode("int8, KV in float32", torch.float32, "int8"),
    Mode("int8, KV in bfloat16", torch.bfloat16, "int8"),
    Mode("GPU, float16", torch.float16, kernels="torch", on_gpu="native"),
    Mode("GPU, bfloat16", torch.bfloat16, kernels="torch", on_gpu="native"),
    Mode("GPU, int8 weights, bfloat16", torch.bfloat16, kernels="torch", on_gpu="int8"),
    Mode("GPU, fp8, bfloat16", torch.bfloat16, kernels="torch", on_gpu="fp8"),
]


class BlockOfGPU(nn.Module):
    """A block with the products that `kernels.gpu.layers.GPULayers` has."""

    def __init__(self, block: GPTJBlock, config: GPTJConfig, kind: LinearKind) -> None:
        super().__init__()
        self._weights = GPUBlock(block, partial(GPULinear, kind=kind))
        self._config = config
        self._activation = block.mlp.activation

    @property
    def num_bytes(self) -> int:
        return self._weights.num_bytes

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: AttentionFn) -> Tensor:
        config, weights = self._config, self._weights
        normed = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, config.layer_norm_epsilon)
        width = config.n_embd
        *qkv, inner = weights.inward(normed).split([width, width, width, config.inner_dim], dim=-1)
        q, k, v = (part.unflatten(-1, (config.n_head, -1)) for part in qkv)
        attended = attention(rotate(q, *rotary), rotate(k, *rotary), v).flatten(-2)
        operands = torch.cat([attended, self._activation(inner + weights.fc_in_bias)], dim=-1)
        return x + weights.outward(operands) + weights.fc_out_bias


def as_on_gpu(runner: StageRunner, kind: LinearKind) -> int:
    """Put a GPU's products in place of the stage's. Returns the bytes of all its weights."""
    stage = runner.stage
    for name, block in stage.h.items():
        stage.h[name] = BlockOfGPU(block, stage.config, kind)
    stage.lm_head = GPULinear([stage.lm_head], kind)
    in_layers = sum(block.num_bytes for block in stage.h.values())
    return in_layers + stage.lm_head.num_bytes + sum(parameter.nbytes for parameter in stage.parameters())


def main(
    texts: list[Path],
    checkpoint: Annotated[Path | None, typer.Option(help="Directory. Default: the demo.")] = None,
    last_chars: Annotated[int | None, typer.Option(min=1, help="Of each text.")] = None,
) -> None:
    directory = checkpoint or ServiceConfig().checkpoint_dir
    opened, tokenizer = Checkpoint.open(directory), Tokenizer.from_directory(directory)
    windows = [window for text in texts for window in cut(tokenizer, text, last_chars, opened.config.n_positions)]
    console.print(f"{sum(map(len, windows)):,} tokens in {len(windows)} windows of {len(texts)} texts")
    table = Table("", "weights MB", "perplexity", "of the first", "mean difference of log p", "same likeliest token")
    base: tuple[torch.Tensor, torch.Tensor] | None = None
    for mode in MODES:
        spec = StageSpec(
            span=range(opened.config.n_layer),
            num_kv_blocks=-(-opened.config.n_positions // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            dtype=mode.dtype,
            device=torch.device("cpu"),
            num_token_ids=min(tokenizer.num_token_ids, opened.config.vocab_size),
            quantization=mode.quantization,
            kernels=mode.kernels,
        )
        runner = StageRunner.load(opened, spec)
        weight_bytes = runner.weight_bytes if mode.on_gpu is None else as_on_gpu(runner, mode.on_gpu)
        parts = [score(runner, window, first_id) for first_id, window in zip(ids(windows), windows, strict=True)]
        logprobs, likeliest = (torch.cat(columns) for columns in zip(*parts, strict=True))
        base = base or (logprobs, likeliest)
        perplexity = math.exp(-logprobs.mean())
        table.add_row(
            mode.name,
            f"{weight_bytes / 1e6:.1f}",
            f"{perplexity:.3f}",
            f"{perplexity / math.exp(-base[0].mean()):.4f}",
            f"{(logprobs - base[0]).abs().mean():.5f}",
            f"{(likeliest == base[1]).double().mean():.2%}",
        )
    console.print(table)


def cut(tokenizer: Tokenizer, text: Path, last_chars: int | None, n_positions: int) -> list[list[int]]:
    content = text.read_text(encoding="utf-8")
    token_ids = tokenizer.encode(content[-last_chars:] if last_chars else content)
    windows = [token_ids[start : start + n_positions] for start in range(0, len(token_ids), n_positions)]
    return [window for window in windows if len(window) > 1]


def ids(windows: list[list[int]]) -> list[int]:
    """Of the first microbatch of each window."""
    firsts = [0]
    for window in windows:
        firsts.append(firsts[-1] + -(-len(window) // CHUNK))
    return firsts[:-1]


def score(runner: StageRunner, window: list[int], first_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's log-probability but the first's, and the id that would have been likeliest."""
    logprobs, likeliest = [], []
    for number, start in enumerate(range(0, len(window), CHUNK)):
        token_ids = window[start : start + CHUNK]
        targets = window[start + 1 : start + 1 + len(token_ids)]
        table = list(range(-(-(start + len(token_ids)) // BLOCK_SIZE)))
        row = Row(token_ids, start, table, target_token_ids=targets, num_top_targets=1)
        output = runner.run(MicroBatch(first_id + number, [row]), None)
        assert isinstance(output, StepOutput)
        (result,) = output.rows
        if targets:
            assert result is not None
            assert result.targets is not None
            values = torch.from_numpy(result.targets.array.copy())
            logprobs.append(values[:, 0].double())
            likeliest.append(values[:, 1])
    return torch.cat(logprobs), torch.cat(likeliest)


if __name__ == "__main__":
    typer.run(main)
