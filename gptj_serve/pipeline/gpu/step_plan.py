"""`StepPlan`: how a microbatch goes over the device: its shape, and which rows' tokens are chosen there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptj_serve.pipeline.gpu.buckets import Bucket, DecodeBuckets
from gptj_serve.pipeline.gpu.step_buffers import StepShape, decode_shape, mixed_shape
from gptj_serve.steps import Row, RowOutput, SampleSpec

_PADDING = SampleSpec()


@dataclass(frozen=True, slots=True)
class StepPlan:
    shape: StepShape
    bucket: Bucket | None  # that of the graph; None: there is none, since a row has more than one token
    num_tokens: int  # without padding
    places: list[int]  # packed tokens whose logits are wanted on the device; in a decode step all of them are
    specs: list[SampleSpec]  # for each place
    positions: list[int]  # that the chosen tokens take
    first_place: dict[int, int]  # by row: of those whose tokens are chosen on the device


def plan_step(rows: Sequence[Row], buckets: DecodeBuckets, can_sample: Callable[[SampleSpec], bool] | None) -> StepPlan:
    """`can_sample` is what the device can choose tokens by; None: this is not the last stage.

    Raises `IndexError` for more rows, or longer ones, than there is a bucket for.
    """
    max_row_tokens = max(len(row.token_ids) for row in rows)
    sampled = {i for i, row in enumerate(rows) if can_sample is not None and _is_sampled(row, can_sample)}
    if max_row_tokens == 1:
        bucket = buckets.smallest_for(len(rows), max(len(row.block_table) for row in rows))
        specs = [_PADDING] * len(rows)
        for i in sampled:
            specs[i] = rows[i].samples[0]
        positions = [row.start + 1 for row in rows]
        first_place = {i: i for i in sampled}
        return StepPlan(decode_shape(bucket), bucket, len(rows), [], specs, positions, first_place)
    places: list[int] = []
    specs, positions, first_place, end = [], [], {}, 0
    for i, row in enumerate(rows):
        end += len(row.token_ids)
        num_samples = len(row.samples)
        if i in sampled and len(places) + num_samples <= buckets.max_rows:
            first_place[i] = len(places)
            places += range(end - num_samples, end)
            positions += range(row.end - num_samples + 1, row.end + 1)
            specs += row.samples
    num_places = buckets.rows_for(len(places)) if places else 0
    shape = mixed_shape(end, len(rows), max_row_tokens, buckets.max_blocks, num_places)
    return StepPlan(shape, None, end, places, specs, positions, first_place)


def _is_sampled(row: Row, can_sample: Callable[[SampleSpec], bool]) -> bool:
    """Tokens are all that it asks for, and the device can choose them."""
    if row.output is not RowOutput.NOTHING or row.target_token_ids or not row.samples:
        return False
    return all(map(can_sample, row.samples))
