"""Stages of random weights that are made on the device: no file, and no more memory than one layer beside them."""

from collections.abc import Callable, Sequence
from functools import partial
from zlib import crc32

import torch
from torch import nn

from gptj_serve.model.block import GPTJBlock
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.stage import GPTJStage
from gptj_serve.pipeline.partition import head_cost, partition

STD = 0.02

TakeBlock = Callable[[int, GPTJBlock], None]
"""(a stage's number, a layer of it)"""


def random_stages(
    config: GPTJConfig,
    num_stages: int,
    dtype: torch.dtype,
    device: torch.device,
    take_block: TakeBlock | None = None,
) -> list[GPTJStage]:
    """Weights don't depend on the split. `take_block` gets the layers, instead of their stages."""
    return [
        random_stage(config, span, dtype, device, None if take_block is None else partial(take_block, index))
        for index, span in enumerate(partition(config.n_layer, num_stages, head_cost(config)))
    ]


def random_stage(
    config: GPTJConfig,
    span: range,
    dtype: torch.dtype,
    device: torch.device,
    take_block: Callable[[GPTJBlock], None] | None = None,
) -> GPTJStage:
    with torch.device("meta"):
        stage = GPTJStage(config, span, ("lm_head",))
    for layer in list(stage.h):
        _fill(stage.h[layer], f"h.{layer}.", dtype, device)
        if take_block is not None:
            block = stage.h.pop(layer)
            assert isinstance(block, GPTJBlock)
            take_block(block)
    _fill(stage, "", dtype, device)
    stage.attach_rotary(device)
    return stage.eval()


def _fill(module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device) -> None:
    for name, placeholder in list(module.named_parameters()):
        if not placeholder.is_meta:
            continue
        generator = torch.Generator(device).manual_seed(crc32((prefix + name).encode()))
        values = torch.empty(placeholder.shape, dtype=dtype, device=device).normal_(std=STD, generator=generator)
        if "ln_" in prefix + name and name.endswith("weight"):
            values += 1
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int = 0) -> Sequence[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (num_prompts, num_tokens), generator=generator).tolist()
