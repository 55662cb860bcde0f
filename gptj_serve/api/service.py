"""`Service`: the three tasks as methods. It tokenizes, checks what depends on the model, and turns events into text.

HTTP routes and the Python handle are both thin layers over it. The engine is known only as the `EngineClient`
protocol, so it may be in this process or behind Ray Serve.
"""

import asyncio
import math
import secrets
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from gptj_serve import zero_shot
from gptj_serve.api.schemas import (
    ClassifyParameters,
    ClassifyRequest,
    GenerateRequest,
    QAInputs,
    QAParameters,
    QARequest,
)
from gptj_serve.config import ServiceConfig
from gptj_serve.errors import InvalidRequestError, RequestFailedError
from gptj_serve.extractive_qa import Answer, QAOptions, best_answers, make_windows
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.heads import HeadInfo, HeadKind
from gptj_serve.tokenizer import IncrementalDetokenizer, StopStringScanner, Tokenizer
from gptj_serve.types import (
    DEFAULT_HEAD,
    EngineRequest,
    Event,
    FailureEvent,
    FinishReason,
    HeadEvent,
    Matrix,
    Pooling,
    SamplingParams,
    Task,
    TokenEvent,
)

Result = TypeVar("Result")

MAX_ZERO_SHOT_PAIRS = 1024
"""Inputs times candidate labels of one request."""


class EngineClient(Protocol):
    """Where requests go."""

    def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        """The request's events, ending with its terminal one. Closing the iterator early aborts the request.

        Raises `InvalidRequestError`, `OverloadedError` or `RequestFailedError`.
        """

    async def status(self) -> list[dict[str, Any]]:
        """What each pipeline is doing."""


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """`SamplingParams`, and the stop strings, which are text and so never reach the engine."""

    sampling: SamplingParams
    stop_strings: Sequence[str] = ()
    include_stop_string: bool = False


@dataclass(frozen=True, slots=True)
class TextChunk:
    """One generated token and the text that can be released with it; the last has a finish reason."""

    token_id: int
    token_text: str  # this token's own text, as far as it is whole characters
    logprob: float
    text: str  # what may be shown now: withheld while it could still become a stop string
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class LabelScore:
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class ZeroShotResult:
    """The labels, best first, and their scores: what transformers' zero-shot pipeline returns."""

    sequence: str
    labels: list[str]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class _Head:
    """A classification head as requests see it."""

    name: str
    labels: Sequence[str]
    problem_type: str | None
    pooling: Pooling = Pooling.LAST


class Service:
    """Serves one model. All methods raise `InvalidRequestError`, `OverloadedError` or `RequestFailedError`."""

    def __init__(
        self,
        config: ServiceConfig,
        model: GPTJConfig,
        heads: Sequence[str],
        tokenizer: Tokenizer,
        engine: EngineClient,
        named_heads: Mapping[str, HeadInfo] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.heads = heads
        self.tokenizer = tokenizer
        self.engine = engine
        self.named_heads = named_heads or {}

    @property
    def tasks(self) -> list[str]:
        """The tasks that the checkpoint has a head for."""
        available = {
            Task.GENERATE: "lm_head" in self.heads,
            Task.CLASSIFY: bool(self._head_names("score")),
            Task.QA: bool(self._head_names("qa_outputs")),
        }
        return [task.value for task, is_available in available.items() if is_available]

    async def generate(self, token_ids: list[int], params: GenerationParams) -> AsyncGenerator[TextChunk]:
        """Stream the completion of a prompt that `encode_prompt` has checked."""
        detokenizer = IncrementalDetokenizer(self.tokenizer)
        scanner = StopStringScanner(params.stop_strings, include_in_output=params.include_stop_string)
        request = EngineRequest(
            request_id=_new_request_id(), task=Task.GENERATE, prompt_token_ids=token_ids, sampling=params.sampling
        )
        async with aclosing(self._events(request)) as events:
            async for event in events:
                assert isinstance(event, TokenEvent)
                finish_reason = event.finish_reason
                token_text = detokenizer.push(event.token_id)
                if finish_reason is not None:
                    token_text += detokenizer.flush()
                text = scanner.push(token_text)
                if scanner.stopped_by is not None:
                    finish_reason = FinishReason.STOP
                elif finish_reason is not None:
                    text += scanner.flush()
                yield TextChunk(event.token_id, token_text, event.logprob, text, finish_reason)
                if finish_reason is not None:
                    return

    async def classify(self, request: ClassifyRequest) -> list[list[LabelScore]]:
        """Per input its labels, best first: those of the checkpoint's config.json, or of the head that is asked for."""
        for name in ("hypothesis_template", "multi_label"):
            if (value := getattr(request.parameters, name)) is not None:
                raise InvalidRequestError(f"parameters.{name}", value, "goes with candidate_labels only")
        head = self._classifier(self._choose_head(request.model, "score", "classification"))
        inputs = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        self._check_batch(inputs)
        prompts = [self._encode(text, "inputs") for text in inputs]
        prompts = [self._without_trailing_pads(ids) for ids in prompts]
        logits = await run_all(
            [self._values(Task.CLASSIFY, ids, head=head.name, pooling=head.pooling) for ids in prompts]
        )
        return [self._label_scores(matrix.rows()[0], request.parameters, head) for matrix in logits]

    async def classify_zero_shot(self, request: ClassifyRequest) -> list[ZeroShotResult]:
        """Per input its candidate labels, best first, by their likelihood through the LM head."""
        self._require_head("lm_head", "zero-shot classification")
        parameters = request.parameters
        for field, value in (
            ("model", request.model),
            ("parameters.top_k", parameters.top_k),
            ("parameters.function_to_apply", parameters.function_to_apply),
        ):
            if value is not None:
                raise InvalidRequestError(field, value, "has no meaning with candidate_labels")
        inputs = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        self._check_batch(inputs)
        template = parameters.hypothesis_template or zero_shot.DEFAULT_HYPOTHESIS_TEMPLATE
        try:
            labels = zero_shot.parse_labels(parameters.candidate_labels or [])
            hypotheses = [zero_shot.make_hypothesis(template, label) for label in labels]
        except InvalidRequestError as error:
            raise InvalidRequestError(f"parameters.{error.field}", error.value, error.reason) from None
        if len(inputs) * len(labels) > MAX_ZERO_SHOT_PAIRS:
            raise InvalidRequestError(
                "parameters.candidate_labels",
                len(labels),
                f"{len(inputs)} inputs with {len(labels)} labels each: over the limit of {MAX_ZERO_SHOT_PAIRS} pairs",
            )
        bos = self.model.bos_token_id
        neutral = [zero_shot.neutral_prompt(self.tokenizer, hypothesis, bos) for hypothesis in hypotheses]
        given = [zero_shot.prompt(self.tokenizer, text, hypothesis) for text in inputs for hypothesis in hypotheses]
        continuations = [zero_shot.continuation(self.tokenizer, hypothesis) for hypothesis in hypotheses]
        pairs = list(zip([*neutral, *given], continuations * (1 + len(inputs)), strict=True))
        for index, (prompt, continuation) in enumerate(pairs):
            if len(prompt) + len(continuation) > self.model.n_positions:
                text = inputs[max(0, index // len(labels) - 1)]
                raise InvalidRequestError(
                    "inputs",
                    text,
                    f"{len(prompt)} tokens + {len(continuation)} of a label exceed the model's context of "
                    f"{self.model.n_positions}",
                )
        scores = await run_all([self._log_likelihood(prompt, continuation) for prompt, continuation in pairs])
        multi_label = bool(parameters.multi_label)
        results = []
        for index, text in enumerate(inputs, 1):
            likelihoods = scores[index * len(labels) : (index + 1) * len(labels)]
            values = zero_shot.label_probabilities(likelihoods, scores[: len(labels)], multi_label=multi_label)
            ranked = sorted(zip(labels, values, strict=True), key=lambda pair: -pair[1])
            results.append(ZeroShotResult(text, [label for label, _ in ranked], [value for _, value in ranked]))
        return results

    async def answer(self, request: QARequest) -> list[list[Answer]]:
        """Per question its answers, best first."""
        head = self._choose_head(request.model, "qa_outputs", "question answering")
        inputs = request.inputs if isinstance(request.inputs, list) else [request.inputs]
        self._check_batch(inputs)
        options = QAOptions(**request.parameters.model_dump())
        max_windows = max(1, self.config.ingress.max_qa_windows // len(inputs))
        return await run_all([self._answer_one(item, options, head, max_windows) for item in inputs])

    def encode_prompt(
        self, prompt: str | Sequence[int], max_new_tokens: int, field: str, length_field: str
    ) -> list[int]:
        """Token ids of a prompt that, with its completion, fits the model; an error uses the fields' names."""
        self._require_head("lm_head", "generation")
        token_ids = self._encode(prompt, field) if isinstance(prompt, str) else self.check_token_ids(prompt, field)
        room = self.model.n_positions - len(token_ids)
        if room < 1:
            raise InvalidRequestError(
                field, prompt, f"has {len(token_ids)} tokens; the model's context of {self.model.n_positions} is full"
            )
        if max_new_tokens > room:
            raise InvalidRequestError(
                length_field,
                max_new_tokens,
                f"{len(token_ids)} prompt tokens + {max_new_tokens} new tokens exceed the model's context of "
                f"{self.model.n_positions}",
            )
        return token_ids

    def generation_params(self, request: GenerateRequest) -> GenerationParams:
        """TGI's parameters as ours. Stop strings stay in the output, as they do there."""
        parameters = request.parameters
        check_minimum("parameters.min_new_tokens", parameters.min_new_tokens, parameters.max_new_tokens)
        sampling = SamplingParams(
            max_new_tokens=parameters.max_new_tokens,
            min_new_tokens=parameters.min_new_tokens,
            temperature=parameters.effective_temperature,
            top_k=parameters.top_k or 0,
            top_p=parameters.top_p or 1.0,
            seed=new_seed() if parameters.seed is None else parameters.seed,
            stop_token_ids=self.check_token_ids(parameters.stop_token_ids, "parameters.stop_token_ids"),
        )
        return GenerationParams(sampling, parameters.stop, include_stop_string=True)

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> list[int]:
        for token_id in token_ids:
            if token_id >= self.model.vocab_size:
                raise InvalidRequestError(field, token_id, f"token ids are below {self.model.vocab_size}")
        return list(token_ids)

    async def _answer_one(self, inputs: QAInputs, options: QAOptions, head: str, max_windows: int) -> list[Answer]:
        # Contexts may be long; in a thread their tokenization holds up nobody else's tokens.
        context = await asyncio.to_thread(self.tokenizer.encode_with_offsets, inputs.context)
        try:
            windows = make_windows(
                self.tokenizer, inputs.question, context, options, self.model.n_positions, max_windows
            )
        except InvalidRequestError as error:
            parent = "parameters" if error.field in QAParameters.model_fields else "inputs"
            raise InvalidRequestError(f"{parent}.{error.field}", error.value, error.reason) from None
        logits = await run_all([self._values(Task.QA, window.token_ids, head=head) for window in windows])
        return best_answers(inputs.context, context, windows, [matrix.rows() for matrix in logits], options)

    async def _log_likelihood(self, prompt: list[int], continuation: list[int]) -> float:
        values = await self._values(Task.SCORE, prompt, continuation=continuation)
        return float(values.array.sum(dtype="float64"))

    async def _values(
        self,
        task: Task,
        token_ids: list[int],
        *,
        head: str = DEFAULT_HEAD,
        pooling: Pooling = Pooling.LAST,
        continuation: Sequence[int] = (),
    ) -> Matrix:
        request = EngineRequest(
            request_id=_new_request_id(),
            task=task,
            prompt_token_ids=token_ids,
            head=head,
            pooling=pooling,
            continuation_token_ids=list(continuation),
        )
        async with aclosing(self._events(request)) as events:
            async for event in events:
                assert isinstance(event, HeadEvent)
                return event.values
        raise AssertionError("a stream of events ends with a terminal one")

    async def _events(self, request: EngineRequest) -> AsyncGenerator[Event]:
        async with aclosing(self.engine.submit(request)) as events:
            async for event in events:
                if isinstance(event, FailureEvent):
                    raise RequestFailedError(event.message)
                yield event

    def _encode(self, text: str, field: str) -> list[int]:
        longest = self.model.n_positions * self.tokenizer.max_token_bytes
        if len(text) > longest:  # before spending time on it
            reason = f"has {len(text)} characters; the model's context holds at most {longest}"
            raise InvalidRequestError(field, text, reason)
        token_ids = self.tokenizer.encode(text)
        if not token_ids:
            raise InvalidRequestError(field, text, "must not be empty")
        if len(token_ids) > self.model.n_positions:
            raise InvalidRequestError(
                field, text, f"has {len(token_ids)} tokens; the model's context is {self.model.n_positions}"
            )
        return token_ids

    def _without_trailing_pads(self, token_ids: list[int]) -> list[int]:
        """Transformers pools at the rightmost token that is not the pad token; what follows can't influence it."""
        length = len(token_ids)
        while length > 1 and token_ids[length - 1] == self.model.pad_token_id:
            length -= 1
        return token_ids[:length]

    def _label_scores(self, logits: Sequence[float], parameters: ClassifyParameters, head: _Head) -> list[LabelScore]:
        scores = _apply_function(logits, parameters.function_to_apply or _default_function(head))
        labels = [LabelScore(label, score) for label, score in zip(head.labels, scores, strict=True)]
        return sorted(labels, key=lambda label: -label.score)[: parameters.top_k]

    def _classifier(self, name: str) -> _Head:
        if name != DEFAULT_HEAD:
            info = self.named_heads[name]
            return _Head(name, info.labels, info.problem_type, Pooling(info.pooling))
        labels = [self.model.id2label[index] for index in range(self.model.num_labels)]
        return _Head(name, labels, self.model.problem_type)

    def _head_names(self, kind: str) -> list[str]:
        """The heads of a kind ("score" or "qa_outputs"), the checkpoint's own first."""
        wanted = HeadKind.CLASSIFIER if kind == "score" else HeadKind.QA
        own = [DEFAULT_HEAD] if kind in self.heads else []
        return own + [name for name, info in self.named_heads.items() if info.kind is wanted]

    def _choose_head(self, name: str | None, kind: str, task: str) -> str:
        """The head of that name; without one the checkpoint's own, or the only one that there is."""
        names = self._head_names(kind)
        if name is None and not names:
            self._require_head(kind, task)
        if name is None and (names[0] == DEFAULT_HEAD or len(names) == 1):
            return names[0]
        if name is None or name not in names:
            reason = "choose a head" if name is None else f"there is no such {task} head"
            raise InvalidRequestError("model", name, f"{reason}; this service has {', '.join(map(repr, names))}")
        return name

    def _check_batch(self, inputs: Sequence[Any]) -> None:
        limit = self.config.ingress.max_batch_inputs
        if len(inputs) > limit:
            raise InvalidRequestError("inputs", len(inputs), f"at most {limit} inputs in one request")

    def _require_head(self, head: str, task: str) -> None:
        if head not in self.heads:
            raise InvalidRequestError(
                "model", self.config.served_name, f"the checkpoint has no {task} head ({head}), only {list(self.heads)}"
            )


async def run_all(coroutines: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all at once. If one fails, the others are cancelled and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


def check_minimum(field: str, minimum: int, maximum: int) -> None:
    if minimum > maximum:
        raise InvalidRequestError(field, minimum, f"is over the maximum of {maximum} new tokens")


def new_seed() -> int:
    """The seed of a request that brings none; drawn once, so that a replay repeats it."""
    return secrets.randbits(63)


def _new_request_id() -> str:
    return secrets.token_hex(8)


def _default_function(head: _Head) -> str:
    """As in transformers' pipeline: sigmoid for several independent labels or a single one, else softmax."""
    multi_label = head.problem_type == "multi_label_classification"
    return "sigmoid" if multi_label or len(head.labels) == 1 else "softmax"


def _apply_function(logits: Sequence[float], function: str) -> list[float]:
    match function:
        case "none":
            return list(logits)
        case "sigmoid":
            return [0.5 * (1.0 + math.tanh(0.5 * x)) for x in logits]
        case _:
            highest = max(logits)
            weights = [math.exp(x - highest) for x in logits]
            return [weight / sum(weights) for weight in weights]
