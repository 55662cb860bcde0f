"""transformers' `generate`: static batches, padded on the left, timed by its streamer."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from benchmarks.speed.contestants import Contestant, Settings
from benchmarks.speed.static_batches import OnToken, serve_in_batches
from benchmarks.speed.streams import Request, Stream


def load(contestant: Contestant, settings: Settings) -> "Transformers":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, contestant.dtype)
    for attention in ("sdpa", "eager"):
        try:
            model = transformers.GPTJForCausalLM.from_pretrained(
                settings.directory, dtype=dtype, attn_implementation=attention
            )
        except ValueError:  # it has no such attention for this model
            if attention == "eager":
                raise
            continue
        break
    return Transformers(model.eval(), attention)


class Transformers:
    def __init__(self, model: transformers.GPTJForCausalLM, attention: str) -> None:
        model.generation_config.eos_token_id = None  # nothing ends early, and nothing is spent on that
        self._model = model
        self.facts = {"version": transformers.__version__, "attention": attention}

    def generate(self, requests: Sequence[Request], max_batch: int, limit_s: float) -> list[Stream]:
        return serve_in_batches(self._run, requests, max_batch, limit_s)

    @torch.inference_mode()
    def _run(self, batch: Sequence[Request], on_token: OnToken) -> None:
        longest = max(len(request.prompt) for request in batch)
        token_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        for row, request in enumerate(batch):
            token_ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        counts = [request.num_new_tokens for request in batch]
        self._model.generate(
            token_ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=max(counts),
            max_new_tokens=max(counts),
            pad_token_id=0,
            streamer=_Times(counts, on_token),
        )


class _Times(BaseStreamer):
    """Rows that have their tokens go on to the batch's end: what they get then is not counted."""

    def __init__(self, counts: Sequence[int], on_token: OnToken) -> None:
        self._counts = counts
        self._on_token = on_token
        self._num_steps = -1  # the prompts come first

    def put(self, value: Tensor) -> None:
        if self._num_steps >= 0:
            for row, token_id in enumerate(value.tolist()):
                if self._num_steps < self._counts[row]:
                    self._on_token(row, token_id)
        self._num_steps += 1

    def end(self) -> None:
        pass
