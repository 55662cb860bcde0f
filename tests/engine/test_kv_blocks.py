import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.engine.kv_blocks import BlockKeys, KVBlocks


def grow(blocks: KVBlocks, table: list[int], start: int, end: int) -> list[tuple[int, int]]:
    assert blocks.num_missing(table, start, end) <= blocks.num_free
    return blocks.prepare(table, start, end)


def keys(token_ids: list[int], *, block_size: int = 4, salt: str = "") -> list[bytes]:
    return BlockKeys(block_size, salt).of(token_ids, len(token_ids) // block_size)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int):
    assert KVBlocks(10, 4).blocks_for(num_tokens) == num_blocks


def test_prepare_takes_what_is_missing_and_release_returns_all():
    blocks = KVBlocks(5, 4)
    table: list[int] = []
    assert grow(blocks, table, 0, 6) == []
    first = list(table)
    assert grow(blocks, table, 6, 8) == []
    assert table == first  # already covered
    grow(blocks, table, 8, 9)
    assert table[:2] == first  # what is written stays where it is
    assert (blocks.num_used, blocks.num_free) == (3, 2)
    blocks.release(table)
    assert (table, blocks.num_used, blocks.num_free) == ([], 0, 5)


def test_missing_blocks_are_counted():
    blocks = KVBlocks(2, 4)
    table: list[int] = []
    grow(blocks, table, 0, 3)
    assert blocks.num_missing(table, 3, 4) == 0
    assert blocks.num_missing(table, 3, 9) == 2 > blocks.num_free


def test_writing_to_a_shared_block_copies_it_for_all_owners_but_the_last():
    blocks = KVBlocks(8, 4)
    table: list[int] = []
    grow(blocks, table, 0, 6)
    forks = [blocks.fork(table) for _ in range(2)]
    assert blocks.num_used == 2
    shared = table[1]
    assert blocks.num_missing(forks[0], 6, 7) == 1
    assert grow(blocks, forks[0], 6, 7) == [(shared, forks[0][1])]
    assert grow(blocks, forks[1], 6, 7) == [(shared, forks[1][1])]
    assert blocks.num_missing(table, 6, 7) == 0
    assert grow(blocks, table, 6, 7) == []  # it is the last owner
    assert table[1] == shared
    assert table[0] == forks[0][0] == forks[1][0]
    blocks.check_integrity([table, *forks])


def test_whole_shared_blocks_are_not_copied():
    blocks = KVBlocks(8, 4)
    table: list[int] = []
    grow(blocks, table, 0, 8)
    fork = blocks.fork(table)
    assert grow(blocks, fork, 8, 9) == []
    assert blocks.num_used == 3


# -------------------------------------------------------------------------------------------------- published blocks


def published(blocks: KVBlocks, token_ids: list[int]) -> list[int]:
    table: list[int] = []
    grow(blocks, table, 0, len(token_ids))
    for block, key in zip(table, keys(token_ids), strict=False):
        blocks.publish(block, key)
    return table


def test_a_prefix_is_taken_as_far_as_it_is_published():
    blocks = KVBlocks(8, 4)
    table = published(blocks, list(range(12)))
    other: list[int] = []
    assert blocks.num_shareable(keys([*range(8), 99, 98, 97, 96])) == 2
    assert blocks.take_prefix(other, keys([*range(8), 99, 98, 97, 96])) == 2
    assert other == table[:2]
    blocks.check_integrity([table, other])
    blocks.release(table)
    assert blocks.num_used == 2
    blocks.release(other)
    assert blocks.num_used == 0
    assert blocks.num_shareable(keys(list(range(12)))) == 0  # taking them needs free blocks
    assert blocks.take_prefix(other, keys(list(range(12)))) == 3
    blocks.check_integrity([other])


def test_idle_blocks_go_in_the_order_in_which_they_were_given_back():
    blocks = KVBlocks(4, 4)
    first, second = published(blocks, [1] * 8), published(blocks, [2] * 8)
    blocks.release(first)
    blocks.release(second)
    grow(blocks, table := [], 0, 4)  # the end of the older prefix goes first
    older: list[int] = []
    assert blocks.take_prefix(older, keys([1] * 8)) == 1
    blocks.release(older)  # and has been used last now
    grow(blocks, table, 4, 12)
    assert blocks.take_prefix([], keys([2] * 8)) == 0
    assert blocks.take_prefix(older, keys([1] * 8)) == 1
    blocks.check_integrity([table, older])


def test_the_first_of_two_equal_blocks_stays_published():
    blocks = KVBlocks(4, 4)
    first, second = published(blocks, [1] * 4), published(blocks, [1] * 4)
    assert first != second
    blocks.release(second)
    taken: list[int] = []
    assert blocks.take_prefix(taken, keys([1] * 4)) == 1
    assert taken == first


def test_withdrawn_blocks_are_given_to_nobody():
    blocks = KVBlocks(6, 4)
    table = published(blocks, [1] * 8)
    blocks.withdraw(table[1:])
    other: list[int] = []
    assert blocks.take_prefix(other, keys([1] * 8)) == 1
    blocks.release(table)
    blocks.release(other)
    blocks.withdraw_all()
    assert blocks.take_prefix(other, keys([1] * 8)) == 0
    blocks.check_integrity([other])


def test_without_reuse_nothing_is_published():
    blocks = KVBlocks(4, 4, reuse_prefixes=False)
    published(blocks, [1] * 4)
    assert blocks.take_prefix([], keys([1] * 4)) == 0


@given(
    first=st.lists(st.integers(0, 2), max_size=12),
    second=st.lists(st.integers(0, 2), max_size=12),
    salts=st.tuples(st.sampled_from(["", "a"]), st.sampled_from(["", "a"])),
)
def test_keys_are_equal_exactly_for_equal_prefixes_and_salts(first: list[int], second: list[int], salts):
    pairs = zip(keys(first, block_size=3, salt=salts[0]), keys(second, block_size=3, salt=salts[1]), strict=False)
    for index, (one, other) in enumerate(pairs, 1):
        assert (one == other) == (first[: 3 * index] == second[: 3 * index] and salts[0] == salts[1])


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(0, 10), max_size=5))
def test_keys_of_a_growing_list_are_those_of_the_whole(token_ids: list[int], stops: list[int]):
    growing = BlockKeys(3, "")
    for num_blocks in sorted(stop for stop in stops if stop <= len(token_ids) // 3):
        assert growing.of(token_ids, num_blocks) == keys(token_ids, block_size=3)[:num_blocks]


@given(num_blocks=st.integers(1, 8), steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=40))
def test_every_block_is_accounted_for(num_blocks: int, steps: list[tuple[int, int]]):
    blocks = KVBlocks(num_blocks, 3)
    tables: list[list[int]] = [[], [], [], []]
    for owner, num_tokens in steps:  # 0 tokens: give all back; 20: share another's
        table = tables[owner]
        if num_tokens in (0, 20):
            blocks.release(table)
        if num_tokens == 20:
            tables[owner] = blocks.fork(tables[owner - 1]) if tables[owner - 1] is not table else []
        elif num_tokens > 3 * len(table) and blocks.num_missing(table, 3 * len(table), num_tokens) <= blocks.num_free:
            blocks.prepare(table, 3 * len(table), num_tokens)
            assert len(table) * 3 >= num_tokens
        blocks.check_integrity(tables)


@pytest.mark.parametrize("wrong", [[[0], [0]], [[0, 1]], [[]]], ids=["twice", "still free", "lost"])
def test_integrity_check_notices(wrong: list[list[int]]):
    blocks = KVBlocks(2, 4)
    table: list[int] = []
    grow(blocks, table, 0, 1)
    blocks.check_integrity([[table[0]]])
    with pytest.raises(AssertionError):
        blocks.check_integrity(wrong)
