"""The best tokens of rows of scores, without sorting the vocabulary. Shapes: `R` rows, `V` tokens, `K` best ones.

Equal scores are common in half precision, and which token is chosen among them must not depend on anything else: the
lower id comes first. Tokens at -inf are an exception: nobody may choose them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SPARE_TIES = 16


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(scores, token ids), each [R, K], of the `count` best tokens, or of all if there are fewer."""
    num_token_ids = scores.shape[1]
    ranked, token_ids = leading(scores, min(count + _SPARE_TIES, num_token_ids))
    if count + _SPARE_TIES >= num_token_ids:
        return ranked[:, :count], token_ids[:, :count]
    last = ranked[:, -1]
    if tied := rows_where((ranked[:, count - 1] == last) & (last > -torch.inf)):  # the order of impossible ones is open
        in_order, all_ids = scores[tied].sort(dim=-1, descending=True, stable=True)
        ranked[tied, :count], token_ids[tied, :count] = in_order[:, :count], all_ids[:, :count]
    return ranked[:, :count], token_ids[:, :count]


def leading(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Like `best`, but which of the tokens that equal the last one are among the `count` is left open."""
    token_ids = scores.topk(count, sorted=False).indices.sort(dim=-1).values
    ranked, order = scores.gather(1, token_ids).sort(dim=-1, descending=True, stable=True)
    return ranked, token_ids.gather(1, order)


def rows_where(mask: Tensor) -> list[int]:
    """The places of a mask [R] that are set."""
    rows: list[int] = mask.nonzero().flatten().tolist()
    return rows


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, in ascending order; no copy if they are all. On CPUs twice as fast as indexing."""
    return x if len(rows) == len(x) else x.index_select(0, torch.tensor(rows, device=x.device))
