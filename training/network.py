"""The demo model: one GPT-J backbone under a language-modelling, a classification and a question-answering head.

The layers are gptj_serve's own; this module adds a dense causal attention, the heads and the losses, and knows nothing
of data or schedules. Attribute names are the checkpoint's keys. B rows, T tokens, D n_embd, V vocabulary, N labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj_serve.model.block import GPTJBlock, RotaryTable
from gptj_serve.model.config import GPTJConfig

IGNORED = -100


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, Dh] each; every token sees itself and what is left of it, so padding on the right is harmless."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Backbone(nn.Module):
    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(GPTJBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.rotary = RotaryTable(config)

    def forward(self, ids: Tensor, dropout: float = 0.0) -> Tensor:
        """Ids [B, T] → last hidden states [B, T, D]; `dropout` acts on the embeddings."""
        x = F.dropout(self.wte(ids), dropout, self.training)
        rotary = self.rotary(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x, rotary, causal_attention)
        out: Tensor = self.ln_f(x)
        return out


class DemoModel(nn.Module):
    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Backbone(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.apply(initialise)
        for name, param in self.transformer.h.named_parameters():
            if name.endswith(("out_proj.weight", "fc_out.weight")):  # residual branches start silent
                nn.init.zeros_(param)

    def language_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean over the targets [B, T] that are not `IGNORED`; targets are the ids, shifted already."""
        return F.cross_entropy(self.lm_head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def intent_logits(self, hidden: Tensor, last: Tensor, dropout: float = 0.0) -> Tensor:
        """[B, T, D] and the position of each row's last token [B] → [B, N]."""
        pooled = hidden[torch.arange(len(last), device=last.device), last]
        out: Tensor = self.score(F.dropout(pooled, dropout, self.training))
        return out

    def span_logits(self, hidden: Tensor, is_context: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end logits [B, T] each, minus infinity outside the context."""
        start, end = self.qa_outputs(hidden).unbind(-1)
        return start.masked_fill(~is_context, -torch.inf), end.masked_fill(~is_context, -torch.inf)


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
