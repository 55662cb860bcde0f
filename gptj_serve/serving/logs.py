"""Our log lines in Serve's log, and what Serve's own are made of."""

import json
import logging
from typing import Any

from gptj_serve.errors import GPTJServeError, InvalidRequestError

OURS = "gptj_serve"
SERVE = "ray.serve"

QUIET_ROUTES = ("/health", "/ready", "/status")
"""Asked all the time; that they were answered is no news."""

_STANDARD_FIELDS = {*logging.makeLogRecord({}).__dict__, "message", "asctime"}


def use_serve_logging(*filters: logging.Filter) -> None:
    """Send what this package logs through the handlers and at the level that Serve gives a replica.

    The `filters` are for Serve's own lines.
    """
    logging.getLogger(OURS).parent = logging.getLogger(SERVE)
    for line_filter in filters:
        logging.getLogger(SERVE).addFilter(line_filter)


def serve_logs_json() -> bool:
    """Whether Serve was told to write JSON (`logging_config: {encoding: JSON}`), for this replica."""
    handlers = [getattr(handler, "target", handler) for handler in logging.getLogger(SERVE).handlers]
    return any(type(handler.formatter).__name__ == "JSONFormatter" for handler in handlers)


def log_to_stderr(*, as_json: bool) -> None:
    """For an actor that is no replica: Ray keeps its stderr in the session's logs and shows it to the driver."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(levelname)s %(asctime)s stage %(process)d -- %(message)s")
    handler.setFormatter(JSONFormatter() if as_json else text)
    ours = logging.getLogger(OURS)
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False


class JSONFormatter(logging.Formatter):
    """An object per line, with the names that Serve uses, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "filename": record.filename,
            "lineno": record.lineno,
            "process": record.process,
        }
        if record.exc_info:
            fields["exc_text"] = self.formatException(record.exc_info)
        fields |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD_FIELDS}
        return json.dumps(fields, default=repr)


class NoAccessLines(logging.Filter):
    """Of a pipeline: its calls are the ingress's own, and each request of a client is logged there."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(record, "serve_access_log", False)


class IngressLines(logging.Filter):
    """Leaves out the access lines of what went well, if `request_log` has a line of its own for it or it is asked all
    the time; and the traceback of a call through the Ray handle that ended with an error which we foresaw.

    What such a call raises must be a built-in exception (its caller need not have this package), and Serve logs the
    traceback of whatever is raised. A client's mistake is no reason for that.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "serve_access_log", False):
            return not _is_told_elsewhere(record.getMessage())
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and isinstance(error.__context__, GPTJServeError):
            refused = isinstance(error.__context__, InvalidRequestError)
            record.levelno = logging.INFO if refused else logging.WARNING
            record.levelname = logging.getLevelName(record.levelno)
            record.msg, record.args = "Call %s: %s", ("refused" if refused else "failed", error)
            record.exc_info = record.exc_text = None
        return True


def _is_told_elsewhere(access_line: str) -> bool:
    """Serve's line is `[client] method route status latency`; the route begins with the application's prefix."""
    words = access_line.split()
    if len(words) < 4:
        return False
    method, route, status = words[-4:-1]
    return method in ("POST", "CALL") or (status == "200" and route.endswith(QUIET_ROUTES))
