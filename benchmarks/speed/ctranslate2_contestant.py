"""CTranslate2's `Generator`, on the same checkpoint through its own converter, timed by its callback per token."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import transformers
from ctranslate2.converters import TransformersConverter

from benchmarks.speed.contestants import Contestant, Settings
from benchmarks.speed.static_batches import OnToken, serve_in_batches
from benchmarks.speed.streams import Request, Stream


def load(contestant: Contestant, settings: Settings) -> "CTranslate2":
    transformers.logging.disable_progress_bar()
    compute_type = "int8" if contestant.quantization == "int8" else "float32"
    with tempfile.TemporaryDirectory(prefix="ctranslate2-", dir=settings.directory) as work:  # there is room for it
        converted = str(Path(work) / "model")
        converter = _Converter(str(settings.directory), settings.config.vocab_size)
        converter.convert(converted, quantization=contestant.quantization if compute_type == "int8" else None)
        generator = ctranslate2.Generator(converted, compute_type=compute_type, intra_threads=settings.threads)
    return CTranslate2(generator)


class _Converter(TransformersConverter):  # type: ignore[misc]
    """The checkpoint has no tokenizer: tokens are called by their numbers."""

    def __init__(self, directory: str, vocab_size: int) -> None:
        super().__init__(directory)
        self._vocab_size = vocab_size

    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> "_Numbers":
        return _Numbers(self._vocab_size)


class _Numbers:
    bos_token = eos_token = unk_token = "0"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(token_id): token_id for token_id in range(self._vocab_size)}


class CTranslate2:
    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.facts = {"version": ctranslate2.__version__, "compute_type": generator.compute_type}

    def generate(self, requests: Sequence[Request], max_batch: int, limit_s: float) -> list[Stream]:
        return serve_in_batches(self._run, requests, max_batch, limit_s)

    def _run(self, batch: Sequence[Request], on_token: OnToken) -> None:
        num_left = [request.num_new_tokens for request in batch]
        longest = max(num_left)

        def on_step(step: Any) -> bool:
            """True ends the row: it makes room for the others."""
            num_left[step.batch_id] -= 1
            if num_left[step.batch_id] >= 0:
                on_token(step.batch_id, step.token_id)
            return num_left[step.batch_id] <= 0

        self._generator.generate_batch(
            [[str(token_id) for token_id in request.prompt] for request in batch],
            include_prompt_in_result=False,  # else prompts go through the model token by token
            min_length=longest,
            max_length=longest,
            callback=on_step,
        )
