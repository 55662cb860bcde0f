"""The prompts of a call of `generate`: of each row, the tokens that are not hidden, as if the row were alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_serve.errors import InvalidOptionError
from gptj_serve.modeling.generation_config import GenerationConfig


@dataclass(frozen=True, slots=True)
class GenerationInputs:
    """The tensors as they came. Shapes: `B` rows, `T` and `N` tokens, padding included."""

    input_ids: Tensor | None = None  # [B, T]
    attention_mask: Tensor | None = None  # [B, T]
    negative_prompt_ids: Tensor | None = None  # [B, N]
    negative_prompt_attention_mask: Tensor | None = None  # [B, N]


@dataclass(frozen=True, slots=True)
class Prompts:
    input_ids: Tensor  # [B, T]
    rows: list[list[int]]
    negative_rows: list[list[int]]  # B of them; empty ones if there are no negative prompts


def read_prompts(inputs: GenerationInputs, chosen: GenerationConfig, vocab_size: int, device: torch.device) -> Prompts:
    """Without input_ids there is one row, of the bos token. Raises `InvalidOptionError`, `IndexError` for token ids."""
    input_ids = inputs.input_ids
    if input_ids is None:
        if chosen.bos_token_id is None:
            raise InvalidOptionError("input_ids", None, "the model has no bos_token_id to begin with")
        input_ids = torch.tensor([[chosen.bos_token_id]], device=device)
    rows = _visible("input_ids", input_ids, "attention_mask", inputs.attention_mask, chosen, vocab_size)
    negative = inputs.negative_prompt_ids
    mask = inputs.negative_prompt_attention_mask
    if negative is None:
        if mask is not None:
            raise InvalidOptionError(
                "negative_prompt_attention_mask", list(mask.shape), "goes with negative_prompt_ids"
            )
        return Prompts(input_ids, rows, [[] for _ in rows])
    negative_rows = _visible(
        "negative_prompt_ids", negative, "negative_prompt_attention_mask", mask, chosen, vocab_size
    )
    if len(negative_rows) != len(rows):
        raise InvalidOptionError("negative_prompt_ids", list(negative.shape), f"input_ids has {len(rows)} rows")
    return Prompts(input_ids, rows, negative_rows)


def _visible(
    name: str, ids: Tensor, mask_name: str, mask: Tensor | None, chosen: GenerationConfig, vocab_size: int
) -> list[list[int]]:
    """Without a mask, padding shows if the pad token is no end token, as in transformers."""
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise InvalidOptionError(name, f"{ids.dtype} {list(ids.shape)}", "must be token ids [rows, tokens]")
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise IndexError(f"{name} holds {int(ids.min())} … {int(ids.max())}, outside [0, vocab_size={vocab_size})")
    if mask is None:
        pad = chosen.pad_token_id
        mask = ids != (-1 if pad is None or pad in chosen.end_token_ids else pad)
    if mask.shape != ids.shape:
        raise InvalidOptionError(mask_name, list(mask.shape), f"{name} has the shape {list(ids.shape)}")
    rows = [row[is_visible] for row, is_visible in zip(ids, mask.to(ids.device, torch.bool), strict=True)]
    for index, row in enumerate(rows):
        if not len(row):
            raise InvalidOptionError(name, ids[index].tolist(), f"row {index} holds nothing but padding")
    return [row.tolist() for row in rows]
