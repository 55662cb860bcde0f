"""Stages chained against transformers' GPT-J in fp32, over every config field that changes the mathematics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification

from gptj_serve.model.attention import KVCache, PagedAttention, PagedRow
from gptj_serve.model.block import ACTIVATIONS
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.stage import GPTJStage, load_stage

CPU = torch.device("cpu")
SPLITS = {1: [6], 2: [4, 2], 3: [1, 3, 2], 6: [1] * 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "rotary_dim = head_dim": {"rotary_dim": 8},
    "rotary_dim = 2": {"rotary_dim": 2},
    "one head, wide rotary": {"n_head": 1, "rotary_dim": 30},
    "n_inner = 50": {"n_inner": 50},
    "large epsilon": {"layer_norm_epsilon": 0.3},
    "tied": {"tie_word_embeddings": True},
    "one label": {"id2label": {0: "score"}, "label2id": {"score": 0}},
    "odd vocabulary": {"vocab_size": 131},
    **{name: {"activation_function": name} for name in sorted(ACTIVATIONS)},
}
PROMPT_LENGTHS = (1, 2, 19, 64)


def load_stages(directory: Path, num_stages: int) -> list[GPTJStage]:
    checkpoint = Checkpoint.open(directory)
    sizes = SPLITS[num_stages]
    spans = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(num_stages)]
    return [load_stage(checkpoint, span, torch.float32, CPU) for span in spans]


def last_hidden(stages: list[GPTJStage], token_ids: Tensor) -> Tensor:
    """Token ids [T] through all stages: [T, D], ln_f applied."""
    num_tokens = len(token_ids)
    x = token_ids
    for stage in stages:
        cache = KVCache(stage.config, len(stage.span), num_blocks=16, block_size=6, dtype=torch.float32, device=CPU)
        attention = PagedAttention([PagedRow(0, num_tokens, [7, 2, 11, 0, 15, 3, 1, 9, 4, 13, 5])], cache)
        x = stage(x, attention.positions, attention.layer)
    return x


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 96, (length,), generator=generator) for length in PROMPT_LENGTHS]  # 96 is the pad token


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def check_lm_logits(directory: Path, num_stages: int) -> None:
    stages = load_stages(directory, num_stages)
    reference = GPTJForCausalLM.from_pretrained(directory).eval()
    for token_ids in prompts():
        expected = reference(token_ids[None]).logits[0]
        assert expected.std() > 0.5  # decisive logits, or the comparison shows little
        assert_close(stages[-1].lm_head(last_hidden(stages, token_ids)), expected)


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_lm_logits(tiny_gptj, variant: str):
    check_lm_logits(tiny_gptj(**VARIANTS[variant]), num_stages=3)


@torch.inference_mode()
@pytest.mark.parametrize("num_stages", SPLITS)
def test_lm_logits_on_any_split(tiny_gptj, num_stages: int):
    check_lm_logits(tiny_gptj(), num_stages)


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["default", "one label", "one head, wide rotary"])
def test_classification_logits(tiny_gptj, variant: str):
    directory = tiny_gptj(**VARIANTS[variant])
    stages = load_stages(directory, 3)
    reference = GPTJForSequenceClassification.from_pretrained(directory).eval()
    for token_ids in prompts():
        logits = stages[-1].score(last_hidden(stages, token_ids)[-1])
        torch.testing.assert_close(logits, reference(token_ids[None]).logits[0], rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["default", "large epsilon", "one head, wide rotary"])
def test_qa_logits(tiny_gptj, variant: str):
    directory = tiny_gptj(**VARIANTS[variant])
    stages = load_stages(directory, 2)
    reference = GPTJForQuestionAnswering.from_pretrained(directory, num_labels=2).eval()
    for token_ids in prompts():
        logits = stages[-1].qa_outputs(last_hidden(stages, token_ids))
        expected = reference(token_ids[None])
        torch.testing.assert_close(logits[:, 0], expected.start_logits[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[:, 1], expected.end_logits[0], rtol=0, atol=1e-4)
