"""`Service`: what all tasks stand on. It tokenizes, checks what depends on the model, and asks the engine.

The tasks themselves are `generation`, `classification`, `zero_shot_classification` and `question_answering`; HTTP
routes and the Python handle are thin layers over them. The engine is known only as the `EngineClient` protocol, so it
may be in this process or behind Ray Serve.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.request_context import RequestContext, current_request
from gptj_serve.api.status import PipelineChanges
from gptj_serve.config import ServiceConfig
from gptj_serve.errors import (
    GPTJServeError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    UnsatisfiableError,
)
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.heads import HeadInfo, HeadKind
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import (
    DEFAULT_HEAD,
    EngineRequest,
    Event,
    FailureEvent,
    HeadEvent,
    Matrix,
    SamplingParams,
    Task,
    num_generated,
)

Result = TypeVar("Result")

MAX_CHARACTERS_ON_LOOP = 4096
"""Longer texts are tokenized in a thread: about a millisecond per 4,000 characters, in which no other text goes out. So
are answers of more values than that."""


class EngineClient(Protocol):
    """Where requests go."""

    def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        """The request's events, ending with its terminal one. Closing the iterator early aborts the request.

        Raises `InvalidRequestError`, `OverloadedError` or `RequestFailedError`.
        """

    def queue_wait_s(self) -> float:
        """How long a request that came now would wait for its turn, as far as that is known."""

    async def status(self) -> tuple[list[dict[str, Any]], list[str]]:
        """What each pipeline is doing, as `api.status.PipelineStatus`, and a line for each that did not answer."""

    async def pipeline_changes(self) -> PipelineChanges | None:
        """How many pipelines are being started and stopped, if that can be told. Asked only where load decides it."""


class Service:
    """Serves one model.

    All methods raise `InvalidRequestError`, `OverloadedError`, `RequestFailedError` or `RequestTimeoutError`.
    """

    def __init__(
        self,
        config: ServiceConfig,
        model: GPTJConfig,
        heads: Sequence[str],
        tokenizer: Tokenizer,
        engine: EngineClient,
        named_heads: Mapping[str, HeadInfo] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.heads = heads
        self.tokenizer = tokenizer
        self.engine = engine
        self.named_heads = named_heads or {}
        self.chat_template = chat_template

    @property
    def tasks(self) -> list[str]:
        """The tasks that the checkpoint has a head for."""
        available = {
            Task.GENERATE: "lm_head" in self.heads,
            Task.CLASSIFY: bool(self.head_names("score")),
            Task.QA: bool(self.head_names("qa_outputs")),
        }
        return [task.value for task, is_available in available.items() if is_available]

    # ── what is asked ────────────────────────────────────────────────────────────────────────────────────

    async def encode_prompt(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        field: str,
        length_field: str,
        *,
        num_kept: int | None = None,
    ) -> list[int]:
        """Token ids of a prompt that, with its completion, fits the model; an error uses the fields' names.

        Of a longer prompt the last `num_kept` tokens are kept, if that is given; -1 stands for as many as fit.
        """
        self.require_head("lm_head", "generation")
        if isinstance(prompt, str):
            token_ids = await self.encode(prompt, field, is_truncated=num_kept is not None)
        else:
            token_ids = self.check_token_ids(prompt, field)
        if num_kept is not None:
            token_ids = token_ids[-(max(1, self.model.n_positions - max_new_tokens) if num_kept == -1 else num_kept) :]
        room = self.model.n_positions - len(token_ids)
        if room < min(1, max_new_tokens):
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

    async def encode(self, text: str, field: str, *, is_truncated: bool = False) -> list[int]:
        """At least one token, and unless it will be truncated no more than the model's context."""
        longest = self.model.n_positions * self.tokenizer.max_token_bytes
        if len(text) > longest and not is_truncated:  # before spending time on it
            reason = f"has {len(text)} characters; the model's context holds at most {longest}"
            raise InvalidRequestError(field, text, reason)
        token_ids = await off_loop(len(text), self.tokenizer.encode, text)
        if not token_ids:
            raise InvalidRequestError(field, text, "must not be empty")
        if len(token_ids) > self.model.n_positions and not is_truncated:
            raise InvalidRequestError(
                field, text, f"has {len(token_ids)} tokens; the model's context is {self.model.n_positions}"
            )
        return token_ids

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.served_name:
            raise InvalidRequestError("model", name, f"this service has {self.config.served_name!r} only")

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> list[int]:
        for token_id in token_ids:
            if token_id >= self.model.vocab_size:
                raise InvalidRequestError(field, token_id, f"token ids are below {self.model.vocab_size}")
        return list(token_ids)

    def check_batch(self, inputs: Sequence[Any], field: str = "inputs") -> None:
        limit = self.config.ingress.max_batch_inputs
        if len(inputs) > limit:
            raise InvalidRequestError(field, len(inputs), f"at most {limit} inputs in one request")

    def require_head(self, head: str, task: str) -> None:
        if head not in self.heads:
            raise InvalidRequestError(
                "model", self.config.served_name, f"the checkpoint has no {task} head ({head}), only {list(self.heads)}"
            )

    def choose_head(self, name: str | None, kind: str, task: str) -> str:
        """The head of that name; without one the checkpoint's own, or the only one that there is."""
        names = self.head_names(kind)
        if name is None and not names:
            self.require_head(kind, task)
        if name is None and (names[0] == DEFAULT_HEAD or len(names) == 1):
            return names[0]
        if name is None or name not in names:
            reason = "choose a head" if name is None else f"there is no such {task} head"
            raise InvalidRequestError("model", name, f"{reason}; this service has {', '.join(map(repr, names))}")
        return name

    def head_names(self, kind: str) -> list[str]:
        """The heads of a kind ("score" or "qa_outputs"), the checkpoint's own first."""
        wanted = HeadKind.CLASSIFIER if kind == "score" else HeadKind.QA
        own = [DEFAULT_HEAD] if kind in self.heads else []
        return own + [name for name, info in self.named_heads.items() if info.kind is wanted]

    # ── what the engine answers ──────────────────────────────────────────────────────────────────────────

    async def events(
        self, task: Task, token_ids: list[int], *, priority: int | None = None, **options: Any
    ) -> AsyncGenerator[Event]:
        """Those of the engine, for a request of its own; `options` are the other fields of `EngineRequest`.

        A failure is raised, and `RequestTimeoutError` when the time of the request that is being answered is over.
        """
        context = current_request()
        record = context.record
        request = EngineRequest(
            request_id=context.new_sequence_id(),
            task=task,
            prompt_token_ids=token_ids,
            priority=context.priority if priority is None else priority,
            is_admitted=record.num_sequences > 0,
            time_left_s=_time_left_s(context, options.get("sampling")),
            **options,
        )
        record.add_sequence(request)
        num_unpaid = len(token_ids) + len(request.continuation_token_ids)  # until the engine has taken it
        last_token_at: float | None = None
        try:
            async with aclosing(self.engine.submit(request)) as events:
                while (event := await _before_deadline(anext(events, None), context)) is not None:
                    if isinstance(event, FailureEvent) and event.retry_after_s is not None:
                        raise OverloadedError(event.message, event.retry_after_s)
                    if isinstance(event, FailureEvent) and not event.is_request_at_fault:
                        raise RequestFailedError(event.message)
                    if context.account is not None:
                        context.account.spend(num_unpaid + num_generated(event))
                        num_unpaid = 0
                    if isinstance(event, FailureEvent):
                        raise UnsatisfiableError(event.message)
                    last_token_at = record.add_event(event, last_token_at)
                    yield event
        except GPTJServeError as error:
            record.fail(error)
            raise

    async def values(self, task: Task, token_ids: list[int], **options: Any) -> Matrix:
        """The answer to a request that doesn't generate; `options` as for `events`."""
        async with aclosing(self.events(task, token_ids, **options)) as events:
            async for event in events:
                assert isinstance(event, HeadEvent)
                return event.values
        raise AssertionError("a stream of events ends with a terminal one")


def _time_left_s(request: RequestContext, sampling: SamplingParams | None) -> float | None:
    """In which it must begin: what is left of the request's own time, or of what its tokens may take."""
    limits = [] if sampling is None or sampling.max_time_s is None else [sampling.max_time_s]
    if request.time_left_s is not None:
        limits.append(request.time_left_s)
    return min(limits, default=None)


async def _before_deadline(step: Coroutine[Any, Any, Result], request: RequestContext) -> Result:
    if request.deadline is None:
        return await step
    timer = asyncio.timeout(request.deadline - time.monotonic())
    try:
        async with timer:
            return await step
    except TimeoutError:
        if not timer.expired():
            raise  # not for want of the request's time
        raise request.out_of_time() from None


async def off_loop(num_characters: int, function: Callable[..., Result], *args: Any) -> Result:
    """Call a function that is busy with so many characters or values; in a thread, if they are many."""
    if num_characters <= MAX_CHARACTERS_ON_LOOP:
        return function(*args)
    return await asyncio.to_thread(function, *args)


async def run_all(coroutines: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all at once. If one fails, the others are cancelled and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]
