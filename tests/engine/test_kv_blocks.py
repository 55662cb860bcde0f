import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.engine.kv_blocks import KVBlocks


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int):
    assert KVBlocks(10, 4).blocks_for(num_tokens) == num_blocks


def test_extend_takes_what_is_missing_and_release_returns_all():
    blocks = KVBlocks(5, 4)
    table: list[int] = []
    assert blocks.extend(table, 6)
    assert len(table) == 2
    first = list(table)
    assert blocks.extend(table, 8)
    assert table == first  # already covered
    assert blocks.extend(table, 9)
    assert table[:2] == first  # what is written stays where it is
    assert (blocks.num_used, blocks.num_free) == (3, 2)
    blocks.release(table)
    assert (table, blocks.num_used, blocks.num_free) == ([], 0, 5)


def test_extend_takes_nothing_if_too_little_is_free():
    blocks = KVBlocks(2, 4)
    table: list[int] = []
    assert blocks.extend(table, 3)
    before = list(table)
    assert not blocks.extend(table, 9)
    assert table == before
    assert blocks.num_free == 1


@given(num_blocks=st.integers(1, 8), steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=40))
def test_every_block_has_one_owner_or_none(num_blocks: int, steps: list[tuple[int, int]]):
    blocks = KVBlocks(num_blocks, 3)
    tables: list[list[int]] = [[], [], [], []]
    for owner, num_tokens in steps:  # 0 tokens: give all back
        if not num_tokens:
            blocks.release(tables[owner])
        elif blocks.extend(tables[owner], num_tokens):
            assert len(tables[owner]) * 3 >= num_tokens
        else:
            assert blocks.blocks_for(num_tokens) - len(tables[owner]) > blocks.num_free
        blocks.check_integrity(tables)


@pytest.mark.parametrize("wrong", [[[0], [0]], [[0, 1]], [[]]], ids=["twice", "still free", "lost"])
def test_integrity_check_notices(wrong: list[list[int]]):
    blocks = KVBlocks(2, 4)
    table: list[int] = []
    blocks.extend(table, 1)
    blocks.check_integrity([table])
    with pytest.raises(AssertionError, match="KV block"):
        blocks.check_integrity(wrong)
