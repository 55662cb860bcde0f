"""The `Ingress` deployment: HTTP and the Python handle, over the pipelines."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from ray.serve.handle import DeploymentHandle

from gptj_serve.api import huggingface
from gptj_serve.api.app import create_app
from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.errors import invalid_request, most_telling
from gptj_serve.api.huggingface_responses import GenerateEvent
from gptj_serve.api.huggingface_schemas import ClassifyRequest, GenerateRequest, QARequest
from gptj_serve.api.service import Service
from gptj_serve.config import ServiceConfig
from gptj_serve.errors import GPTJServeError, InvalidRequestError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import open_heads
from gptj_serve.serving.engine_client import ServeEngineClient
from gptj_serve.serving.logs import use_serve_logging
from gptj_serve.tokenizer import Tokenizer

Body = TypeVar("Body", bound=BaseModel)


class Ingress:
    """Serve calls its ASGI application for HTTP, and its methods for `serve.get_app_handle("gptj")`.

    The methods take the HTTP routes' bodies, as dicts or as models of `gptj_serve.api.huggingface_schemas`, and answer
    with what the routes answer, as plain dicts and lists, so that a caller needs nothing but Ray. For the same reason
    they raise built-in exceptions: `ValueError` for a bad request, naming field and value, `RuntimeError` for a failed
    one.
    """

    def __init__(self, config: ServiceConfig, pipelines: DeploymentHandle) -> None:
        use_serve_logging()
        checkpoint = Checkpoint.open(config.checkpoint_dir)
        tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
        engine = ServeEngineClient(pipelines)
        named_heads = {name: head.info for name, head in open_heads(config.head_dirs, checkpoint).items()}
        chat_template = ChatTemplate.open(config, checkpoint.config)
        self._service = Service(
            config, checkpoint.config, checkpoint.heads, tokenizer, engine, named_heads, chat_template
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, echoes_request_id=False)  # Serve's proxy does

    async def generate(self, request: GenerateRequest | dict[str, Any]) -> Any:
        """As `POST /generate`."""
        with _plain_errors():
            return await huggingface.generate_whole(self._service, _parse(GenerateRequest, request))

    async def generate_stream(self, request: GenerateRequest | dict[str, Any]) -> AsyncGenerator[GenerateEvent]:
        """As `POST /generate_stream`: an item per token. Call it on `handle.options(stream=True)`."""
        with _plain_errors():
            body = _parse(GenerateRequest, request)
            async with aclosing(huggingface.generate_stream(self._service, body)) as events:
                async for event in events:
                    yield event

    async def classify(self, request: ClassifyRequest | dict[str, Any]) -> Any:
        """As `POST /classify`."""
        with _plain_errors():
            return await huggingface.classify_whole(self._service, _parse(ClassifyRequest, request))

    async def qa(self, request: QARequest | dict[str, Any]) -> Any:
        """As `POST /qa`."""
        with _plain_errors():
            return await huggingface.answer_whole(self._service, _parse(QARequest, request))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Our exceptions as built-in ones, which a caller without this package can unpickle."""
    try:
        yield
    except InvalidRequestError as error:
        raise ValueError(str(error)) from None
    except GPTJServeError as error:
        raise RuntimeError(str(error)) from None


def _parse(body: type[Body], request: Body | dict[str, Any]) -> Body:
    try:
        return body.model_validate(request)
    except ValidationError as error:
        raise invalid_request(most_telling(error.errors())) from None
