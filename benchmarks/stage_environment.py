"""The environment variables that stages of the service start with."""

import contextlib
import os
from collections.abc import Iterator

from gptj_serve.environment import keep_openmp_from_spinning


@contextlib.contextmanager
def stage_environment() -> Iterator[None]:
    """For processes that are started meanwhile."""
    before = dict(os.environ)
    keep_openmp_from_spinning()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
