"""Our lines as JSON, and which of Serve's lines are left out."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gptj_serve.errors import GPTJServeError, InvalidRequestError, OverloadedError
from gptj_serve.serving.logs import (
    IngressLines,
    JSONFormatter,
    NoAccessLines,
    log_to_stderr,
    serve_logs_json,
    use_serve_logging,
)


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("gptj_serve", "ray.serve")]
    before = [(lg.parent, lg.handlers[:], lg.filters[:], lg.level, lg.propagate) for lg in loggers]
    yield
    for logger, (parent, handlers, filters, level, propagate) in zip(loggers, before, strict=True):
        logger.parent, logger.handlers, logger.filters, logger.propagate = parent, handlers, filters, propagate
        logger.setLevel(level)


def make_record(message: str, **extra: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "ray.serve", "levelno": logging.INFO, "levelname": "INFO", "msg": message})


def access_line(message: str) -> logging.LogRecord:
    record = make_record(message)
    record.serve_access_log = True
    return record


def failed_call(cause: GPTJServeError | None, error: Exception) -> logging.LogRecord:
    """Serve's line about a call that raised `error`, made of `cause`."""
    try:
        try:
            if cause is not None:
                raise cause
        except GPTJServeError:
            raise error from None
        raise error
    except Exception:
        record = make_record("Request failed.")
        record.levelno, record.levelname, record.exc_info = logging.ERROR, "ERROR", sys.exc_info()
        return record


@pytest.mark.parametrize(
    ("message", "is_kept"),
    [
        ("POST /generate 200 12.0ms", False),
        ("POST /generate 422 12.0ms", False),
        ("POST /generate 500 12.0ms", False),
        ("10.0.0.1:4711 POST /qa 200 12.0ms", False),
        ("CALL generate OK 12.0ms", False),
        ("CALL generate ERROR 12.0ms", False),
        ("GET /status 200 1.0ms", False),
        ("GET /status 503 1.0ms", True),
        ("GET /ready 200 1.0ms", False),
        ("GET /ready 503 1.0ms", True),
        ("GET /below/a/prefix/ready 200 1.0ms", False),
        ("GET /below/a/prefix/ready 503 1.0ms", True),
        ("GET /v1/models 200 1.0ms", True),
        ("odd", True),
    ],
)
def test_access_lines_of_an_ingress(message: str, is_kept: bool) -> None:
    assert IngressLines().filter(access_line(message)) is is_kept
    assert IngressLines().filter(make_record(message)), "only access lines are left out"


def test_a_pipeline_has_no_access_lines() -> None:
    assert not NoAccessLines().filter(access_line("CALL run OK 1.0ms"))
    assert NoAccessLines().filter(make_record("anything else"))


@pytest.mark.parametrize(
    ("cause", "error", "level", "message"),
    [
        (InvalidRequestError("a", 1, "no"), ValueError("a=1: no"), "INFO", "Call refused: a=1: no"),
        (OverloadedError("full", 1), RuntimeError("full"), "WARNING", "Call failed: full"),
    ],
)
def test_what_we_foresaw_is_one_line(cause: GPTJServeError, error: Exception, level: str, message: str) -> None:
    record = failed_call(cause, error)
    assert IngressLines().filter(record)
    assert (record.levelname, record.getMessage(), record.exc_info) == (level, message, None)


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    record = failed_call(None, ValueError("what?"))
    assert IngressLines().filter(record)
    assert (record.levelname, record.getMessage()) == ("ERROR", "Request failed.")
    assert record.exc_info is not None


def test_json_lines_have_the_fields_of_extra() -> None:
    stream = io.StringIO()
    logger = logging.Logger("gptj_serve.x")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    logger.addHandler(handler)
    logger.warning("request %s was lost", "r", extra={"request_id": "r", "odd": {1}})
    try:
        raise KeyError("x")
    except KeyError:
        logger.exception("broken\nin two lines")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["levelname"], first["message"], first["request_id"]) == ("WARNING", "request r was lost", "r")
    assert (first["filename"], first["odd"]) == ("test_logs.py", "{1}")
    assert "KeyError: 'x'" in second["exc_text"]


@pytest.mark.parametrize("as_json", [True, False])
def test_an_actor_writes_to_stderr(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(as_json=as_json)
    logging.getLogger("gptj_serve.pipeline").info("ready", extra={"request_id": "r"})
    (line,) = capsys.readouterr().err.splitlines()
    if as_json:
        assert json.loads(line)["request_id"] == "r"
    else:
        assert line.startswith("INFO ")
        assert line.endswith("-- ready")


def test_a_replica_logs_as_serve_does() -> None:
    class JSONFormatter(logging.Formatter):
        """Serve's is known by its name."""

    serve = logging.getLogger("ray.serve")
    stream = io.StringIO()
    serve.handlers = [logging.StreamHandler(stream)]
    serve.setLevel(logging.INFO)
    use_serve_logging(NoAccessLines())
    assert not serve_logs_json()
    logging.getLogger("gptj_serve.serving").info("ours")
    logging.getLogger("gptj_serve.serving").debug("too much")
    serve.info("left out", extra={"serve_access_log": True})
    assert stream.getvalue() == "ours\n"
    serve.handlers[0].setFormatter(JSONFormatter())
    assert serve_logs_json()
