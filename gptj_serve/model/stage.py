"""`GPTJStage`: a half-open span of a GPT-J's layers, with the embedding if it is the first and the heads if the last.

It knows nothing of requests, caches or neighbours. Shapes: `T` packed tokens, `D` n_embd, `V` vocab_size.
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn

from gptj_serve.model.block import AttentionFn, GPTJBlock, RotaryTable
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.loading_progress import Progress, silent
from gptj_serve.model.weights import pieces


class GPTJStage(nn.Module):
    """Layers `span` of a model. Parameters are named as in the checkpoint, without the `transformer.` prefix.

    `heads` names those of the last stage ("lm_head", "score", "qa_outputs"); other stages have none.
    """

    def __init__(self, config: GPTJConfig, span: range, heads: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.span = span
        self.is_first = span.start == 0
        self.is_last = span.stop == config.n_layer
        if self.is_first:
            # with a weight given there is nothing to initialize: on meta that alone would import 75 MB of Python
            size = (config.vocab_size, config.n_embd)
            self.wte = nn.Embedding(*size, _weight=torch.empty(size))
        self.h = nn.ModuleDict({str(layer): GPTJBlock(config) for layer in span})
        if self.is_last:
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
            if "lm_head" in heads:
                self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
            if "score" in heads:
                self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
            if "qa_outputs" in heads:
                self.qa_outputs = nn.Linear(config.n_embd, 2)

    def attach_rotary(self, device: torch.device) -> None:
        """Compute the rotary table; apart from `__init__`, which may run on the meta device."""
        self.rotary = RotaryTable(self.config, device)

    def forward(self, x: Tensor, positions: Tensor, attention: Callable[[int], AttentionFn]) -> Tensor:
        """Token ids [T] (first stage) or hidden states [T, D], and positions [T] → hidden states [T, D].

        `attention(i)` is the attention function of the span's i-th layer. On the last stage ln_f has been applied.
        """
        hidden: Tensor = self.run_layers(self.wte(x) if self.is_first else x, positions, attention)
        return self.ln_f(hidden) if self.is_last else hidden

    def run_layers(self, hidden: Tensor, positions: Tensor, attention: Callable[[int], AttentionFn]) -> Tensor:
        """Without embedding and ln_f: hidden states [T, D] → [T, D]."""
        rotary = self.rotary(positions)
        for index, block in enumerate(self.h.values()):
            hidden = block(hidden, rotary, attention(index))
        return hidden


@torch.no_grad()
def load_stage(
    checkpoint: Checkpoint,
    span: range,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
    take_block: Callable[[GPTJBlock], None] | None = None,
) -> GPTJStage:
    """The span's weights in `dtype` on `device`.

    Each parameter is allocated once, at its destination, and filled piece by piece, so the peak is the span's own
    size and one piece more. `take_block` gets each layer as soon as it is whole, in order, instead of the stage:
    the peak is then what it makes of them, and one layer more.
    """
    with torch.device("meta"):
        stage = GPTJStage(checkpoint.config, span, checkpoint.heads)
    num_bytes = sum(placeholder.numel() * dtype.itemsize for placeholder in stage.parameters())
    num_loaded = 0
    for layer, placeholders in groupby(list(stage.named_parameters()), lambda named: _layer_of(named[0])):
        for name, placeholder in placeholders:
            tied = name == "lm_head.weight" and checkpoint.config.tie_word_embeddings
            info = checkpoint.tensors["wte.weight" if tied else name]
            parameter = torch.empty(placeholder.shape, dtype=dtype, device=device)
            for rows, piece in pieces(info):
                parameter[rows].copy_(piece)
                num_loaded += piece.numel() * dtype.itemsize
                progress(num_loaded, num_bytes)
            owner, _, attribute = name.rpartition(".")
            setattr(stage.get_submodule(owner), attribute, nn.Parameter(parameter, requires_grad=False))
        if layer is not None and take_block is not None:
            block = stage.h.pop(layer)
            assert isinstance(block, GPTJBlock)
            take_block(block)
            del block, parameter  # before the next is read
    stage.attach_rotary(device)
    return stage.eval()


def _layer_of(name: str) -> str | None:
    """The layer's place that a parameter's name begins with."""
    return name.split(".")[1] if name.startswith("h.") else None
