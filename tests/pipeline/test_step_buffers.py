"""What gets to the device of a microbatch, against a reference in plain Python; and which shapes microbatches take."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.pipeline.gpu.buckets import DecodeBuckets, block_sizes, row_sizes
from gptj_serve.pipeline.gpu.step_buffers import Limits, StepBuffers, StepShape
from gptj_serve.pipeline.gpu.step_plan import plan_step
from gptj_serve.steps import Row, RowOutput, SampleSpec
from tests.pipeline.fake_device import FakeDevice, NoHostSync

LIMITS = Limits(
    dtype=torch.float32,
    num_token_ids=97,
    num_sampled_ids=97,
    num_positions=96,
    num_kv_blocks=40,
    block_size=4,
    max_rows=20,
    max_tokens=128,
)
BUCKETS = DecodeBuckets(LIMITS.max_rows, LIMITS.max_blocks)


@st.composite
def rows(draw: st.DrawFn, max_row_tokens: int) -> list[Row]:
    rng = draw(st.randoms(use_true_random=False))
    made: list[Row] = []
    num_left = LIMITS.max_tokens
    for _ in range(draw(st.integers(1, LIMITS.max_rows))):
        num_tokens = draw(st.integers(1, max_row_tokens))
        if num_tokens > num_left:
            break
        num_left -= num_tokens
        start = draw(st.integers(0, LIMITS.num_positions - num_tokens))
        num_blocks = -(-(start + num_tokens) // LIMITS.block_size) + (start + num_tokens < 90 and rng.random() < 0.2)
        made.append(
            Row(
                [rng.randrange(97) for _ in range(num_tokens)],
                start,
                [rng.randrange(LIMITS.num_kv_blocks) for _ in range(num_blocks)],
                rng.choice([RowOutput.NOTHING, RowOutput.NOTHING, RowOutput.QA]),
                [SampleSpec()] * rng.choice([0, 1, min(2, num_tokens)]),
            )
        )
    return made


def put(
    buffers: StepBuffers, device: FakeDevice, made: list[Row], fed_from: list[int]
) -> tuple[StepShape, list[list[int]]]:
    plan = plan_step(made, BUCKETS, lambda spec: True)
    with NoHostSync(device):
        buffers.put(plan.shape, made, plan.places, fed_from)
        inputs = buffers.inputs(plan.shape)
    device.streams[0].record().wait()
    rows = inputs.rows
    assert rows.max_row_tokens == plan.shape.max_row_tokens
    arrays = (
        rows.token_ids, rows.positions, rows.slots, rows.row_starts, rows.context_lengths, inputs.fed_from,
        inputs.places,
    )  # fmt: skip
    for array in (*arrays, rows.block_tables):
        assert array.dtype == torch.int32
        assert array.is_contiguous()
        assert array.storage_offset() % 32 == 0
    return plan.shape, [*(array.tolist() for array in arrays), rows.block_tables.tolist()]


def reference(shape: StepShape, made: list[Row], fed_from: list[int]) -> list[list[int]]:
    token_ids, positions, slots, row_starts, lengths, places = [], [], [], [0], [], []
    for row in made:
        for n, token_id in enumerate(row.token_ids):
            token_ids.append(token_id)
            positions.append(row.start + n)
            block = row.block_table[(row.start + n) // LIMITS.block_size]
            slots.append(block * LIMITS.block_size + (row.start + n) % LIMITS.block_size)
        row_starts.append(len(token_ids))
        lengths.append(row.end)
        has_room = len(places) + len(row.samples) <= LIMITS.max_rows
        if row.output is RowOutput.NOTHING and shape.max_row_tokens > 1 and has_room:
            places += range(len(token_ids) - len(row.samples), len(token_ids))
    tables = [row.block_table + [LIMITS.num_kv_blocks] * (shape.max_blocks - len(row.block_table)) for row in made]
    num_tokens, padding_rows = shape.num_tokens - len(token_ids), shape.num_rows - len(made)
    padding_slot = LIMITS.num_kv_blocks * LIMITS.block_size
    return [
        token_ids + [0] * num_tokens,
        positions + [0] * num_tokens,
        slots + [padding_slot] * num_tokens,
        row_starts + [len(token_ids)] * padding_rows,
        lengths + [0] * padding_rows,
        fed_from + [-1] * (shape.num_tokens - len(fed_from)),
        places + [0] * (shape.num_places - len(places)),
        tables + [[LIMITS.num_kv_blocks] * shape.max_blocks] * padding_rows,
    ]


@given(st.lists(st.one_of(rows(1), rows(9), rows(70)), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_what_is_there_is_what_a_plain_reference_says(microbatches: list[list[Row]], rng: random.Random):
    device = FakeDevice()
    buffers = StepBuffers(device, device.stream(), LIMITS)
    for made in microbatches:
        num_tokens = sum(len(row.token_ids) for row in made)
        fed_from = [rng.randrange(-1, 4) for _ in range(num_tokens)] if rng.random() < 0.5 else []
        shape, found = put(buffers, device, made, fed_from)
        assert found == reference(shape, made, fed_from)


@given(rows(1))
def test_a_decode_step_takes_the_smallest_bucket_that_holds_it(made: list[Row]):
    plan = plan_step(made, BUCKETS, None)
    num_blocks = max(len(row.block_table) for row in made)
    fitting = [b for b in BUCKETS.largest_first() if b.num_rows >= len(made) and b.max_blocks >= num_blocks]
    assert plan.bucket == min(fitting, key=lambda bucket: (bucket.num_rows, bucket.max_blocks))
    assert plan.shape == StepShape(
        plan.bucket.num_rows, plan.bucket.num_rows, plan.bucket.max_blocks, plan.bucket.num_rows, 1
    )


@given(rows(70))
def test_other_steps_are_padded_to_few_shapes(made: list[Row]):
    made[0] = replace_tokens(made[0], 2)
    shape = plan_step(made, BUCKETS, lambda spec: True).shape
    num_tokens, longest = sum(len(row.token_ids) for row in made), max(len(row.token_ids) for row in made)
    assert 0 <= shape.num_tokens - num_tokens < 16
    assert shape.num_tokens % 16 == 0
    assert shape.max_row_tokens in (16, 32, 64, 128)
    assert shape.max_row_tokens >= longest
    assert shape.num_rows in (16, 32)
    assert shape.num_rows >= len(made)
    assert shape.max_blocks == LIMITS.max_blocks
    assert shape.num_places in (0, *row_sizes(LIMITS.max_rows))


def replace_tokens(row: Row, num_tokens: int) -> Row:
    """At the beginning of its sequence."""
    return Row([1] * num_tokens, 0, row.block_table[:1], samples=row.samples[:1])


def test_the_sizes_of_buckets():
    assert row_sizes(1) == [1]
    assert row_sizes(3) == [1, 2, 3]
    assert row_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    sizes = row_sizes(256)
    assert sizes == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert row_sizes(1000)[-5:] == [512, 640, 768, 896, 1000]
    assert block_sizes(128) == [32, 128]
    assert block_sizes(1) == [1]


@given(st.integers(1, 600), st.integers(1, 200))
def test_buckets_hold_all_that_may_come(max_rows: int, max_blocks: int):
    buckets = DecodeBuckets(max_rows, max_blocks)
    sizes = row_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
    assert buckets.largest_first()[0] == buckets.smallest_for(max_rows, max_blocks)
    assert buckets.smallest_for(1, 1).num_rows == 1
    with pytest.raises(IndexError, match="rows in a step"):
        buckets.smallest_for(max_rows + 1, 1)
    with pytest.raises(IndexError, match="KV blocks in a row"):
        buckets.smallest_for(1, max_blocks + 1)


def test_rows_that_have_no_room_among_the_places_are_left_to_the_host():
    """Drafts ask for many tokens each."""
    drafts = [Row([1] * 8, 0, [i, i], samples=[SampleSpec()] * 8) for i in range(4)]
    plan = plan_step(drafts, DecodeBuckets(20, 24), lambda spec: True)
    assert plan.first_place == {0: 0, 1: 8}
    assert plan.places == list(range(16))
    assert plan.positions == [*range(1, 9)] * 2
    assert plan.shape.num_places == 16


def test_a_microbatch_of_the_largest_size_has_room():
    device = FakeDevice()
    limits = replace(LIMITS, max_rows=17, max_tokens=17)
    buffers = StepBuffers(device, device.stream(), limits)
    made = [Row([1] * 17, 79, [0] * 24)]
    plan = plan_step(made, DecodeBuckets(17, 24), None)
    buffers.put(plan.shape, made)
    many = [Row([1], 95, [i] * 24) for i in range(17)]
    plan = plan_step(many, DecodeBuckets(17, 24), None)
    buffers.put(plan.shape, many)
    device.streams[0].record().wait()
    assert buffers.inputs(plan.shape).rows.context_lengths.tolist() == [96] * 17
