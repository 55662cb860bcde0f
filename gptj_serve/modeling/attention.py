"""The attention of padded batches: what the model classes hand to the block, as the stages hand theirs.

Numbers and dropout masks equal those of transformers' eager attention. Shapes: `B` rows, `T` tokens, `C` keys (past
and present), `H` heads, `Dh` head_dim.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj_serve.model.block import AttentionFn


class Cache(Protocol):
    """What attention needs of a cache; transformers' caches have it too."""

    def get_seq_length(self, layer_idx: int = 0) -> int: ...

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]: ...


@dataclass(slots=True)
class PaddedAttention:
    """The attention of one forward call. `weights` collects each layer's if asked to."""

    mask: Tensor | None  # [B or 1, 1, T, C], added to the scores; None: causal, without a past
    cache: Cache | None
    dropout: float  # 0 in eval mode
    keep_weights: bool
    weights: list[Tensor] = field(default_factory=list)  # n_layer times [B, H, T, C]

    def layer(self, index: int) -> AttentionFn:
        """The attention function of layer `index`: q, k and v [B, T, H, Dh] → [B, T, H, Dh]."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, Dh]
            if self.cache is not None:
                k, v = self.cache.update(k, v, index)
            return self._attend(q, k, v).transpose(1, 2)

        return attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The fused kernel's gradient is wrong for queries whose keys are all masked, as those of left padding are.
        is_sound = self.mask is None or not q.requires_grad
        if is_sound and not self.keep_weights and not self.dropout:
            fused = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=self.mask, is_causal=self.mask is None
            )
            return fused.to(v.dtype)
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device) if self.mask is None else self.mask
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask  # in fp32: fp16 overflows
        weights = F.dropout(scores.softmax(dim=-1).to(v.dtype), self.dropout)
        if self.keep_weights:
            self.weights.append(weights)
        return weights @ v


def attention_mask_for(
    attention_mask: Tensor | None, position_ids: Tensor | None, embeds: Tensor, num_past: int | None
) -> Tensor | None:
    """The mask to add to the scores: what `create_causal_mask` of transformers makes of the same arguments.

    `embeds` [B, T, D] is what goes into the first layer, `num_past` is None without a cache. A 2-D mask [B, C] hides
    the tokens where it is 0, on any side or in between; a row that would see nothing looks at all keys alike. A 4-D
    mask is added as it is. Without mask and cache, positions that don't go up by one start a new sequence in the same
    row, which does not see those before it.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        if not attention_mask.is_floating_point():
            raise ValueError(
                f"a 4-D attention_mask is added to the scores: it must hold floats, not {attention_mask.dtype}"
            )
        return attention_mask.float()
    batch_size, num_new, _ = embeds.shape
    num_keys = (num_past or 0) + num_new
    if attention_mask is None:
        if num_past is None and position_ids is not None:
            first = position_ids[:, :1] - 1
            sequence = (position_ids.diff(prepend=first, dim=-1) != 1).cumsum(-1)  # [B, T]
            if sequence.any():
                same_sequence = (sequence[:, :, None] == sequence[:, None, :])[:, None]  # [B, 1, T, T]
                return _added(same_sequence & _causal(num_new, num_new, embeds.device))
        return causal_mask(num_new, num_keys, embeds.device) if num_past else None
    if attention_mask.shape != (batch_size, num_keys):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected {[batch_size, num_keys]}: one entry for "
            "each token, past ones included"
        )
    seen = attention_mask.to(embeds.device, torch.bool)
    return _added(seen[:, None, None, :] & _causal(num_new, num_keys, embeds.device))


def causal_mask(num_new: int, num_keys: int, device: torch.device) -> Tensor:
    """[1, 1, T, C] to add to the scores of the last `num_new` of `num_keys` tokens."""
    return _added(_causal(num_new, num_keys, device))


def _causal(num_new: int, num_keys: int, device: torch.device) -> Tensor:
    keys = torch.arange(num_keys, device=device)
    return (keys <= keys[num_keys - num_new :, None])[None, None]


def _added(visible: Tensor) -> Tensor:
    """Zero where `visible`, else the lowest finite number: a row without a visible key becomes uniform, not NaN."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, torch.finfo(torch.float32).min)
