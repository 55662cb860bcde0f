"""The environment variables that the package reads, all of them."""

import math
import os
import shlex
from pathlib import Path

from gptj_serve.errors import ConfigError

API_KEYS = "GPTJ_SERVE_API_KEYS"  # that a service accepts
API_KEY = "GPTJ_SERVE_API_KEY"  # that `gptj-serve status` presents; its option reads it
SLOW_CLIENT_TIMEOUT_S = "GPTJ_SERVE_SLOW_CLIENT_TIMEOUT_S"  # of Serve's HTTP proxies, see `serving.proxy`
DEFAULT_SLOW_CLIENT_TIMEOUT_S = 60.0
MAX_SLOW_CLIENT_TIMEOUT_S = 86400.0


def slow_client_timeout_s() -> float:
    """Raises `ConfigError` for what is no time."""
    text = os.environ.get(SLOW_CLIENT_TIMEOUT_S, str(DEFAULT_SLOW_CLIENT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SLOW_CLIENT_TIMEOUT_S:
        raise ConfigError(
            f"{SLOW_CLIENT_TIMEOUT_S}={text!r}: must be seconds, above 0 and at most {MAX_SLOW_CLIENT_TIMEOUT_S:g}"
        )
    return seconds


def compiler() -> list[str]:
    """The command that compiles our kernels: `CXX`, or g++. Raises `ConfigError` for what is no command."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text) or ["g++"]
    except ValueError as error:
        raise ConfigError(f"CXX={text!r}: is no command: {error}") from error


def user_cache() -> Path:
    """The user's directory for what can be made again (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def keep_openmp_from_spinning() -> None:
    """A thread that waits for others of its team shall sleep after some 10 µs, unless the user has said otherwise.

    By default it spins for milliseconds: on cores that other processes use too, it keeps those from the core that it
    is waiting for. To be called before anything loads OpenMP.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_nccl_from_ending_the_process() -> None:
    """A neighbour that is lost is our affair: its links tell at once, and the group is aborted. To be called before one
    is made.

    By default torch's watchdog ends a process whose group had an error, and its monitor one whose watchdog waits.
    """
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")


def api_keys() -> str | None:
    """`name=key` or plain keys, parted by commas; None if there is no such variable."""
    return os.environ.get(API_KEYS)
