"""`StepShape`: all that the time of a microbatch depends on."""

from collections.abc import Iterable
from typing import NamedTuple

from gptj_serve.steps import Row


class StepShape(NamedTuple):
    """Of one microbatch, over all its rows."""

    num_rows: int
    num_tokens: int
    num_context_tokens: int  # whose KV is read, each once a row: up to the row's end
    num_pairs: int  # of a computed token and one that it attends to, itself included: arithmetic
    num_samples: int


def shape_of(rows: Iterable[Row]) -> StepShape:
    num_rows = num_tokens = num_context_tokens = num_pairs = num_samples = 0
    for row in rows:
        num_new = len(row.token_ids)
        num_rows += 1
        num_tokens += num_new
        num_context_tokens += row.start + num_new
        num_pairs += num_new * row.start + num_new * (num_new + 1) // 2
        num_samples += len(row.samples)
    return StepShape(num_rows, num_tokens, num_context_tokens, num_pairs, num_samples)
