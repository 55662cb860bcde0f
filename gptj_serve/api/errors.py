"""From errors to HTTP: one table of statuses, one error object per surface, the handlers that apply them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gptj_serve.api.huggingface_responses import HuggingFaceError
from gptj_serve.api.openai_responses import OpenAIError
from gptj_serve.api.route_path import route_path
from gptj_serve.errors import (
    GPTJServeError,
    InvalidHeaderError,
    InvalidRequestError,
    OverloadedError,
    RateLimitedError,
    RequestFailedError,
    RequestTimeoutError,
    UnauthorizedError,
    UnsatisfiableError,
)

OPENAI_PREFIX = "/v1/"

ErrorBody = Callable[[GPTJServeError], HuggingFaceError | OpenAIError]

_ERRORS: dict[type[Exception], tuple[int, str]] = {
    InvalidRequestError: (422, "validation"),
    InvalidHeaderError: (400, "validation"),
    UnauthorizedError: (401, "authentication"),
    RateLimitedError: (429, "rate_limit"),
    OverloadedError: (503, "overloaded"),
    UnsatisfiableError: (422, "validation"),
    RequestTimeoutError: (504, "timeout"),
    RequestFailedError: (500, "generation"),
    Exception: (500, "internal"),
}
"""HTTP status and TGI's `error_type`."""

_OPENAI_TYPES = {
    "validation": "invalid_request_error",
    "authentication": "invalid_request_error",
    "rate_limit": "rate_limit_error",
    "overloaded": "overloaded_error",
    "timeout": "timeout_error",
}
_OPENAI_CODES = {"authentication": "invalid_api_key", "rate_limit": "rate_limit_exceeded"}
INTERNAL_ERROR = GPTJServeError("internal error; the service's log has the details")
"""What a client sees of an exception that nobody foresaw."""

_TYPE_NAMES = {"bool", "dict", "float", "int", "list", "str"}


def http_status(error: Exception) -> int:
    """What the error is answered with; under /v1/ 422 becomes 400, or 404."""
    return _lookup(error)[0]


def hugging_face_error(error: GPTJServeError) -> HuggingFaceError:
    """TGI's error object."""
    return {"error": _text(str(error)), "error_type": _lookup(error)[1]}


def openai_error(error: GPTJServeError) -> OpenAIError:
    """OpenAI's error object."""
    param = _text(error.field) if isinstance(error, InvalidRequestError) else None
    kind = _lookup(error)[1]
    type_, code = _OPENAI_TYPES.get(kind, "server_error"), _OPENAI_CODES.get(kind)
    return {"error": {"message": _text(str(error)), "type": type_, "param": param, "code": code}}


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` its status and a JSON body in the shape of the surface it happened on."""

    @app.exception_handler(GPTJServeError)
    async def handle(request: Request, error: GPTJServeError) -> JSONResponse:
        return error_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def handle_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(request, _invalid_body(request, error))

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> JSONResponse:
        return http_error_response(request, error)

    @app.exception_handler(Exception)
    async def handle_unexpected(request: Request, error: Exception) -> JSONResponse:
        return error_response(request, INTERNAL_ERROR)  # starlette raises it on, and the server logs it


def error_response(request: Request, error: GPTJServeError) -> JSONResponse:
    """The error's status and body on the surface that the request came to."""
    status = http_status(error)
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if route_path(request.scope).startswith(OPENAI_PREFIX):
        if status == 422:
            status = 400
            if isinstance(error, InvalidRequestError) and error.field == "model" and isinstance(error.value, str):
                status = 404
        return JSONResponse(openai_error(error), status, headers)
    return JSONResponse(hugging_face_error(error), status, headers)


def http_error_response(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    if route_path(request.scope).startswith(OPENAI_PREFIX):
        body: HuggingFaceError | OpenAIError = {
            "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        }
    else:
        body = {"error": message, "error_type": "validation"}
    return JSONResponse(body, error.status_code, error.headers)


def _text(message: str) -> str:
    """As it can be sent: what the client wrote, a field's name say, may have half a surrogate pair."""
    return message.encode("utf-8", "backslashreplace").decode()


def error_message(body: bytes) -> str | None:
    """What an error's body, in either shape, tells the client."""
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def _lookup(error: Exception) -> tuple[int, str]:
    return next(_ERRORS[cls] for cls in type(error).__mro__ if cls in _ERRORS)


def invalid_request(details: Mapping[str, Any]) -> InvalidRequestError:
    """One of pydantic's error entries, with the field's dotted name as the caller wrote it."""
    *location, last = details["loc"] or ("body",)
    location = [part for part in location if _is_written_by_caller(part)]
    if details["type"] == "extra_forbidden" or _is_written_by_caller(last):
        location.append(last)
    value = None if details["type"] == "missing" else details.get("input")  # else it is what the field is missing in
    reason = details["msg"].removeprefix("Value error, ")
    return InvalidRequestError(".".join(map(str, location)) or "body", value, reason)


def most_telling(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first of pydantic's errors; if its field is a union, the one about the alternative that fits best."""
    same_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    return min(same_field, key=lambda error: (error["type"].endswith("_type"), -len(error["loc"])))


def _invalid_body(request: Request, error: RequestValidationError) -> InvalidRequestError:
    """The first thing wrong with an HTTP body."""
    first = most_telling([{**details, "loc": details["loc"][1:]} for details in error.errors()])  # without "body"
    if first["type"] == "json_invalid":
        return InvalidRequestError("body", error.body, f"not valid JSON: {first['ctx']['error']}")
    if not first["loc"] and "json" not in request.headers.get("content-type", ""):
        return InvalidRequestError("Content-Type", request.headers.get("content-type"), "must be application/json")
    return invalid_request(first)


def _is_written_by_caller(part: str | int) -> bool:
    """False for the names of a union's alternatives, which pydantic puts into the location too."""
    return isinstance(part, int) or (part.isidentifier() and part not in _TYPE_NAMES and not part[0].isupper())
