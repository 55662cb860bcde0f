"""What `generate` returns: prompts and what continues them, padded, and the outputs named as in transformers.

Shapes: `B` answers, `S` steps, `V` vocab_size.
"""

import torch
from torch import Tensor

from gptj_serve.modeling.attention import Cache
from gptj_serve.modeling.outputs import ModelOutput, model_output


@model_output
class GenerateDecoderOnlyOutput(ModelOutput):
    """Of greedy search and sampling. The last three are there for their names; nothing fills them."""

    sequences: Tensor | None = None  # [B, T + S]
    scores: tuple[Tensor, ...] | None = None  # S times [B, V], after all processors
    logits: tuple[Tensor, ...] | None = None  # S times [B, V], before them
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    cache: Cache | None = None


@model_output
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """Of beam search. The last six are there for their names; nothing fills them."""

    sequences: Tensor | None = None  # [B, T + S]
    sequences_scores: Tensor | None = None  # [B]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    cache: Cache | None = None


def padded(outputs: list[list[int]], pad_token_id: int) -> list[list[int]]:
    longest = max(map(len, outputs))
    return [[*token_ids, *[pad_token_id] * (longest - len(token_ids))] for token_ids in outputs]


def sequences_of(input_ids: Tensor, outputs: list[list[int]]) -> Tensor:
    """Each row of `input_ids` before its share of the outputs, which are equally long."""
    rows = input_ids.repeat_interleave(len(outputs) // len(input_ids), dim=0)
    return torch.cat([rows, torch.tensor(outputs, device=rows.device).to(rows.dtype)], dim=1)
