"""The `Ingress` deployment: HTTP and the Python handle, over the pipelines."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

import ray.serve.context
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from ray.serve.handle import DeploymentHandle

from gptj_serve.api import huggingface, tokenization
from gptj_serve.api.app import create_app
from gptj_serve.api.chat import complete_chat, make_chat_plan, stream_chat
from gptj_serve.api.chat_schemas import ChatCompletionRequest
from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.completion_plan import make_plan
from gptj_serve.api.completions import complete, stream_completion
from gptj_serve.api.door.request_headers import checked_session_id
from gptj_serve.api.embedding_schemas import EmbedRequest
from gptj_serve.api.embeddings import embed
from gptj_serve.api.errors import invalid_request, most_telling
from gptj_serve.api.huggingface_responses import Detokenized, GenerateEvent
from gptj_serve.api.huggingface_schemas import ClassifyRequest, GenerateRequest, QARequest
from gptj_serve.api.openai_responses import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from gptj_serve.api.openai_schemas import CompletionRequest
from gptj_serve.api.request_context import RequestContext, answering
from gptj_serve.api.request_log import RequestLog
from gptj_serve.api.service import Service
from gptj_serve.api.tokenization_schemas import DetokenizeRequest, TokenizeRequest
from gptj_serve.config import ServiceConfig
from gptj_serve.errors import GPTJServeError, InvalidRequestError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import open_heads
from gptj_serve.model.version import text_digest
from gptj_serve.planner import plan_service
from gptj_serve.routing.choice import PipelineChoice
from gptj_serve.serving.engine_client import ServeEngineClient
from gptj_serve.serving.handover import MAX_CONSTRUCTOR_TRIES, own_handover
from gptj_serve.serving.logs import IngressLines, use_serve_logging
from gptj_serve.serving.metrics import RequestMetrics
from gptj_serve.serving.pipeline_counts import PipelineCounts, own_states
from gptj_serve.serving.proxy_loss import ProxyLossIsDisconnect
from gptj_serve.tokenizer import Tokenizer

Body = TypeVar("Body", bound=BaseModel)
Streamable = TypeVar("Streamable", GenerateRequest, CompletionRequest, ChatCompletionRequest)


class Ingress:
    """Serve calls its ASGI application for HTTP, and its methods for `serve.get_app_handle("gptj")`.

    The methods take the HTTP routes' bodies, as dicts or as models of `gptj_serve.api`'s schemas, and answer
    with what the routes answer, as plain dicts and lists, so that a caller needs nothing but Ray. For the same reason
    they raise built-in exceptions: `ValueError` for a bad request, naming field and value, `RuntimeError` for a failed
    one.
    """

    async def __init__(self, config: ServiceConfig, pipelines: DeploymentHandle) -> None:  # type: ignore[misc]
        use_serve_logging(IngressLines())
        checkpoint = Checkpoint.open(config.checkpoint_dir)
        tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
        metrics = RequestMetrics(config.served_name)
        self._request_log = RequestLog(metrics)
        heads = open_heads(config.head_dirs, checkpoint)
        named_heads = {name: head.info for name, head in heads.items()}
        text_version = text_digest(checkpoint, heads)
        plan = plan_service(config.pipeline, checkpoint)
        engine = ServeEngineClient(
            pipelines,
            metrics.replayed,
            on_route=metrics.routed,
            choice=PipelineChoice(
                plan.resources.block_size,
                plan.num_kv_blocks,
                is_prefix_aware=config.routing.prefer_cached_prefixes and config.pipeline.kv_cache.reuse_prefixes,
            ),
            replay_timeout_s=config.ingress.replay_timeout_s,
            max_queue_wait_s=config.pipeline.scheduler.max_queue_wait_s,
            text_version=text_version,
            counts=PipelineCounts(own_states),
            may_have_none=config.autoscaling is not None and config.autoscaling.min_pipelines == 0,
        )
        chat_template = ChatTemplate.open(config, checkpoint.config, tokenizer)
        self._service = Service(
            config, checkpoint.config, checkpoint.heads, tokenizer, engine, named_heads, chat_template
        )
        # In a thread, so that Serve can stop this replica while it waits; as long as a pipeline may try to start.
        timeout_s = MAX_CONSTRUCTOR_TRIES * config.pipeline.startup_timeout_s
        await asyncio.to_thread(own_handover(text_version).ingress_is_built, timeout_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._service, self._request_log, echoes_request_id=False)  # Serve's proxy does
        app.add_middleware(ProxyLossIsDisconnect)
        return app

    async def generate(self, request: GenerateRequest | dict[str, Any]) -> Any:
        """As `POST /generate`."""
        with self._call("generate"):
            return await huggingface.generate_whole(self._service, _whole(GenerateRequest, request, "generate_stream"))

    async def generate_stream(self, request: GenerateRequest | dict[str, Any]) -> AsyncGenerator[GenerateEvent]:
        """As `POST /generate_stream`: an item per token. Call it on `handle.options(stream=True)`."""
        with self._call("generate_stream"):
            body = _streamed(GenerateRequest, request)
            async with aclosing(huggingface.generate_stream(self._service, body)) as events:
                async for event in events:
                    yield event

    async def classify(self, request: ClassifyRequest | dict[str, Any]) -> Any:
        """As `POST /classify`."""
        with self._call("classify"):
            return await huggingface.classify_whole(self._service, _parse(ClassifyRequest, request))

    async def qa(self, request: QARequest | dict[str, Any]) -> Any:
        """As `POST /qa`."""
        with self._call("qa"):
            return await huggingface.answer_whole(self._service, _parse(QARequest, request))

    async def embed(self, request: EmbedRequest | dict[str, Any]) -> list[list[float]]:
        """As `POST /embed`."""
        with self._call("embed"):
            return await embed(self._service, _parse(EmbedRequest, request))

    async def complete(self, request: CompletionRequest | dict[str, Any]) -> Completion:
        """As `POST /v1/completions`."""
        with self._call("complete"):
            body = _whole(CompletionRequest, request, "complete_stream")
            self._service.check_model(body.model)
            return await complete(self._service, await make_plan(self._service, body))

    async def complete_stream(self, request: CompletionRequest | dict[str, Any]) -> AsyncGenerator[CompletionChunk]:
        """As `POST /v1/completions` with `stream`. Call it on `handle.options(stream=True)`."""
        with self._call("complete_stream"):
            body = _streamed(CompletionRequest, request)
            self._service.check_model(body.model)
            plan = await make_plan(self._service, body)
            async with aclosing(stream_completion(self._service, plan)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def chat(self, request: ChatCompletionRequest | dict[str, Any]) -> ChatCompletion:
        """As `POST /v1/chat/completions`."""
        with self._call("chat"):
            body = _whole(ChatCompletionRequest, request, "chat_stream")
            self._service.check_model(body.model)
            return await complete_chat(self._service, await make_chat_plan(self._service, body))

    async def chat_stream(self, request: ChatCompletionRequest | dict[str, Any]) -> AsyncGenerator[ChatCompletionChunk]:
        """As `POST /v1/chat/completions` with `stream`. Call it on `handle.options(stream=True)`."""
        with self._call("chat_stream"):
            body = _streamed(ChatCompletionRequest, request)
            self._service.check_model(body.model)
            plan = await make_chat_plan(self._service, body)
            async with aclosing(stream_chat(self._service, plan)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def tokenize(self, request: TokenizeRequest | dict[str, Any]) -> Any:
        """As `POST /tokenize`."""
        with self._call("tokenize"):
            return await tokenization.tokenize(self._service, _parse(TokenizeRequest, request))

    async def detokenize(self, request: DetokenizeRequest | dict[str, Any]) -> Detokenized:
        """As `POST /detokenize`."""
        with self._call("detokenize"):
            return await tokenization.detokenize(self._service, _parse(DetokenizeRequest, request))

    @contextmanager
    def _call(self, method: str) -> Iterator[None]:
        """A call through the handle is a request as one over HTTP is, under the id that Serve gave it, and of the
        session that `handle.options(session_id=...)` names."""
        call = ray.serve.context._get_serve_request_context()
        with _plain_errors():
            session_id = checked_session_id("session_id", call.session_id) if call.session_id else ""
            request = RequestContext(request_id=call.request_id, session_id=session_id)
            with answering(request), self._request_log.recording(f"CALL {method}"):
                yield


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Our exceptions as built-in ones, which a caller without this package can unpickle."""
    try:
        yield
    except InvalidRequestError as error:
        raise ValueError(str(error)) from None
    except GPTJServeError as error:
        raise RuntimeError(str(error)) from None


def _whole(body: type[Streamable], request: Streamable | dict[str, Any], streaming_method: str) -> Streamable:
    parsed = _parse(body, request)
    if parsed.stream:
        raise InvalidRequestError("stream", True, f"call {streaming_method} on handle.options(stream=True)")
    return parsed


def _streamed(body: type[Streamable], request: Streamable | dict[str, Any]) -> Streamable:
    fields = request if isinstance(request, dict) else request.model_dump(by_alias=True, exclude_unset=True)
    return _parse(body, fields | {"stream": True})


def _parse(body: type[Body], request: Body | dict[str, Any]) -> Body:
    try:
        return body.model_validate(request)
    except ValidationError as error:
        raise invalid_request(most_telling(error.errors())) from None
