"""`LogitEdits` at work: biases, penalties and bans on the logits of many rows at once.

An edit touches the rows and tokens that it names, so a row without edits costs nothing. Each equals the transformers
class that `LogitEdits` names; presence and frequency penalties are OpenAI's, as in vLLM.
Shapes: `N` rows of scores, `V` tokens, `E` edited places (row, token).
"""

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gptj_serve.steps import LogitEdits

MAX_BOOST = 1e30
"""Keeps the score of an end token that is long overdue finite in fp32."""

Entry = tuple[int, LogitEdits]
"""A row and its edits."""


def apply_edits(scores: Tensor, entries: Sequence[Entry]) -> None:
    """Edit rows of `scores` [N, V] in place; no row has two entries. Tokens beyond V are left out."""
    for is_asked_for, edit in _EDITS:
        concerned = [entry for entry in entries if is_asked_for(entry[1])]
        if concerned:
            edit(scores, concerned)


class _Places:
    """The places [E] that one kind of edit changes in `scores`: the existing ones of each entry's tokens."""

    def __init__(
        self, scores: Tensor, entries: Sequence[Entry], token_ids: Callable[[LogitEdits], Sequence[int]]
    ) -> None:
        self._entries = entries
        self._device = scores.device
        asked_for = [token_ids(edits) for _, edits in entries]
        self._counts = [len(ids) for ids in asked_for]
        flat = np.fromiter(chain.from_iterable(asked_for), np.int64, sum(self._counts))
        self._exist = flat < scores.shape[1]
        rows = np.repeat([row for row, _ in entries], self._counts)
        self.index = (self._select(rows), self._select(flat))

    def of_rows(self, value: Callable[[LogitEdits], float]) -> Tensor:
        """One value per entry → [E]."""
        values = np.array([value(edits) for _, edits in self._entries], dtype=np.float32)
        return self._select(np.repeat(values, self._counts))

    def of_tokens(self, values: Callable[[LogitEdits], Sequence[float]]) -> Tensor:
        """One value per token that an entry asks for → [E]."""
        nested = (values(edits) for _, edits in self._entries)
        return self._select(np.fromiter(chain.from_iterable(nested), np.float32, len(self._exist)))

    def _select(self, flat: np.ndarray) -> Tensor:
        return on_device(flat[self._exist], self._device)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that the host doesn't wait for: from pinned memory, which torch keeps until it has been read."""
    given = torch.from_numpy(array)
    return given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given.to(device)


def _bias(scores: Tensor, entries: Sequence[Entry]) -> None:
    places = _Places(scores, entries, lambda edits: [token_id for token_id, _ in edits.biases])
    scores[places.index] += places.of_tokens(lambda edits: [bias for _, bias in edits.biases])


def _penalize_repetition(scores: Tensor, entries: Sequence[Entry]) -> None:
    places = _Places(scores, entries, lambda edits: edits.seen_token_ids)
    penalty = places.of_rows(lambda edits: edits.repetition_penalty)
    seen = scores[places.index]
    scores[places.index] = torch.where(seen < 0, seen * penalty, seen / penalty)


def _penalize_output(scores: Tensor, entries: Sequence[Entry]) -> None:
    places = _Places(scores, entries, lambda edits: [token_id for token_id, _ in edits.output_counts])
    counts = places.of_tokens(lambda edits: [count for _, count in edits.output_counts])
    frequency = places.of_rows(lambda edits: edits.frequency_penalty)
    presence = places.of_rows(lambda edits: edits.presence_penalty)
    scores[places.index] -= frequency * counts + presence * (counts > 0)


def _ban(scores: Tensor, entries: Sequence[Entry]) -> None:
    scores[_Places(scores, entries, lambda edits: edits.banned_token_ids).index] = -torch.inf


def _allow(scores: Tensor, entries: Sequence[Entry]) -> None:
    num_bytes = -(-scores.shape[1] // 8)
    packed = np.zeros((len(entries), num_bytes), dtype=np.uint8)
    for mask, (_, edits) in zip(packed, entries, strict=True):
        given = np.frombuffer(edits.allowed_mask[:num_bytes], dtype=np.uint8)
        mask[: len(given)] = given
    allowed = np.unpackbits(packed, axis=1, count=scores.shape[1], bitorder="little").view(np.bool_)
    is_forbidden = on_device(~allowed, scores.device)
    rows = _rows(entries, scores)
    scores[rows] = scores[rows].masked_fill_(is_forbidden, -torch.inf)


def _force(scores: Tensor, entries: Sequence[Entry]) -> None:
    scores[_rows(entries, scores)] = -torch.inf
    scores[_Places(scores, entries, lambda edits: edits.forced_token_ids).index] = 0.0


def _rows(entries: Sequence[Entry], scores: Tensor) -> Tensor:
    return on_device(np.array([row for row, _ in entries]), scores.device)


def _boost(scores: Tensor, entries: Sequence[Entry]) -> None:
    places = _Places(scores, entries, lambda edits: edits.boosted_token_ids)
    boost = places.of_rows(lambda edits: min(edits.boost, MAX_BOOST))
    boosted = scores[places.index]
    scores[places.index] = boosted + torch.where(boosted.isfinite(), boosted.abs() * boost, 0.0)


_EDITS: Sequence[tuple[Callable[[LogitEdits], object], Callable[[Tensor, Sequence[Entry]], None]]] = (
    (lambda edits: edits.biases, _bias),
    (lambda edits: edits.repetition_penalty != 1 and edits.seen_token_ids, _penalize_repetition),
    (lambda edits: edits.output_counts and (edits.presence_penalty or edits.frequency_penalty), _penalize_output),
    (lambda edits: edits.banned_token_ids, _ban),
    (lambda edits: edits.allowed_mask, _allow),
    (lambda edits: edits.forced_token_ids, _force),
    (lambda edits: edits.boost, _boost),
)
"""In the order of `LogitEdits`: who is concerned, and what is done."""
