"""`DeviceRows`: one microbatch as the kernels of a GPU read it, in tensors of fixed shapes.

A captured graph is fed by copying into them. Shapes: `T` packed tokens, `R` rows, both padded up to a bucket.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Rows are packed one after the other from token 0 on; what is left of T is padding, and belongs to no row.

    All tensors are contiguous int32 on the device. Nothing on the host depends on what is in them.
    """

    token_ids: Tensor  # [T]; 0 for padding tokens
    positions: Tensor  # [T]; 0 for padding tokens
    slots: Tensor  # [T]: block * block_size + offset, where the token's k and v go; the padding block's for padding
    row_starts: Tensor  # [R + 1]: first packed token of each row, and the end of the last; padding rows are empty
    context_lengths: Tensor  # [R]: tokens of the row's sequence after this step; 0 for padding rows
    block_tables: Tensor  # [R, max_blocks], padded with the padding block
    max_row_tokens: int  # no row has more; 1 if all decode. Part of a graph's key, like the shapes

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.token_ids.shape[0]

    @property
    def num_rows(self) -> int:
        """R"""
        return self.context_lengths.shape[0]

    @property
    def max_blocks(self) -> int:
        return self.block_tables.shape[1]
