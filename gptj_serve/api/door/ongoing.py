"""How many requests this process answers at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from gptj_serve.errors import OverloadedError

RETRY_AFTER_S = 1.0


class OngoingRequests:
    def __init__(self, max_requests: int) -> None:
        self.num_requests = 0
        self.max_requests = max_requests

    @contextmanager
    def request(self) -> Iterator[None]:
        """One more, as long as it takes. Raises `OverloadedError` if there are as many as there may be."""
        if self.num_requests >= self.max_requests:
            raise OverloadedError(f"{self.num_requests} requests are being answered, and no more can be", RETRY_AFTER_S)
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
