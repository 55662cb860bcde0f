"""Serving by an engine that takes whole batches: what waits when a batch ends is the next one, at most so many.

With one at a time this is an asynchronous queue with one worker, in the order of arrival.
"""

import time
from collections.abc import Callable, Sequence

from benchmarks.speed.streams import Request, Stream

OnToken = Callable[[int, int], None]
"""Row of the batch and token."""

RunBatch = Callable[[Sequence[Request], OnToken], None]
"""Generate each request's tokens, telling of each when it is there."""


def serve_in_batches(run: RunBatch, requests: Sequence[Request], max_batch: int, limit_s: float) -> list[Stream]:
    """`requests` in the order of arrival. A batch that has begun is finished also after `limit_s`."""
    streams = [Stream(request.arrival_s) for request in requests]
    began_at = time.perf_counter()
    first = 0
    while first < len(requests):
        now = time.perf_counter() - began_at
        if max(now, requests[first].arrival_s) >= limit_s:
            break
        if requests[first].arrival_s > now:
            time.sleep(requests[first].arrival_s - now)
            continue
        last = first
        while last < len(requests) and last - first < max_batch and requests[last].arrival_s <= now:
            last += 1
        batch = streams[first:last]

        def on_token(row: int, token_id: int, batch: Sequence[Stream] = batch) -> None:
            batch[row].add(time.perf_counter() - began_at, token_id)

        run(requests[first:last], on_token)
        first = last
    return streams
