"""transformers' `generate` with a model of the same shape, on the same device, in the same run."""

import time
from collections.abc import Sequence

import torch

from benchmarks.gpu.machine import synchronize
from gptj_serve.model.config import GPTJConfig


class Peer:
    """Weights are random too, and made on the device."""

    def __init__(self, config: GPTJConfig, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import GPTJConfig as TheirConfig
        from transformers import GPTJForCausalLM

        names = ("n_layer", "n_embd", "n_head", "rotary_dim", "vocab_size", "n_positions")
        special = {} if config.vocab_size > 50256 else {"bos_token_id": 0, "eos_token_id": 0}
        theirs = TheirConfig(**{name: getattr(config, name) for name in names}, **special)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self._model = GPTJForCausalLM(theirs).eval()
        finally:
            torch.set_default_dtype(before)
        self._device = device

    @property
    def attention(self) -> str:
        return str(self._model.config._attn_implementation)

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], num_new: int, rounds: int = 2) -> float:
        """The faster of the rounds, after one to warm up."""
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
        times = []
        for _ in range(rounds + 1):
            synchronize(self._device)
            started = time.perf_counter()
            with torch.inference_mode():
                made = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_new,
                    min_new_tokens=num_new,
                    do_sample=False,
                    pad_token_id=0,
                )
            synchronize(self._device)
            times.append(time.perf_counter() - started)
            assert made.shape[1] == ids.shape[1] + num_new
        return len(prompts) * num_new / min(times[1:])
