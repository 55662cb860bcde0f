"""`KeyRing`: the keys that are valid now, from the file and the environment; a change of the file needs no restart."""

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gptj_serve.api.door.api_keys import ApiKey, checked, keys_of_environment, read_keys
from gptj_serve.errors import ConfigError

logger = logging.getLogger(__name__)

REREAD_PERIOD_S = 1.0

FileState = tuple[int, ...] | None


class KeyRing:
    """Raises `ConfigError` if the keys can't be used at the start; later the last good ones stay."""

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._of_environment = checked(keys_of_environment(), "the environment")
        self._looked_at = clock()
        self._file_state = _state_of(path)  # before reading: what is written meanwhile is seen next time
        self._keys = self._read()

    def current(self) -> list[ApiKey]:
        """Looks at the file again if the last look is over a second ago. Empty: the service is open."""
        if self._path is not None and self._clock() - self._looked_at >= REREAD_PERIOD_S:
            self._looked_at = self._clock()
            state = _state_of(self._path)
            if state != self._file_state:
                self._file_state = state
                self._reread()
        return self._keys

    def _read(self) -> list[ApiKey]:
        if self._path is None:
            return self._of_environment
        return checked([*read_keys(self._path), *self._of_environment], str(self._path))

    def _reread(self) -> None:
        try:
            self._keys = self._read()
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)  # without a trace, which could show the file
        else:
            logger.info("%d API keys from %s", len(self._keys), self._path)


def matching(presented: bytes, keys: Iterable[ApiKey]) -> ApiKey | None:
    """In a time that tells nothing of the keys: their digests are compared in constant time, and always all of them."""
    digest = hashlib.sha256(presented).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found


def _state_of(path: Path | None) -> FileState:
    """Differs when the file, or what a symlink on the way to it leads to, was changed or replaced; None: no file."""
    if path is None:
        return None
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
