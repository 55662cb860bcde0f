"""`DynamicCache`: the keys and values of tokens already seen, growing by concatenation, as transformers' class.

For the padded path only; the engine keeps its KV in blocks. Shapes: `B` rows, `H` heads, `C` tokens so far, `Dh`
head_dim.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class CacheLayer:
    """One layer's `keys` and `values`, each [B, H, C, Dh], or None before the first token."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=-2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


class DynamicCache:
    """Pass it as `cache`: a forward call appends its tokens to it in place and returns it again."""

    def __init__(self) -> None:
        self.layers: list[CacheLayer] = []

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        return ((layer.keys, layer.values) for layer in self.layers)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
        return self.layers[layer_idx].keys, self.layers[layer_idx].values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the cache holds."""
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; returns all of that layer's."""
        while layer_idx >= len(self.layers):
            self.layers.append(CacheLayer())
        return self.layers[layer_idx].update(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (the number is negative, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove")
        if tokens_to_remove < 0:
            self._map(lambda x: x[..., :tokens_to_remove, :])

    def reset(self) -> None:
        """Forget all tokens."""
        self.layers = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = change(layer.keys), change(layer.values)
