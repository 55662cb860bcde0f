"""The exceptions that cross a boundary of gptj_serve.

GPTJServeError
├── ConfigError             a configuration value, or a model's config.json, can't be used
├── DeviceMemoryError       a device has too little memory for a stage; says what to lower
├── CheckpointError         a checkpoint directory is incomplete, damaged or not of this architecture
│   └── ConversionError     a sound checkpoint can't be written elsewhere as asked
├── DataError               a file of examples can't be used; the message names file, line and field
├── InvalidRequestError     the request itself is at fault; carries the field and its value
│   ├── InvalidHeaderError  a header of it is, not its body
│   └── InvalidOptionError  an option of `generate` is; a ValueError besides, as in transformers
├── UnauthorizedError       the caller's API key is missing or wrong
├── OverloadedError         the service can't take the request now; worth another try later
│   └── RateLimitedError    since the caller's own limits are used up
├── RequestTimeoutError     the request's own time is over
├── RequestFailedError      the request was accepted and then could not be finished
│   └── UnsatisfiableError  since its own constraints leave nothing to go on with
├── PipelineError           a stage was lost or a link broke; every step in flight is void
└── WireError               what came over a link is no message of the kind that was due

Whoever raises one states the offending value and what to do about it: the message reaches the user as it is.
"""

from typing import Any


class GPTJServeError(Exception):
    """The base of all errors of this package."""


class ConfigError(GPTJServeError):
    """A configuration value can't be used."""


class DeviceMemoryError(GPTJServeError):
    """A stage does not fit into its device's memory. The message has what it needs and what is free."""


class CheckpointError(GPTJServeError):
    """A checkpoint can't be loaded; the message names the file and, where there is one, the tensor."""


class ConversionError(CheckpointError):
    """A checkpoint can't be converted: its destination, the disk or the chosen dtype is at fault."""


class DataError(GPTJServeError):
    """A file of examples can't be used; the message names file, line and field."""


class InvalidRequestError(GPTJServeError):
    """The request is at fault. `field` is its dotted name, `value` the value that was refused."""

    def __init__(self, field: str, value: Any, reason: str) -> None:
        super().__init__(field, value, reason)  # all three, so that the error survives pickling by Ray
        self.field = field
        self.value = value
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}={_shortened(self.value)}: {self.reason}"


class InvalidHeaderError(InvalidRequestError):
    """A header of the request is at fault; `field` is its name."""


class InvalidOptionError(InvalidRequestError, ValueError):
    """An option of a call in this process can't be followed."""


class UnauthorizedError(GPTJServeError):
    """The request came without an API key or with a wrong one. Never says which key it was."""


class OverloadedError(GPTJServeError):
    """The service is full; `retry_after_s` says when another try may pass."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class RateLimitedError(OverloadedError):
    """The caller has used up what its API key allows; `retry_after_s` says when it allows more."""


class RequestTimeoutError(GPTJServeError):
    """The request was not finished in the time that it was given."""


class RequestFailedError(GPTJServeError):
    """An accepted request could not be finished."""


class UnsatisfiableError(RequestFailedError):
    """The request's own constraints, together or with what the model says, leave nothing to go on with."""


class PipelineError(GPTJServeError):
    """A stage or a link was lost: no step in flight will return."""


class WireError(GPTJServeError):
    """What came over a link is no message of the kind that was due."""


def _shortened(value: Any, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
