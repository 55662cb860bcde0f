"""`CachedPrefixes`: which pipelines probably hold which KV blocks, as one ingress can tell from what it sent where.

It guesses and asks nobody. Pipelines could tell what they hold, exactly, but to be of use they would have to tell every
ingress at all times, also those that have no request there and so no stream of events open; and still what an ingress
has sent a moment ago, which matters most when many requests with one beginning come at once, would be news to it.
A wrong guess costs time only: a pipeline computes what it does not find.

What it knows of a pipeline is kept as that keeps its blocks: at most as many as its pool has, and what was used longest
ago is forgotten first, the end of a prefix before its beginning. So where one ingress sends everything, the two go
together; of several ingresses each knows what itself has sent, and forgets later than the pool, which others fill too.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from gptj_serve.engine.kv_blocks import BlockKey

_NOTHING: OrderedDict[BlockKey, None] = OrderedDict()


class CachedPrefixes:
    """A key takes about 200 bytes for each pipeline that has it; to find or add a prefix costs a look-up per block."""

    def __init__(self, max_blocks: int) -> None:
        """`max_blocks` of one pipeline, as many as its KV pool has if it has not told another size."""
        self._max_blocks = max_blocks
        self._told: dict[str, int] = {}  # by pipeline
        self._keys: dict[str, OrderedDict[BlockKey, None]] = {}  # by pipeline, used longest ago first

    def add(self, pipeline: str, keys: Sequence[BlockKey]) -> None:
        """The pipeline holds the blocks with these keys, a prefix from its beginning, and has just used them."""
        known = self._keys.setdefault(pipeline, OrderedDict())
        for key in reversed(keys):
            known[key] = None
            known.move_to_end(key)
        max_blocks = self._told.get(pipeline, self._max_blocks)
        while len(known) > max_blocks:
            known.popitem(last=False)

    def set_pool(self, pipeline: str, max_blocks: int) -> None:
        """So many blocks that pipeline's pool has."""
        self._told[pipeline] = max_blocks

    def num_cached(self, pipeline: str, keys: Iterable[BlockKey]) -> int:
        """How many of the first blocks with these keys it probably holds."""
        known = self._keys.get(pipeline, _NOTHING)
        num_cached = 0
        for key in keys:
            if key not in known:
                break
            num_cached += 1
        return num_cached

    def forget(self, pipeline: str) -> None:
        """It has lost its KV blocks, with a stage."""
        self._keys.pop(pipeline, None)

    def keep_only(self, pipelines: Iterable[str]) -> None:
        """Forget all others: they are gone."""
        for pipeline in self._keys.keys() - pipelines:
            del self._keys[pipeline]
        for pipeline in self._told.keys() - pipelines:
            del self._told[pipeline]
