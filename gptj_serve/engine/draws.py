"""Choosing a token from scores: greedily, or by a draw whose noise depends on nothing but (seed, position).

A draw is the Gumbel-max trick: the argmax of scores plus Gumbel noise follows their softmax. It is used because a
rounding difference of size e in the scores (another batch, another split) changes the draw with probability of order
e; inverting a cumulative sum over V terms is far more fragile. Two levels, a group of tokens and then a token of it,
draw from the same distribution with V/64 + 64 noises instead of V.

Shapes: `R` rows, `V` vocabulary, `G` groups of 64 neighbouring tokens, `K` ranked tokens. Noise is [R, G + 64].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GROUP_SIZE = 64

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def first_best(scores: Tensor) -> Tensor:
    """The best token of each row of `scores` [R, V], the lowest id among equals: [R].

    That is `argmax`, which on CPUs costs ten times as much as the maxima that are looked at here.
    """
    group = _by_group(scores, lambda part: part.amax(dim=-1)).argmax(dim=-1, keepdim=True)
    return (group * GROUP_SIZE + _members(scores, group).argmax(dim=-1, keepdim=True))[:, 0]


def draw(scores: Tensor, temperatures: Tensor, noise: Tensor) -> Tensor:
    """Draw from softmax(scores [R, V] / temperatures [R, 1]) → ids [R].

    The wide part is in fp32, whose rounding changes one draw in a million; the rest is in fp64. With the highest
    score at 0, no temperature that is a normal number in fp32 makes a NaN.
    """
    peaks = scores.amax(dim=-1, keepdim=True)
    group = (group_weights(scores, peaks, temperatures).log() + noise[:, :-GROUP_SIZE]).argmax(dim=-1, keepdim=True)
    members = (_members(scores, group).double() - peaks) / temperatures + noise[:, -GROUP_SIZE:]
    return (group * GROUP_SIZE + members.argmax(dim=-1, keepdim=True))[:, 0]


def draw_ranked(scores: Tensor, token_ids: Tensor, noise: Tensor) -> Tensor:
    """The same draw from softmax(scores [R, K]) of the tokens `token_ids` [R, K], all others being impossible."""
    scores = scores - scores.amax(dim=-1, keepdim=True)
    groups = token_ids // GROUP_SIZE
    weights = scores.new_zeros(len(scores), noise.shape[1] - GROUP_SIZE).scatter_add_(1, groups, scores.exp())
    group = (weights.log() + noise[:, :-GROUP_SIZE]).argmax(dim=-1, keepdim=True)
    members = scores.masked_fill(groups != group, -torch.inf)
    members = members + noise[:, -GROUP_SIZE:].gather(1, token_ids % GROUP_SIZE)
    return token_ids.gather(1, members.argmax(dim=-1, keepdim=True))[:, 0]


def group_weights(scores: Tensor, peaks: Tensor, temperatures: Tensor) -> Tensor:
    """Sums over each group of exp((scores [R, V] - peaks [R, 1]) / temperatures [R, 1]): [R, G] in fp64."""
    weights = (scores - peaks).div_(temperatures.float()).exp_()
    return _by_group(weights, lambda part: part.sum(dim=-1)).double()


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [R, count] in fp64: SplitMix64 (Steele et al., 2014) keyed by (seed, position)."""
    seed, position = torch.tensor([seeds, positions], dtype=torch.int64).to(device)
    key = _mix(_mix(seed) + position * _GOLDEN)
    bits = _mix(key[:, None] + torch.arange(1, count + 1, device=device) * _GOLDEN)
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1)
    return uniform.log_().neg_().log_().neg_()


def noise_for(num_token_ids: int, seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """What a draw among `num_token_ids` tokens takes."""
    return gumbel_noise(seeds, positions, -(-num_token_ids // GROUP_SIZE) + GROUP_SIZE, device)


def _by_group(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` over the last dimension of the groups of [R, V]: [R, G]. The last group may be a shorter one."""
    even = x.shape[1] // GROUP_SIZE * GROUP_SIZE
    parts = [reduce(x[:, :even].view(len(x), -1, GROUP_SIZE))] if even else []
    if even < x.shape[1]:
        parts.append(reduce(x[:, None, even:]))
    return torch.cat(parts, dim=1)


def _members(scores: Tensor, group: Tensor) -> Tensor:
    """The scores [R, 64] of each row's `group` [R, 1]; -inf beyond the last token."""
    token_ids = group * GROUP_SIZE + torch.arange(GROUP_SIZE, device=scores.device)
    last = scores.shape[1] - 1
    return scores.gather(1, token_ids.clamp(max=last)).masked_fill(token_ids > last, -torch.inf)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, which wraps around like uint64."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
