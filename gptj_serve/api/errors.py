"""From errors to HTTP: one table of statuses, one error object per surface, the handlers that apply them."""

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gptj_serve.errors import GPTJServeError, InvalidRequestError, OverloadedError, RequestFailedError

OPENAI_PREFIX = "/v1/"

ErrorBody = Callable[[GPTJServeError], dict[str, Any]]

_ERRORS: dict[type[GPTJServeError], tuple[int, str]] = {
    InvalidRequestError: (422, "validation"),
    OverloadedError: (503, "overloaded"),
    RequestFailedError: (500, "generation"),
    GPTJServeError: (500, "internal"),
}
"""HTTP status and TGI's `error_type`."""

_OPENAI_TYPES = {"validation": "invalid_request_error", "overloaded": "overloaded_error"}
_TYPE_NAMES = {"bool", "dict", "float", "int", "list", "str"}


def hugging_face_error(error: GPTJServeError) -> dict[str, Any]:
    """TGI's error object."""
    return {"error": str(error), "error_type": _lookup(error)[1]}


def openai_error(error: GPTJServeError) -> dict[str, Any]:
    """OpenAI's error object."""
    param = error.field if isinstance(error, InvalidRequestError) else None
    type_ = _OPENAI_TYPES.get(_lookup(error)[1], "server_error")
    return {"error": {"message": str(error), "type": type_, "param": param, "code": None}}


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` its status and a JSON body in the shape of the surface it happened on."""

    @app.exception_handler(GPTJServeError)
    async def handle(request: Request, error: GPTJServeError) -> JSONResponse:
        status = _lookup(error)[0]
        headers = {"Retry-After": str(max(1, round(error.retry_after_s)))} if isinstance(error, OverloadedError) else {}
        if request.url.path.startswith(OPENAI_PREFIX):
            if isinstance(error, InvalidRequestError):
                status = 404 if error.field == "model" else 400
            return JSONResponse(openai_error(error), status, headers)
        return JSONResponse(hugging_face_error(error), status, headers)

    @app.exception_handler(RequestValidationError)
    async def handle_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return await handle(request, _invalid_body(request, error))

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if request.url.path.startswith(OPENAI_PREFIX):
            body: dict[str, Any] = {
                "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            }
        else:
            body = {"error": message, "error_type": "validation"}
        return JSONResponse(body, error.status_code, error.headers)


def _lookup(error: GPTJServeError) -> tuple[int, str]:
    return next(_ERRORS[cls] for cls in type(error).__mro__ if cls in _ERRORS)


def invalid_request(details: Mapping[str, Any]) -> InvalidRequestError:
    """One of pydantic's error entries, with the field's dotted name as the caller wrote it."""
    location = [part for part in details["loc"] if _is_written_by_caller(part)]
    return InvalidRequestError(".".join(map(str, location)) or "body", details.get("input"), details["msg"])


def _invalid_body(request: Request, error: RequestValidationError) -> InvalidRequestError:
    """The first thing wrong with an HTTP body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return InvalidRequestError("body", first["input"], f"not valid JSON: {first['ctx']['error']}")
    location = first["loc"][1:]  # without FastAPI's leading "body"
    if not location and "json" not in request.headers.get("content-type", ""):
        return InvalidRequestError("Content-Type", request.headers.get("content-type"), "must be application/json")
    return invalid_request({**first, "loc": location})


def _is_written_by_caller(part: str | int) -> bool:
    """False for the names of a union's alternatives, which pydantic puts into the location too."""
    return isinstance(part, int) or (part.isidentifier() and part not in _TYPE_NAMES and not part[0].isupper())
