"""What `deterministic: true` costs: the same model with and without it, step by step in turns.

    python benchmarks/determinism.py

Decode is one step of so many sequences with `--context` tokens each, prefill one prompt of 512 tokens; the last token
of each sequence goes through the LM head. Times are the fastest of `--rounds`, which what else runs on the machine
disturbs least; the ratios are what to look at. bfloat16 may need ONEDNN_MAX_CPU_ISA in the environment.
"""

import copy
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gptj_serve.model.attention import AttentionPlan, KVCache, PagedAttention, PagedRow
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.deterministic import make_deterministic
from gptj_serve.model.stage import GPTJStage, load_stage

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LARGER = GPTJConfig(n_layer=12, n_embd=1024, n_head=16, rotary_dim=32, vocab_size=50400, n_positions=2048)
BATCHES = (1, 8, 32)
PROMPT_LENGTH = 512


def main(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    num_threads: Annotated[int, typer.Option(help="0: as many as torch takes by itself.")] = 0,
    context: Annotated[int, typer.Option(help="Tokens of each decoding sequence.")] = 128,
    rounds: int = 15,
) -> None:
    if num_threads:
        torch.set_num_threads(num_threads)
    print(f"{dtype}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print("| model | step | normal ms | deterministic ms | ratio |\n|---|---|---|---|---|")
    for name, stage in models(getattr(torch, dtype)):
        exact = copy.deepcopy(stage)
        start = time.perf_counter()
        plan, _ = make_deterministic(exact)
        seconds_to_convert = time.perf_counter() - start
        for step, rows in steps(context):
            normal, deterministic = fastest([runner(stage, None, rows), runner(exact, plan, rows)], rounds)
            ratio = deterministic / normal
            print(f"| {name} | {step} | {normal * 1e3:.1f} | {deterministic * 1e3:.1f} | {ratio:.2f} |", flush=True)
        print(
            f"| {name} | trying the machine's kernels and packing weights, once | | {seconds_to_convert * 1e3:.0f} | |"
        )


def models(dtype: torch.dtype) -> Iterator[tuple[str, GPTJStage]]:
    demo = Checkpoint.open(Path(str(files("gptj_serve") / "demo")))
    yield (
        f"demo ({demo.config.n_layer} layers of {demo.config.n_embd})",
        load_stage(demo, range(demo.config.n_layer), dtype, CPU),
    )
    stage = GPTJStage(LARGER, range(LARGER.n_layer), ("lm_head",)).requires_grad_(False)
    for name, parameter in stage.named_parameters():
        if not name.endswith(("wte.weight", "bias")) and ".ln_" not in name and parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    stage.wte.weight.normal_()
    stage.attach_rotary(CPU)
    yield f"random ({LARGER.n_layer} layers of {LARGER.n_embd})", stage.to(dtype).eval()


def steps(context: int) -> Iterator[tuple[str, list[PagedRow]]]:
    blocks_per_row = -(-context // BLOCK_SIZE)
    for batch in BATCHES:
        tables = torch.randperm(batch * blocks_per_row).view(batch, -1).tolist()
        yield f"decode, batch {batch}", [PagedRow(context - 1, 1, table) for table in tables]
    yield f"prefill, {PROMPT_LENGTH} tokens", [PagedRow(0, PROMPT_LENGTH, list(range(PROMPT_LENGTH // BLOCK_SIZE)))]


def runner(stage: GPTJStage, plan: AttentionPlan | None, rows: list[PagedRow]) -> Callable[[], Tensor]:
    """One step of the whole model, planning included."""
    num_blocks = sum(len(row.block_table) for row in rows)
    dtype = stage.ln_f.weight.dtype
    cache = KVCache(stage.config, len(stage.span), num_blocks, BLOCK_SIZE, dtype, CPU)
    token_ids = torch.randint(0, stage.config.vocab_size, (sum(row.num_tokens for row in rows),))
    last = torch.tensor([row.num_tokens for row in rows]).cumsum(0) - 1

    @torch.inference_mode()
    def run() -> Tensor:
        attention = PagedAttention(rows, cache, plan)
        hidden = stage(token_ids, attention.positions, attention.layer)
        logits: Tensor = stage.lm_head(hidden[last])
        return logits

    return run


def fastest(runs: list[Callable[[], Tensor]], rounds: int) -> list[float]:
    """Seconds of the fastest of so many rounds, in which all have their turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(2 + rounds):
        for run, seconds in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return [min(seconds[2:]) for seconds in times]


if __name__ == "__main__":
    typer.run(main)
