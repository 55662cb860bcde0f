"""`PipelineChoice`: which pipeline a request should go to, judged by what one ingress knows.

Among the pipelines that could take it (ready, and with the shortest queues: that is for others to say):

1. None is chosen that has its share already. Its share is `MAX_SHARE` times the mean of all of them, rounded up, with
   this request counted in: consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018). So no common
   beginning and no busy session floods one pipeline while others idle. It is `MIN_SHARE` at least, and no more as
   long as any of them has nothing to do: else three of four could take all, and one that has just come got nothing.
2. A request of a session goes to the first of the rest in the session's own order, which is a hash of session and
   pipeline (rendezvous hashing, Thaler and Ravishankar 1998). All ingresses find the same order without talking, and
   where a pipeline leaves, only its own sessions move.
3. Any other goes where the fewest tokens are to be computed before its first one comes: those of its own that are not
   cached there, and those of requests that were sent there and have no token yet. So a long prefix is worth waiting
   for, a short one is not. Of equals the one with fewer requests is taken.
4. If that one holds nothing of it, nobody is preferred: the router takes the less loaded of two at random.

Several ingresses count each other's requests too, as far as pipelines have told of them.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gptj_serve.engine.kv_blocks import BlockKey, BlockKeys
from gptj_serve.routing.prefixes import CachedPrefixes
from gptj_serve.types import EngineRequest, Pooling, Task

MAX_SHARE = 1.5
"""Of the mean number of requests, what one pipeline may have before others are taken instead. With 1.25 more requests
leave their prefixes, and first tokens come later; with 2 nothing is gained but a busier pipeline (docs/routing.md)."""

MIN_SHARE = 4
"""Requests that a pipeline may have in any case. Where little is to be done the mean of all is about none, and a single
small request would keep sessions and conversations from what is cached for them."""


class RoutedBy(StrEnum):
    """Why a request goes where it goes."""

    SESSION = "session"
    PREFIX = "prefix"
    LOAD = "load"


class Route(NamedTuple):
    routed_by: RoutedBy
    pipeline: str | None = None  # that is preferred


@dataclass(slots=True)
class _Visit:
    """A request on its way to a pipeline, or there."""

    token_ids: list[int]  # all that are given
    block_keys: BlockKeys
    keys: list[BlockKey]  # of the blocks that it could take over; empty if none
    pipeline: str | None = None  # as far as it is known
    num_tokens_due: int = 0
    has_begun: bool = False  # its prompt is computed there


class PipelineChoice:
    """Of one ingress; used in one event loop."""

    def __init__(self, block_size: int, max_blocks: int, *, is_prefix_aware: bool = True) -> None:
        """`max_blocks` is the size of a pipeline's KV pool, of blocks of `block_size` tokens; it may tell another."""
        self._block_size = block_size
        self._is_prefix_aware = is_prefix_aware
        self._prefixes = CachedPrefixes(max_blocks)
        self._visits: dict[str, _Visit] = {}  # by request id
        self._num_requests: Counter[str] = Counter()  # by pipeline, on their way and there
        self._num_tokens_due: Counter[str] = Counter()  # of these, until their first events come

    def route(
        self, request: EngineRequest, pipelines: Collection[str], num_others: Mapping[str, int] | None = None
    ) -> Route:
        """Where `request` should go, one of `pipelines`; `num_others` says how many requests others have at each.

        From now on it counts there, or where it is taken instead, until `ended`.
        """
        token_ids = [*request.prompt_token_ids, *request.output_token_ids, *request.continuation_token_ids]
        block_keys = BlockKeys(self._block_size, request.cache_salt)
        num_blocks = num_reusable_tokens(request) // self._block_size if self._is_prefix_aware else 0
        visit = _Visit(token_ids, block_keys, block_keys.of(token_ids, num_blocks))
        self._visits[request.request_id] = visit
        route = Route(RoutedBy.LOAD)
        if len(pipelines) > 1:
            route = self._choose(request.session_id, visit, pipelines, num_others or {})
        if route.pipeline is not None:
            self._enter(visit, route.pipeline)
        return route

    def on_taken(self, request_id: str, pipeline: str) -> None:
        """It is there now, at the preferred one or not. Of one that has ended nothing is heard."""
        visit = self._visits.get(request_id)
        if visit is not None and visit.pipeline != pipeline:
            self._leave(visit)
            self._enter(visit, pipeline)

    def on_event(self, request_id: str, pipeline: str) -> None:
        """Its pipeline has sent something of it: so its prompt is computed."""
        self.on_taken(request_id, pipeline)  # the call that says so may be slower
        visit = self._visits.get(request_id)
        if visit is None or visit.has_begun:
            return
        self._num_tokens_due[pipeline] -= visit.num_tokens_due
        visit.num_tokens_due, visit.has_begun = 0, True
        self._prefixes.add(pipeline, visit.keys)  # since it came there they may have been lost

    def ended(self, request_id: str, output_token_ids: Sequence[int] = ()) -> None:
        """It is there no longer. What was generated there is cached there too, but for the last token.

        Unless the blocks were lost, and nothing has come of it since.
        """
        visit = self._visits.pop(request_id)
        self._leave(visit)
        if self._is_prefix_aware and visit.pipeline is not None and visit.has_begun and output_token_ids:
            token_ids = [*visit.token_ids, *output_token_ids]
            keys = visit.block_keys.of(token_ids, (len(token_ids) - 1) // self._block_size)
            self._prefixes.add(visit.pipeline, keys)

    def set_pool(self, pipeline: str, max_blocks: int) -> None:
        """It has told how many blocks its KV pool has."""
        self._prefixes.set_pool(pipeline, max_blocks)

    def forget(self, pipeline: str) -> None:
        """It has lost its KV blocks. What stays there is computed again, from its first token."""
        self._prefixes.forget(pipeline)
        for visit in self._visits.values():
            if visit.pipeline == pipeline:
                self._num_tokens_due[pipeline] += len(visit.token_ids) - visit.num_tokens_due
                visit.num_tokens_due, visit.has_begun = len(visit.token_ids), False

    def keep_only(self, pipelines: Collection[str]) -> None:
        """Others are gone: forget what they held."""
        self._prefixes.keep_only(pipelines)

    def num_requests(self, pipeline: str) -> int:
        """Of this ingress, on their way there and there."""
        return self._num_requests[pipeline]

    def num_tokens_due(self, pipeline: str) -> int:
        """To be computed there before all these requests have begun to be answered."""
        return self._num_tokens_due[pipeline]

    def _choose(
        self, session_id: str, visit: _Visit, pipelines: Collection[str], num_others: Mapping[str, int]
    ) -> Route:
        loads = {pipeline: self._num_requests[pipeline] + num_others.get(pipeline, 0) for pipeline in pipelines}
        limit = MIN_SHARE
        if min(loads.values()) > 0:
            limit = max(limit, math.ceil(MAX_SHARE * (sum(loads.values()) + 1) / len(loads)))
        free = [pipeline for pipeline in pipelines if loads[pipeline] < limit]  # that with the fewest is among them
        if session_id:
            return Route(RoutedBy.SESSION, max(free, key=lambda pipeline: rendezvous_weight(session_id, pipeline)))
        num_cached = {pipeline: self._num_cached(visit, pipeline) for pipeline in free}
        tokens_first = {pipeline: self._num_tokens_due[pipeline] - num_cached[pipeline] for pipeline in free}
        in_any_order = random.sample(free, len(free))
        best = min(in_any_order, key=lambda pipeline: (tokens_first[pipeline], loads[pipeline]))
        return Route(RoutedBy.PREFIX, best) if num_cached[best] > 0 else Route(RoutedBy.LOAD)

    def _num_cached(self, visit: _Visit, pipeline: str) -> int:
        """Tokens, in whole blocks."""
        return self._prefixes.num_cached(pipeline, visit.keys) * self._block_size

    def _enter(self, visit: _Visit, pipeline: str) -> None:
        visit.pipeline, visit.has_begun = pipeline, False
        visit.num_tokens_due = len(visit.token_ids) - self._num_cached(visit, pipeline)
        self._num_requests[pipeline] += 1
        self._num_tokens_due[pipeline] += visit.num_tokens_due
        self._prefixes.add(pipeline, visit.keys)

    def _leave(self, visit: _Visit) -> None:
        if visit.pipeline is None:
            return
        self._num_requests[visit.pipeline] -= 1
        self._num_tokens_due[visit.pipeline] -= visit.num_tokens_due
        if self._num_requests[visit.pipeline] == 0:
            del self._num_requests[visit.pipeline], self._num_tokens_due[visit.pipeline]


def rendezvous_weight(session_id: str, pipeline: str) -> bytes:
    """A session's pipeline is the one with the greatest weight: the same in every process."""
    return hashlib.blake2b(f"{len(session_id)} {session_id} {pipeline}".encode(), digest_size=8).digest()


def num_reusable_tokens(request: EngineRequest) -> int:
    """How many of a request's first tokens a pipeline may take over from others: as its engine's jobs say."""
    num_given = len(request.prompt_token_ids) + len(request.output_token_ids)
    match request.task:
        case Task.GENERATE:
            is_scored = request.sampling is not None and request.sampling.prompt_logprobs
            return 0 if is_scored else num_given - 1
        case Task.SCORE:
            return num_given - 1
        case Task.CLASSIFY | Task.EMBED:
            return num_given - 1 if request.pooling is Pooling.LAST else 0
        case _:
            return 0
