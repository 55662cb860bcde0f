"""What the OpenAPI schema says of the routes' answers: whole ones, streams and errors.

Routes answer with ready JSON, so that nothing of this costs anything when a request comes.
"""

from collections.abc import Set
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from gptj_serve.api.errors import OPENAI_PREFIX
from gptj_serve.api.huggingface_responses import GenerateEvent, HuggingFaceError
from gptj_serve.api.openai_responses import ChatCompletionChunk, CompletionChunk, OpenAIError

_ERRORS = {
    400: "The body can't be read, or the request is refused; the message names field and value.",
    401: "The API key is missing or not known.",
    404: "There is no such model or head.",
    408: "The body did not come in time.",
    413: "The body is over the limit.",
    422: "The request is refused; the message names field and value.",
    429: "Too many requests or tokens; Retry-After says when to try again.",
    500: "The request failed; the service's log has the details.",
    503: "The service is full or not ready; Retry-After says when to try again.",
    504: "The request was not finished in its time.",
}
END_OF_STREAM = "[DONE]"
"""The data of the last event of OpenAI's streams."""

_OF_HUGGING_FACE = {422}  # OpenAI says 400
_OF_BODIES = {400, 404, 408, 413, 422}
_EVENTS = (CompletionChunk, ChatCompletionChunk, GenerateEvent)
_COMPONENTS = "#/components/schemas/"

Responses = dict[int | str, dict[str, Any]]


def openai_answers(model: Any, description: str, *, events: type | None = None, has_body: bool = True) -> Responses:
    """`events` are what a stream consists of, which the route may answer with instead."""
    without = _OF_HUGGING_FACE if has_body else _OF_HUGGING_FACE | _OF_BODIES
    return _answers(model, description, OpenAIError, without, events, END_OF_STREAM)


def hugging_face_answers(
    model: Any, description: str, *, events: type | None = None, has_body: bool = True
) -> Responses:
    """Without a `model`, only events."""
    return _answers(model, description, HuggingFaceError, set() if has_body else _OF_BODIES, events)


def describe(app: FastAPI) -> None:
    """Make the schema that `app` shows: with what the events of streams are, without what FastAPI adds of its own."""

    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make()  # which keeps it, and so it is changed only once
            _add_events(schema["components"]["schemas"])
            _drop_what_does_not_apply(schema)
        return make()

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to do it


def operation_id(route: APIRoute) -> str:
    """The name of the route's function: stable, and readable in generated clients."""
    return route.name


def _answers(
    model: Any, description: str, error: type, without: Set[int], events: type | None, ends: str | None = None
) -> Responses:
    success: dict[str, Any] = {"description": description} | ({} if model is None else {"model": model})
    if events is not None:
        success["content"] = {"text/event-stream": {"itemSchema": _event(events, error, ends)}}
    errors: Responses = {
        status: {"model": error, "description": text} for status, text in _ERRORS.items() if status not in without
    }
    return {200: success, **errors}


def _event(events: type, error: type, ends: str | None) -> dict[str, Any]:
    """A server-sent event, as OpenAPI 3.2 and FastAPI write it."""
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": _COMPONENTS + each.__name__} for each in (events, error)]},
        "description": f"A {events.__name__}; if the stream can't go on, at last an error.",
    }
    if ends is not None:
        data = {"anyOf": [data, {"const": ends, "description": "The end of a stream that came to its end."}]}
    event_id = {"type": "string", "description": "What to send as Last-Event-ID for the events after this one."}
    return {"type": "object", "properties": {"data": data, "id": event_id}, "required": ["data"]}


def _add_events(components: dict[str, Any]) -> None:
    for event in _EVENTS:
        schema = TypeAdapter(event).json_schema(ref_template=_COMPONENTS + "{model}", mode="serialization")
        components |= schema.pop("$defs", {})
        components[event.__name__] = schema


def _drop_what_does_not_apply(schema: dict[str, Any]) -> None:
    """FastAPI says of every route with a body that it answers 422; those under /v1/ answer 400."""
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            if path.startswith(OPENAI_PREFIX):
                operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError", "JsonValue"):  # the last is written as {} where it stands
        schema["components"]["schemas"].pop(name, None)
