"""`GPTJModel`: embedding, layers and final norm for padded batches, over the same blocks as the stages.

Shapes: `B` rows, `T` tokens, `D` n_embd, `C` keys (past and present).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj_serve.model.block import GPTJBlock, RotaryTable
from gptj_serve.model.config import GPTJConfig
from gptj_serve.modeling.attention import Cache, PaddedAttention, attention_mask_for
from gptj_serve.modeling.cache import DynamicCache
from gptj_serve.modeling.former_name import takes_former_name
from gptj_serve.modeling.outputs import BaseModelOutputWithPast
from gptj_serve.modeling.pretrained import GPTJPreTrainedModel


class GPTJModel(GPTJPreTrainedModel):
    """The bare model: hidden states and no head. Numbers equal transformers' `GPTJModel`."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(GPTJBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.rotary = RotaryTable(config)
        self.init_weights(self)

    @takes_former_name
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, T]
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,  # [B, C], or [B or 1, heads or 1, T, C] to add to the scores
        token_type_ids: Tensor | None = None,  # [B, T], embedded like tokens and added
        position_ids: Tensor | None = None,  # [B or 1, T]; by default they go on from the past, whatever the mask says
        inputs_embeds: Tensor | None = None,  # [B, T, D]
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Arguments left None follow the config. A cache that is passed is extended in place."""
        config = self.config
        keep_attentions = config.output_attentions if output_attentions is None else output_attentions
        keep_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if inputs_embeds is None and input_ids is not None:
            embeds = self._embed(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            embeds = inputs_embeds
        else:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        num_past = None if cache is None else cache.get_seq_length()
        positions = self._positions(position_ids, embeds, num_past or 0)
        attention = PaddedAttention(
            attention_mask_for(attention_mask, position_ids, embeds, num_past),
            cache,
            config.attn_pdrop if self.training else 0.0,
            keep_attentions,
        )
        if token_type_ids is not None:
            embeds = embeds + self._embed(token_type_ids.view(-1, embeds.shape[1]), "token_type_ids")
        hidden = F.dropout(embeds, config.embd_pdrop, self.training)
        all_hidden: list[Tensor] = []
        rotary = self.rotary(positions)
        for index, block in enumerate(self.h):
            if keep_hidden:
                all_hidden.append(hidden)
            hidden = block(hidden, rotary, attention.layer(index))
        hidden = self.ln_f(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            cache=cache,
            hidden_states=(*all_hidden, hidden) if keep_hidden else None,
            attentions=tuple(attention.weights) if keep_attentions else None,
        )
        return output if self.wants_dict(return_dict) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def _embed(self, ids: Tensor, name: str = "input_ids") -> Tensor:
        """Raises `IndexError` for an id outside the vocabulary, which on a GPU would end the process."""
        vocab_size = self.config.vocab_size
        if not torch.compiler.is_compiling() and ids.numel() and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise IndexError(f"{name} holds {int(ids.min())} … {int(ids.max())}, outside [0, vocab_size={vocab_size})")
        out: Tensor = self.wte(ids)
        return out

    def _positions(self, position_ids: Tensor | None, embeds: Tensor, num_past: int) -> Tensor:
        """[B or 1, T]. Raises `IndexError` beyond n_positions, where the rotary table ends."""
        limit = self.config.n_positions
        if position_ids is None:
            if num_past + embeds.shape[1] > limit:
                raise IndexError(f"{num_past + embeds.shape[1]} tokens exceed n_positions={limit}")
            return torch.arange(num_past, num_past + embeds.shape[1], device=embeds.device)[None]
        if position_ids.dim() != 2 or position_ids.shape[-1] != embeds.shape[1]:
            raise ValueError(f"position_ids has shape {list(position_ids.shape)}, expected {list(embeds.shape[:2])}")
        if not torch.compiler.is_compiling() and not 0 <= position_ids.min() <= position_ids.max() < limit:
            raise IndexError(
                f"position_ids holds {int(position_ids.min())} … {int(position_ids.max())}, outside "
                f"[0, n_positions={limit})"
            )
        return position_ids
