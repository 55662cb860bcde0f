"""Log-probabilities in half precision, over whole contexts of 2,048 tokens, beside transformers' in fp32."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPTJForCausalLM

from gptj_serve.model.block import GPTJBlock
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, Row, StepOutput

NUM_TOKENS, CHUNK, BLOCK_SIZE, VOCABULARY = 2048, 512, 16, 97
COLUMNS = (5, 14)  # of q and k: of two heads' eight dimensions, of which the first four are rotated
LARGE = 300.0  # as float16 and bfloat16 have it too; its square is beyond float16's 65504

DTYPES = {torch.bfloat16: 0.25, torch.float16: 0.03}
"""With the largest difference of a log-probability that six layers may come to: bfloat16 has 8 bits, float16 11."""


def token_ids() -> list[int]:
    return torch.randint(VOCABULARY, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.inference_mode()
def expected(model: GPTJForCausalLM) -> Tensor:
    """[NUM_TOKENS - 1]: of each token but the first."""
    tokens = torch.tensor(token_ids())
    logprobs = model(tokens[None]).logits[0, :-1].log_softmax(dim=-1)
    return logprobs.gather(1, tokens[1:, None])[:, 0]


def computed(runner: StageRunner) -> Tensor:
    """The same, in chunks, and the last one of a row with a single token, as a decode step has."""
    tokens, blocks = token_ids(), list(range(NUM_TOKENS // BLOCK_SIZE))
    bounds = [*range(0, NUM_TOKENS - 2, CHUNK), NUM_TOKENS - 2, NUM_TOKENS - 1]
    parts = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        targets = tokens[start + 1 : end + 1]
        output = runner.run(MicroBatch(number, [Row(tokens[start:end], start, blocks, target_token_ids=targets)]), None)
        assert isinstance(output, StepOutput)
        (result,) = output.rows
        assert result is not None
        assert result.failure is None
        assert result.targets is not None
        parts.append(torch.from_numpy(result.targets.array[:, 0].copy()))
    return torch.cat(parts)


def load(directory: Path, dtype: torch.dtype) -> StageRunner:
    spec = StageSpec(
        range(6), NUM_TOKENS // BLOCK_SIZE, BLOCK_SIZE, dtype, torch.device("cpu"), VOCABULARY, kernels="torch"
    )
    return StageRunner.load(Checkpoint.open(directory), spec)


@torch.no_grad()
def enlarge(block: GPTJBlock) -> None:
    """For every token two columns of q and of k are `LARGE`. So each score of a query grows by the same."""
    block.ln_1.weight[0], block.ln_1.bias[0] = 0.0, 10.0
    for projection in (block.attn.q_proj, block.attn.k_proj):
        for column in COLUMNS:
            projection.weight[column] = 0.0
            projection.weight[column, 0] = LARGE / 10


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("is_large", [False, True])
def test_logprobs_are_those_of_fp32_but_for_rounding(
    tiny_gptj: Callable[..., Path], dtype: torch.dtype, tolerance: float, is_large: bool
) -> None:
    """Also where q·k is beyond float16 (transformers #11076): in fp32 it cancels in softmax."""
    directory = tiny_gptj(n_positions=NUM_TOKENS)
    model = GPTJForCausalLM.from_pretrained(directory).eval()
    runner = load(directory, dtype)
    if is_large:
        for theirs, ours in zip(model.transformer.h, runner.stage.h.values(), strict=True):
            enlarge(theirs)
            enlarge(ours)
        assert torch.finfo(torch.float16).max < LARGE**2
    difference = (computed(runner) - expected(model)).abs()
    assert difference.max() < tolerance
    assert difference.mean() < tolerance / 5
