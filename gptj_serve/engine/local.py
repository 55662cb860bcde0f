"""`LocalEngine`: an engine in this process, with one async stream of events per request."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Self

from gptj_serve.engine.engine import Engine, Pipeline
from gptj_serve.engine.logit_editor import TokenMatcher
from gptj_serve.engine.scheduler import Scheduler
from gptj_serve.errors import InvalidRequestError, PipelineError
from gptj_serve.types import EngineRequest, EngineStats, Event, FailureEvent, Grammar, is_terminal


class LocalEngine:
    """Runs the engine loop for as long as it is entered: `async with LocalEngine(...) as engine`."""

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        compile_grammar: Callable[[Grammar], Awaitable[TokenMatcher]] | None = None,
    ) -> None:
        self._compile_grammar = compile_grammar
        self._engine = Engine(scheduler, pipeline, self._deliver)
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._loop_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop_task is not None
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        """The request's events; closing the stream early aborts it.

        Raises `InvalidRequestError` or `OverloadedError`, or `PipelineError` once the engine has stopped.
        """
        matcher = await self._matcher(request)
        if self._loop_task is None or self._loop_task.done():
            raise PipelineError("the engine has stopped")
        self._engine.add(request, matcher)
        queue = self._streams[request.request_id] = asyncio.Queue()
        try:
            while True:
                event = await queue.get()
                yield event
                if is_terminal(event):
                    return
        finally:
            del self._streams[request.request_id]
            self._engine.abort(request.request_id)

    def queue_wait_s(self) -> float:
        return self._engine.queue_wait_s()

    async def status(self) -> tuple[list[dict[str, Any]], list[str]]:
        """As of a service with one pipeline, and no problem to tell of."""
        return [{"replica_id": "local", **self._engine.status()}], []

    async def pipeline_changes(self) -> None:
        """There are none."""

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def _matcher(self, request: EngineRequest) -> TokenMatcher | None:
        grammar = request.sampling.grammar if request.sampling is not None else None
        if grammar is None:
            return None
        if self._compile_grammar is None:
            raise InvalidRequestError("grammar", grammar.text, "needs a tokenizer, which this engine was not given")
        return await self._compile_grammar(grammar)

    async def _run(self) -> None:
        try:
            await self._engine.run()
        finally:
            self._deliver([FailureEvent(request_id, "the engine has stopped") for request_id in self._streams])

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if (queue := self._streams.get(event.request_id)) is not None:
                queue.put_nowait(event)
