"""What narrows the distribution of a token that is drawn: transformers' warpers, in transformers' order.

`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`, `TypicalLogitsWarper`,
`EpsilonLogitsWarper`, `EtaLogitsWarper`: each looks at the distribution that the ones before it left. The first three
keep a row's best tokens, so a row with one of them is worked out among a thousand of its best, found without sorting.
Only if more stay, or if none of the three is asked for, is the whole vocabulary sorted: that costs ten times as much.

Shapes: `R` rows, `V` vocabulary, `K` ranked tokens, best first, the lower id first among equals. `x` [R, K] are scores
in fp64, relative to the best one, over the temperature; -inf where a token is ruled out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from gptj_serve.engine.draws import group_weights
from gptj_serve.engine.ranking import leading, rows_where, take_rows
from gptj_serve.types import Warpers

NUM_LEADING = 1024
"""Among so many of its best tokens is a row worked out first."""

MAX_SORTED_ROWS = 16
"""So many rows of the vocabulary are sorted at once."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-37, 1e37  # normal numbers in fp32; what is beyond makes no difference
_SPARE_TIES = 16  # room for tokens as good as the k-th


@dataclass(frozen=True, slots=True)
class Knobs:
    """The `Warpers` of many rows. On the CPU, where it is decided what needs to be computed."""

    table: Tensor  # [R, fields], fp64

    @classmethod
    def of(cls, warpers: Sequence[Warpers]) -> "Knobs":
        return cls(torch.tensor([msgspec.structs.astuple(w) for w in warpers], dtype=torch.float64))

    def of_rows(self, rows: Sequence[int]) -> "Knobs":
        return Knobs(self.table[rows])

    def __getitem__(self, name: str) -> Tensor:
        """A field's values [R]."""
        return self.table[:, Warpers.__struct_fields__.index(name)]

    def column(self, name: str, like: Tensor) -> Tensor:
        """A field's values [R, 1], beside the tensors that they are to be used with."""
        return self[name][:, None].to(like.device)

    def temperatures(self, like: Tensor) -> Tensor:
        """[R, 1] in fp64, above 0."""
        return self.column("temperature", like).clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)

    @property
    def is_drawn(self) -> Tensor:
        """Whether chance has a part in it [R]. The best token alone is the first of the best, also among equals."""
        return (self["temperature"] > 0) & (self["top_k"] != 1)

    def has_top_k(self, num_token_ids: int) -> Tensor:
        return (self["top_k"] > 0) & (self["top_k"] < num_token_ids)

    def keeps_best(self, num_token_ids: int) -> Tensor:
        """Whether one of the first three warpers is at work [R]."""
        return self.has_top_k(num_token_ids) | (self["top_p"] < 1) | (self["min_p"] > 0)

    def narrows(self, num_token_ids: int) -> Tensor:
        """Whether any warper but temperature is at work [R]."""
        of_shape = (self["typical_p"] < 1) | (self["epsilon_cutoff"] > 0) | (self["eta_cutoff"] > 0)
        return self.keeps_best(num_token_ids) | of_shape


class Narrowed(NamedTuple):
    """What the warpers leave of some of the rows."""

    rows: list[int]
    x: Tensor  # [rows, K]
    token_ids: Tensor  # [rows, K]


def narrowed(scores: Tensor, knobs: Knobs) -> Iterator[Narrowed]:
    """Every row of fp32 `scores` [R, V], in some part; each must have a finite best score."""
    num_token_ids = scores.shape[1]
    has_top_k = knobs.has_top_k(num_token_ids)
    needs = torch.where(has_top_k, knobs["top_k"] + _SPARE_TIES, NUM_LEADING)
    is_short = knobs.keeps_best(num_token_ids) & (needs <= NUM_LEADING) & (num_token_ids > NUM_LEADING)
    waiting = rows_where(~is_short)
    if short := rows_where(is_short):
        ranked, token_ids = leading(take_rows(scores, short), int(needs[short].max()))
        x = _relative(ranked, knobs.of_rows(short))
        x = _keep_best(x, _weight_beyond(x, scores, short, knobs), knobs.of_rows(short), num_token_ids)
        # Where one as good as the last ranked one stays, others that are not ranked might stay too.
        is_open = ((ranked == ranked[:, -1:]) & x.isfinite()).any(dim=-1).cpu()
        waiting = sorted(waiting + [short[place] for place in rows_where(is_open)])
        if done := rows_where(~is_open):
            rows = [short[place] for place in done]
            yield Narrowed(rows, _reshape(take_rows(x, done), knobs.of_rows(rows)), take_rows(token_ids, done))
    for first in range(0, len(waiting), MAX_SORTED_ROWS):
        rows = waiting[first : first + MAX_SORTED_ROWS]
        ranked, token_ids = take_rows(scores, rows).sort(dim=-1, descending=True, stable=True)
        x = _relative(ranked, knobs.of_rows(rows))
        x = _keep_best(x, torch.zeros_like(x[:, :1]), knobs.of_rows(rows), num_token_ids)
        yield Narrowed(rows, _reshape(x, knobs.of_rows(rows)), token_ids)


def _relative(ranked: Tensor, knobs: Knobs) -> Tensor:
    """With the best score at 0, no temperature makes a NaN."""
    return (ranked.double() - ranked[:, :1]) / knobs.temperatures(ranked)


def _weight_beyond(x: Tensor, scores: Tensor, rows: Sequence[int], knobs: Knobs) -> Tensor:
    """The sum of exp over the tokens that are not among the ranked ones, [R, 1], where top-p must know it."""
    beyond = torch.zeros_like(x[:, :1])
    is_needed = (knobs["top_p"] < 1) & ~knobs.has_top_k(scores.shape[1])
    if places := [place for place, row in enumerate(rows) if is_needed[row]]:
        wide = take_rows(scores, [rows[place] for place in places])
        temperatures = knobs.of_rows([rows[place] for place in places]).temperatures(x)
        total = group_weights(wide, wide.amax(dim=-1, keepdim=True), temperatures).sum(dim=-1, keepdim=True)
        beyond[places] = (total - x[places].exp().sum(dim=-1, keepdim=True)).clamp(min=0)
    return beyond


def _keep_best(x: Tensor, beyond: Tensor, knobs: Knobs, num_token_ids: int) -> Tensor:
    """Top-k, top-p, min-p. `beyond` [R, 1] is the weight of tokens after the ranked ones; none if top-k cuts first."""
    has_top_k = knobs.has_top_k(num_token_ids)
    if has_top_k.any():
        last = torch.where(has_top_k, knobs["top_k"], x.shape[1]).long()[:, None].to(x.device) - 1
        x = x.masked_fill(x < x.gather(1, last), -torch.inf)  # those as good as the k-th stay
    if (knobs["top_p"] < 1).any():
        top_p = knobs.column("top_p", x)
        weights = x.exp()
        before = (weights.cumsum(dim=-1) - weights) / (weights.sum(dim=-1, keepdim=True) + beyond)
        x = x.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
    return x.masked_fill(x < knobs.column("min_p", x).log(), -torch.inf)


def _reshape(x: Tensor, knobs: Knobs) -> Tensor:
    """Typical, epsilon and eta, which must see all that is left."""
    if rows := rows_where(knobs["typical_p"] < 1):
        x[rows] = _typical(x[rows], knobs.of_rows(rows).column("typical_p", x))
    if (knobs["epsilon_cutoff"] > 0).any():
        x = _drop_unlikely(x, knobs.column("epsilon_cutoff", x))
    if (knobs["eta_cutoff"] > 0).any():
        eta = knobs.column("eta_cutoff", x)
        x = _drop_unlikely(x, torch.minimum(eta, eta.sqrt() * (-_entropy(x)).exp()))
    return x


def _typical(x: Tensor, mass: Tensor) -> Tensor:
    """Keeps the tokens whose information is closest to the entropy, as many as it takes to reach `mass` [R, 1]."""
    distance = (x.log_softmax(dim=-1) + _entropy(x)).abs()
    ranked, order = distance.sort(dim=-1)
    reached = x.gather(1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=x.shape[1] - 1)
    return x.masked_fill(distance > ranked.gather(1, last), -torch.inf)


def _drop_unlikely(x: Tensor, cutoff: Tensor) -> Tensor:
    """Rules out what is less likely than `cutoff` [R, 1], but never the best."""
    return x.masked_fill((x.softmax(dim=-1) < cutoff) & (x < x.amax(dim=-1, keepdim=True)), -torch.inf)


def _entropy(x: Tensor) -> Tensor:
    """[R, 1], in nats."""
    entropy: Tensor = torch.special.entr(x.softmax(dim=-1)).sum(dim=-1, keepdim=True)
    return entropy
