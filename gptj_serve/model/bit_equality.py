"""Which numbers of rows a matrix product may be given without any row noticing, in any bit.

A BLAS chooses its kernel, and with it the order in which products are summed, by the shape of the operands and by the
number of threads. What it does is not documented, so it is tried on the machine at hand.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptj_serve.errors import ConfigError

NUM_ROWS = (2, 4, 8, 16, 32, 48, 64, 96, 128)
"""The numbers of rows that are ever used; others are padded. One row is not among them: it may take a
matrix-vector kernel, with an order of its own."""

REFERENCE = 16
"""Whoever gives other bits than this number of rows is out."""

Product = Callable[[Tensor], Tensor]
"""Rows [R, K] → rows [R, N], each a function of its own row."""


def agreeing_num_rows(products: Sequence[Product], width: int, dtype: torch.dtype, what: str) -> tuple[int, ...]:
    """Those of `NUM_ROWS` with which all `products` give a row of `width` numbers the same bits in any place.

    Raises `ConfigError` if that is not so for `REFERENCE` itself, or if it depends on the number of threads: then
    nothing here is bit-equal. `what` names the product to the user.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(NUM_ROWS), width, generator=generator).to(dtype)
    expected = torch.cat([products[0](part) for part in torch.split(rows, REFERENCE)])
    if not _agrees(products, rows, expected, REFERENCE):
        raise ConfigError(_refusal(what, "a row's place among others"))
    if not _agrees_on_one_thread(products, rows, expected):
        raise ConfigError(_refusal(what, f"the number of threads, which is {torch.get_num_threads()} here"))
    return tuple(n for n in NUM_ROWS if n == REFERENCE or _agrees(products, rows, expected, n))


def _agrees(products: Sequence[Product], rows: Tensor, expected: Tensor, num_rows: int) -> bool:
    """With the first `num_rows` rows, each in its neighbour's place: if no row minds, no two places differ."""
    moved = rows[:num_rows].roll(1, 0)
    return all(torch.equal(product(moved).roll(-1, 0), expected[:num_rows]) for product in products)


def _agrees_on_one_thread(products: Sequence[Product], rows: Tensor, expected: Tensor) -> bool:
    """Stages may differ in their numbers of threads; if all agree with one thread, they agree with each other."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return True
    torch.set_num_threads(1)
    try:
        return _agrees(products, rows, expected, REFERENCE)
    finally:
        torch.set_num_threads(num_threads)


def _refusal(what: str, cause: str) -> str:
    return (
        f"deterministic: on this machine the bits of {what} depend on {cause}; try fewer threads "
        "(pipeline.stage.num_threads), other kernels (ONEDNN_MAX_CPU_ISA in the environment) or float32"
    )
