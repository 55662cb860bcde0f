"""Random layers, and sequences that go through them in any microbatches: with chunks of any length, prefixes taken over
from other sequences, and blocks that lie anywhere and hold NaN.

Shapes: `T` tokens of a sequence, `D` n_embd.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptj_serve.kernels.cpu_layers import BLOCK_SIZE, CPULayers, PackedBlock
from gptj_serve.kernels.weights import OperandType
from gptj_serve.model.attention import PagedRow
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.stage import GPTJStage
from gptj_serve.pipeline.layers import Layers, TorchLayers

CPU = torch.device("cpu")
NUM_BLOCKS = 64
N_POSITIONS = 320


@dataclass(frozen=True)
class Inputs:
    """What goes in; the first `num_shared` tokens are those of an earlier sequence, whose keys and values it uses."""

    hidden: Tensor  # [T, D]
    parent: int | None = None
    num_shared: int = 0


Span = tuple[int, int]
"""(sequence, number of its next tokens)"""


def config_of(**values: Any) -> GPTJConfig:
    return GPTJConfig(**{"vocab_size": 11, "n_positions": N_POSITIONS, "n_layer": 2, "rotary_dim": None, **values})


def random_stage(config: GPTJConfig, span: range | None = None, seed: int = 0) -> GPTJStage:
    """Weights don't depend on the span. All are large enough to matter; sums stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    whole = GPTJStage(config, range(config.n_layer))
    for name, parameter in whole.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.3
        parameter.data = noise * scale + name.endswith("ln_1.weight")
    stage = GPTJStage(config, span or whole.span)
    weights = whole.state_dict()
    stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
    stage.attach_rotary(CPU)
    return stage.requires_grad_(False).eval()


def packed(stage: GPTJStage, operand_type: OperandType, kv_dtype: torch.dtype = torch.float32) -> CPULayers:
    blocks = [PackedBlock(block, operand_type) for block in stage.h.values()]
    return CPULayers(stage.config, blocks, NUM_BLOCKS, kv_dtype)


def reference(stage: GPTJStage) -> TorchLayers:
    return TorchLayers(stage, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)


def random_sequences(config: GPTJConfig, lengths: Sequence[int], rng: random.Random) -> list[Inputs]:
    """About every second one takes over the beginning of another, often whole blocks of it."""
    made: list[Inputs] = []
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    for length in lengths:
        hidden = torch.randn(length, config.n_embd, generator=generator)
        parent = rng.randrange(len(made)) if made and rng.random() < 0.5 else None
        if parent is None or length == 1:
            made.append(Inputs(hidden))
            continue
        num_shared = rng.randint(0, min(length - 1, len(made[parent].hidden)))
        if rng.random() < 0.6:
            num_shared -= num_shared % BLOCK_SIZE
        hidden[:num_shared] = made[parent].hidden[:num_shared]
        made.append(Inputs(hidden, parent, num_shared))
    return made


def random_schedule(sequences: Sequence[Inputs], rng: random.Random) -> list[list[Span]]:
    """Every sequence's own tokens in order: often one, or few, or all that are left; rows in any order."""
    done = [sequence.num_shared for sequence in sequences]
    microbatches = []
    while any(n < len(s.hidden) for n, s in zip(done, sequences, strict=True)):
        before, microbatch = list(done), []
        for i, sequence in enumerate(sequences):  # parents come first
            left = len(sequence.hidden) - done[i]
            if not left or rng.random() < 0.3 or not _can_run(sequences, i, before, done):
                continue
            n = rng.choice([1, min(3, left), rng.randint(1, left), left])
            microbatch.append((i, n))
            done[i] += n
        rng.shuffle(microbatch)
        if microbatch:
            microbatches.append(microbatch)
    return microbatches


def _can_run(sequences: Sequence[Inputs], i: int, before: Sequence[int], done: Sequence[int]) -> bool:
    """Whole blocks may be filled in the same microbatch; a copy is made before it."""
    parent, num_shared = sequences[i].parent, sequences[i].num_shared
    if parent is None:
        return True
    if num_shared and before[parent] == sequences[parent].num_shared and sequences[parent].parent is not None:
        return False  # what it has taken over itself is not there yet
    return (done if num_shared % BLOCK_SIZE == 0 else before)[parent] >= num_shared


@torch.inference_mode()
def run(
    stages: Sequence[Layers],
    sequences: Sequence[Inputs],
    microbatches: Sequence[Sequence[Span]],
    seed: int = 0,
    *,
    fill_with_nan: bool = True,
) -> list[Tensor]:
    """Each sequence's own tokens after the last stage: [T - num_shared, D]."""
    width = sequences[0].hidden.shape[1]
    for stage in stages if fill_with_nan else ():  # whoever had the blocks before left NaN in all of them
        stage.forward(
            torch.full((NUM_BLOCKS * BLOCK_SIZE, width), torch.nan),
            [PagedRow(0, BLOCK_SIZE, [block]) for block in range(NUM_BLOCKS)],
        )
    free = random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables: list[list[int]] = [[] for _ in sequences]
    done = [sequence.num_shared for sequence in sequences]
    parts: list[list[Tensor]] = [[] for _ in sequences]
    has_begun = [False] * len(sequences)
    for microbatch in microbatches:
        copies, rows = [], []
        for i, n in sorted(microbatch):  # a parent has its blocks before its children take them
            sequence = sequences[i]
            if not has_begun[i] and sequence.parent is not None:
                num_whole, rest = divmod(sequence.num_shared, BLOCK_SIZE)
                tables[i] = tables[sequence.parent][:num_whole]
                if rest:
                    tables[i].append(free.pop())
                    copies.append((tables[sequence.parent][num_whole], tables[i][-1]))
            has_begun[i] = True
            while len(tables[i]) * BLOCK_SIZE < done[i] + n:
                tables[i].append(free.pop())
        for i, n in microbatch:
            rows.append(PagedRow(done[i], n, list(tables[i])))
        hidden = torch.cat([sequences[i].hidden[done[i] : done[i] + n] for i, n in microbatch])
        for stage in stages:
            if copies:
                stage.copy_blocks(copies)
            hidden = stage.forward(hidden, rows)
        for (i, n), part in zip(microbatch, hidden.split([n for _, n in microbatch]), strict=True):
            parts[i].append(part)
            done[i] += n
    assert done == [len(sequence.hidden) for sequence in sequences]
    return [torch.cat(part) for part in parts]


def alone(stages: Sequence[Layers], sequences: Sequence[Inputs], *, seed: int = 0) -> list[Tensor]:
    """Each sequence in one piece, with nothing beside it; of its tokens those that `run` gives."""
    made = []
    for sequence in sequences:
        (hidden,) = run(stages, [Inputs(sequence.hidden)], [[(0, len(sequence.hidden))]], seed)
        made.append(hidden[sequence.num_shared :])
    return made
