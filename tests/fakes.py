"""What tests put in place of the parts they are not about: a tokenizer made on the spot, an engine without a model."""

import asyncio
import functools
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptj_serve.api.status import PipelineChanges
from gptj_serve.model.config import GPTJConfig
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import (
    DEFAULT_HEAD,
    Beam,
    BeamEvent,
    EngineRequest,
    Event,
    FailureEvent,
    FinishReason,
    HeadEvent,
    Matrix,
    PromptEvent,
    SamplingParams,
    Task,
    TokenEvent,
    TokenLogprob,
    is_terminal,
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Paris is the capital of France; Ljubljana is the capital of Slovenia.",
    "Žlutý kůň úpěl ďábelské ódy. Ψηφίο, ψηφία! Москва — столица России.",
    "Coffee costs 3 € in a café; naïve façades, 東京は日本の首都です。",
    "Don't panic: it's only 12345 lines of code.\n\n\tIndented, too.",
]
SPECIAL_TOKEN = "<|endoftext|>"
ADDED_TOKEN = "<|extra→1|>"
"""Holds a character that is not in the byte alphabet."""
HOLE = 3
"""So many ids lie between the added tokens and the model's logits: they stand for no token."""


@functools.cache
def small_backend_json() -> str:
    """A byte-level BPE like GPT-J's, with a special and a plain added token, as the text of a `tokenizer.json`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens([SPECIAL_TOKEN])
    backend.add_tokens([ADDED_TOKEN])
    return backend.to_str()


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(small_backend_json()))


def small_model(**changes: Any) -> GPTJConfig:
    """A shape for `small_tokenizer`, with three labels and a context of 64 tokens."""
    tokenizer = small_tokenizer()
    (eos_token_id,) = tokenizer.special_token_ids
    values: dict[str, Any] = {
        "vocab_size": tokenizer.num_token_ids + HOLE,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "rotary_dim": 8,
        "eos_token_id": eos_token_id,
        "bos_token_id": eos_token_id,
        "id2label": {0: "bad", 1: "good", 2: "neither"},
    }
    return GPTJConfig.from_dict(values | changes)


class FakeEngine:
    """An `EngineClient` whose answers are a function of the request alone.

    `script` maps a prompt's text to the text that it is continued with (then comes the end token). Other prompts get
    pseudo-random tokens. Log-probabilities are those of a model made up on the spot, the same for a token wherever it
    is asked for. The engine keeps all requests, and the ids of those that were closed before their end.
    """

    def __init__(self, model: GPTJConfig, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.script: dict[str, str] = {}
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.num_running = 0
        self.num_status_calls = 0
        self.changes: PipelineChanges | None = None
        self.wait_s = 0.0
        self.refusal: Callable[[EngineRequest], Exception | None] = lambda request: None
        self.fail_at: Callable[[EngineRequest, int], str | Exception | FailureEvent | None] = lambda request, index: (
            None
        )
        self.end_at: Callable[[EngineRequest, int], FinishReason | None] = lambda request, index: None
        self.pause_at: int | None = None  # requests wait before their token of this index until `resumed` is set
        self.resumed = asyncio.Event()
        self.head_logits: Callable[[EngineRequest], list[list[float]]] = self._pseudo_random_logits

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        self.requests.append(request)
        if (error := self.refusal(request)) is not None:
            raise error
        is_finished = False
        self.num_running += 1
        try:
            async for event in self._events(request):
                is_finished = is_terminal(event)
                yield event
        except Exception:
            is_finished = True
            raise
        finally:
            self.num_running -= 1
            if not is_finished:
                self.aborted.append(request.request_id)

    def queue_wait_s(self) -> float:
        return self.wait_s

    async def status(self) -> tuple[list[dict[str, Any]], list[str]]:
        self.num_status_calls += 1
        pipeline = {"replica_id": "a", "is_ready": True, "now": 1.5, "tokens_per_s": 2.5, "stages": []}
        return [pipeline | {"engine": {"num_running": self.num_running}}], ["pipeline b does not answer"]

    async def pipeline_changes(self) -> PipelineChanges | None:
        return self.changes

    def logprobs_after(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """[vocab_size]; what the made-up model says of the token after these."""
        seed = int.from_bytes(hashlib.sha256(repr(list(token_ids)).encode()).digest()[:8])
        logits = np.random.default_rng(seed).normal(size=self.model.vocab_size) * 3
        logprobs: NDArray[np.float32] = (logits - np.logaddexp.reduce(logits)).astype("<f4")
        return logprobs

    def score_rows(self, token_ids: Sequence[int], first: int, num_top: int) -> list[list[float]]:
        """Of each token from the one at `first` on: its log-probability, the likeliest ids, theirs."""
        rows = []
        for index in range(first, len(token_ids)):
            logprobs = self.logprobs_after(token_ids[:index])
            top = np.argsort(-logprobs)[:num_top]
            rows.append([float(logprobs[token_ids[index]]), *map(float, top), *map(float, logprobs[top])])
        return rows

    async def _events(self, request: EngineRequest) -> AsyncGenerator[Event]:
        if request.task is not Task.GENERATE or (request.sampling is not None and request.sampling.beams is not None):
            await self._step(request, 0)
            failure = self.fail_at(request, 0)
            if isinstance(failure, str):
                yield FailureEvent(request.request_id, failure)
            elif request.task is Task.GENERATE:
                yield BeamEvent(request.request_id, self._beams(request))
            else:
                yield HeadEvent(request.request_id, Matrix.of(self.head_logits(request)))
            return
        assert request.sampling is not None
        scripted = self._scripted(request)
        token_ids = list(request.prompt_token_ids)
        index = 0
        while True:
            await self._step(request, index)
            failure = self.fail_at(request, index)
            if isinstance(failure, str | FailureEvent):
                yield FailureEvent(request.request_id, failure) if isinstance(failure, str) else failure
                return
            if index == 0 and request.sampling.prompt_logprobs:
                rows = self.score_rows(request.prompt_token_ids, 1, request.sampling.num_top_logprobs)
                yield PromptEvent(request.request_id, Matrix.of(rows))
            token_id = self._next_token(request.sampling, token_ids, index) if scripted is None else scripted[index]
            logprob, top = self._scores(token_ids, token_id, request.sampling.num_top_logprobs)
            token_ids.append(token_id)
            finish_reason = self.end_at(request, index) or self._finish_reason(request.sampling, token_id, index + 1)
            yield TokenEvent(request.request_id, index, token_id, logprob, finish_reason, top)
            if finish_reason is not None:
                return
            index += 1

    async def _step(self, request: EngineRequest, index: int) -> None:
        await asyncio.sleep(0)
        failure = self.fail_at(request, index)
        if isinstance(failure, Exception):
            raise failure
        if failure is None and index == self.pause_at:
            await self.resumed.wait()

    def _scripted(self, request: EngineRequest) -> list[int] | None:
        text = self.script.get(self.tokenizer.decode(request.prompt_token_ids))
        if text is None:
            return None
        return [*self.tokenizer.encode(text), *([min(self.tokenizer.special_token_ids)] * 100)]

    def _scores(self, context: list[int], token_id: int, num_top: int) -> tuple[float, list[TokenLogprob]]:
        ((logprob, *top),) = self.score_rows([*context, token_id], len(context), num_top)
        return logprob, list(zip(map(int, top[:num_top]), top[num_top:], strict=True))

    def _next_token(self, sampling: SamplingParams, token_ids: list[int], index: int) -> int:
        if not sampling.warpers.temperature:
            token_id = int(self.logprobs_after(token_ids).argmax())
        else:
            warpers = sampling.warpers
            knobs = (warpers.temperature, warpers.top_k, warpers.top_p, sampling.seed)
            digest = hashlib.sha256(repr((token_ids, knobs)).encode()).digest()
            token_id = int.from_bytes(digest[:4]) % self.model.vocab_size
        return 0 if token_id in self.model.eos_token_ids and index < sampling.min_new_tokens else token_id

    def _finish_reason(self, sampling: SamplingParams, token_id: int, num_tokens: int) -> FinishReason | None:
        if num_tokens >= sampling.min_new_tokens:
            if token_id in self.model.eos_token_ids and not sampling.ignore_eos:
                return FinishReason.EOS
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens == sampling.max_new_tokens else None

    def _beams(self, request: EngineRequest) -> list[Beam]:
        """The first one as scripted, the others of two tokens; worse and worse."""
        sampling = request.sampling
        assert sampling is not None
        assert sampling.beams is not None
        scripted = self._scripted(request) or []
        until_end = [token_id for token_id in scripted if token_id not in self.model.eos_token_ids]
        beams = [Beam([1, index], -float(index + 1), FinishReason.LENGTH) for index in range(64)]
        if until_end:
            beams.insert(0, Beam([*until_end, scripted[-1]], -0.5, FinishReason.EOS))
        return beams[: sampling.beams.num_return_sequences]

    def _pseudo_random_logits(self, request: EngineRequest) -> list[list[float]]:
        """[1][num_labels], [num_tokens][2], in [0, 8), or [1][n_embd]; of SCORE what the made-up model says."""

        salt = () if request.head == DEFAULT_HEAD else (request.head,)

        def logit(*key: object) -> float:
            key = (*key, *salt)
            return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4]) / 2**29

        ids = request.prompt_token_ids
        if request.task is Task.SCORE:
            token_ids = [*ids, *request.continuation_token_ids]
            return self.score_rows(token_ids, len(ids), request.num_top_logprobs)
        if request.task is Task.EMBED:
            return [[logit(request.pooling.value, column, *ids) - 4 for column in range(self.model.n_embd)]]
        if request.task is Task.CLASSIFY:
            return [[logit(label, *ids) for label in range(self.model.num_labels)]]
        return [[logit(0, i, token_id), logit(1, i, token_id)] for i, token_id in enumerate(ids)]
