"""How many requests this process answers at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptj_serve.errors import OverloadedError

MIN_RETRY_AFTER_S = 1.0


class OngoingRequests:
    def __init__(self, max_requests: int, retry_after_s: Callable[[], float] = lambda: MIN_RETRY_AFTER_S) -> None:
        """`retry_after_s` says when there may be room again."""
        self._retry_after_s = retry_after_s
        self.num_requests = 0
        self.max_requests = max_requests

    @contextmanager
    def request(self) -> Iterator[None]:
        """One more, as long as it takes. Raises `OverloadedError` if there are as many as there may be."""
        if self.num_requests >= self.max_requests:
            message = f"{self.num_requests} requests are being answered, and no more can be"
            raise OverloadedError(message, max(MIN_RETRY_AFTER_S, self._retry_after_s()))
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
