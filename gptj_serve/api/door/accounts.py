"""What each API key has used of its limits, in this process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptj_serve.api.door.api_keys import ApiKey
from gptj_serve.errors import RateLimitedError

CONCURRENCY_RETRY_AFTER_S = 1.0


class KeyAccount:
    """Requests at a time, and a bucket of tokens that is refilled steadily and holds what one minute brings.

    What a request will cost is not known before its end. So the bucket may be overdrawn, and while it is empty
    nothing more is let in.
    """

    def __init__(self, key: ApiKey, num_shares: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = key.name
        self.num_requests = 0
        self._num_shares = num_shares
        self._clock = clock
        self._counted_at = clock()
        self._balance = 0.0
        self.max_requests: int | None = None
        self.max_tokens_per_minute: int | None = None
        self.set_limits(key)

    def set_limits(self, key: ApiKey) -> None:
        """Those of the key, over the ingress processes that share them. A bucket that is new is full."""
        was_limited, left = self.max_tokens_per_minute is not None, self.num_tokens_left
        self.max_requests = self._share(key.max_concurrent_requests)
        self.max_tokens_per_minute = self._share(key.max_tokens_per_minute)
        self._balance = left if was_limited else float(self.max_tokens_per_minute or 0)

    @property
    def num_tokens_left(self) -> float:
        """Below 0 if more were spent than there were."""
        now = self._clock()
        limit = self.max_tokens_per_minute or 0
        self._balance = min(limit, self._balance + limit * (now - self._counted_at) / 60)
        self._counted_at = now
        return self._balance

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, as long as it takes. Raises `RateLimitedError` if there may be none now."""
        if self.max_requests is not None and self.num_requests >= self.max_requests:
            raise RateLimitedError(
                f"this API key may have {self.max_requests} requests at a time at this ingress",
                CONCURRENCY_RETRY_AFTER_S,
            )
        if self.max_tokens_per_minute is not None and (left := self.num_tokens_left) <= 0:
            empty_s = -left / self.max_tokens_per_minute * 60
            raise RateLimitedError(
                f"this API key has used its {self.max_tokens_per_minute} tokens per minute at this ingress",
                int(empty_s) + 1,
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def spend(self, num_tokens: int) -> None:
        if self.max_tokens_per_minute is not None:
            self._balance = self.num_tokens_left - num_tokens

    def headers(self) -> dict[str, str]:
        """OpenAI's names; its requests are per minute, ours at a time."""
        found = {}
        if self.max_requests is not None:
            found["x-ratelimit-limit-requests"] = str(self.max_requests)
            found["x-ratelimit-remaining-requests"] = str(max(0, self.max_requests - self.num_requests))
        if (limit := self.max_tokens_per_minute) is not None:
            left = self.num_tokens_left
            found["x-ratelimit-limit-tokens"] = str(limit)
            found["x-ratelimit-remaining-tokens"] = str(max(0, int(left)))
            found["x-ratelimit-reset-tokens"] = f"{(limit - left) / limit * 60:.3f}s"  # until the bucket is full
        return found

    def _share(self, limit: int | None) -> int | None:
        return None if limit is None else max(1, limit // self._num_shares)


class Accounts:
    """One account per name of a key. It outlives a change of the key or of its limits."""

    def __init__(self, num_shares: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_shares = num_shares
        self._clock = clock
        self._accounts: dict[str, tuple[ApiKey, KeyAccount]] = {}

    def of(self, key: ApiKey) -> KeyAccount:
        known, account = self._accounts.get(key.name, (None, None))
        if account is None:
            account = KeyAccount(key, self._num_shares, self._clock)
        elif known != key:
            account.set_limits(key)
        self._accounts[key.name] = (key, account)
        return account
