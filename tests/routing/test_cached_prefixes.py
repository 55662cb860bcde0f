"""`CachedPrefixes`: what one ingress knows of the pipelines' KV blocks."""

import tracemalloc

from gptj_serve.engine.kv_blocks import BlockKeys
from gptj_serve.routing.prefixes import CachedPrefixes

BLOCK_SIZE = 16


def keys_of(text: str, salt: str = "") -> list[bytes]:
    """One block for each character."""
    token_ids = [ord(character) for character in text for _ in range(BLOCK_SIZE)]
    return BlockKeys(BLOCK_SIZE, salt).of(token_ids, len(text))


def test_the_longest_prefix_is_found_of_each_pipeline() -> None:
    prefixes = CachedPrefixes(100)
    prefixes.add("x", keys_of("abcdef"))
    prefixes.add("x", keys_of("abXY"))
    prefixes.add("y", keys_of("ab"))
    found = {text: [prefixes.num_cached(name, keys_of(text)) for name in "xyz"] for text in ("abcd", "abXYZ", "b", "")}
    assert found == {"abcd": [4, 2, 0], "abXYZ": [4, 2, 0], "b": [0, 0, 0], "": [0, 0, 0]}
    assert prefixes.num_cached("x", keys_of("abcd", salt="of another tenant")) == 0


def test_it_forgets_as_a_pool_does() -> None:
    """What was used longest ago goes first, the end of a prefix before its beginning."""
    prefixes = CachedPrefixes(6)
    prefixes.add("x", keys_of("abcd"))
    prefixes.add("x", keys_of("ABC"))
    assert [prefixes.num_cached("x", keys_of(text)) for text in ("abcd", "ABC")] == [3, 3]
    prefixes.add("x", keys_of("ab"))
    prefixes.add("x", keys_of("12"))
    assert [prefixes.num_cached("x", keys_of(text)) for text in ("abcd", "ABC", "12")] == [2, 2, 2]
    prefixes.add("y", keys_of("ABC"))
    assert prefixes.num_cached("x", keys_of("ABC")) == 2  # each has a pool of its own
    prefixes.add("x", keys_of("1234567"))
    assert prefixes.num_cached("x", keys_of("1234567")) == 6


def test_a_pool_has_the_size_that_it_told() -> None:
    prefixes = CachedPrefixes(2)
    prefixes.set_pool("x", 4)
    for pipeline in "xy":
        prefixes.add(pipeline, keys_of("abcde"))
    assert [prefixes.num_cached(pipeline, keys_of("abcde")) for pipeline in "xy"] == [4, 2]
    prefixes.forget("x")  # its blocks, not its size
    prefixes.add("x", keys_of("abcde"))
    assert prefixes.num_cached("x", keys_of("abcde")) == 4
    prefixes.keep_only({"y"})
    prefixes.add("x", keys_of("abcde"))
    assert prefixes.num_cached("x", keys_of("abcde")) == 2


def test_those_that_are_gone_are_forgotten() -> None:
    prefixes = CachedPrefixes(10)
    for pipeline in "xyz":
        prefixes.add(pipeline, keys_of("abc"))
    prefixes.forget("z")
    prefixes.forget("unknown")
    assert [prefixes.num_cached(pipeline, keys_of("abc")) for pipeline in "xyz"] == [3, 3, 0]
    prefixes.keep_only({"y", "new"})
    assert [prefixes.num_cached(pipeline, keys_of("abc")) for pipeline in "xyz"] == [0, 3, 0]


def test_what_it_takes() -> None:
    """As its docstring says: about 200 bytes for each block, however much has been sent."""
    num_blocks = 5000
    prefixes = CachedPrefixes(num_blocks)
    tracemalloc.start()
    try:
        for number in range(3 * num_blocks // 50):
            prefixes.add("x", BlockKeys(BLOCK_SIZE, str(number)).of([1] * 50 * BLOCK_SIZE, 50))
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 100 * num_blocks < taken_bytes < 250 * num_blocks
