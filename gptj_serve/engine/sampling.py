"""The sampler: from logits to tokens, with noise that depends on nothing but (seed, position).

Processors and their order are transformers' (`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`).
Shapes: `R` rows, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_serve.types import RowFailure, RowResult, SampledToken, SamplingParams

_NOISE_GROUP = 64  # tokens per group in the two-level draw

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], suppressed: Sequence[Sequence[int]]
) -> list[RowResult]:
    """Choose one token per row of `logits` [R, V].

    `positions` are those that the new tokens take, `suppressed` the ids that a row may not choose now. A row with
    a NaN or +inf logit fails alone. Log-probabilities are those of the raw logits, before any processor.
    """
    logits = logits.float()
    log_normalizer = logits.logsumexp(dim=-1)  # [R]
    sound = log_normalizer.isfinite().tolist()
    scores = logits
    if any(suppressed):
        scores = logits.clone()
        for row, ids in enumerate(suppressed):
            scores[row, [token_id for token_id in ids if token_id < logits.shape[-1]]] = -torch.inf
    chosen = scores.argmax(dim=-1)  # [R]
    drawn = [row for row, p in enumerate(params) if p.temperature > 0 and sound[row]]
    if drawn:
        chosen[drawn] = _draw(scores[drawn], [params[row] for row in drawn], [positions[row] for row in drawn])
    logprobs = logits.gather(-1, chosen[:, None]).squeeze(-1) - log_normalizer
    return [
        SampledToken(token_id, logprob) if ok else RowFailure("the model's logits hold NaN or infinity")
        for ok, token_id, logprob in zip(sound, chosen.tolist(), logprobs.tolist(), strict=True)
    ]


def _draw(scores: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Temperature, top-k, top-p, then a draw: scores [R, V] → token ids [R]."""
    device = scores.device
    # In fp64, and with the highest score at 0, no temperature above 0 overflows to a NaN.
    scores = scores.double() - scores.max(dim=-1, keepdim=True).values
    scores = scores / torch.tensor([p.temperature for p in params], device=device, dtype=torch.float64)[:, None]
    vocab_size = scores.shape[-1]
    if any(0 < p.top_k < vocab_size or p.top_p < 1 for p in params):
        ranked, order = scores.sort(dim=-1, descending=True)
        top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], device=device)
        threshold = ranked.gather(-1, top_k[:, None] - 1)
        ranked = ranked.masked_fill(ranked < threshold, -torch.inf)  # ties with the k-th stay, as in transformers
        top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
        probabilities = ranked.softmax(dim=-1)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        outside = (mass_before >= top_p) & (top_p < 1)
        outside[:, 0] = False
        scores = torch.full_like(scores, -torch.inf).scatter(-1, order, ranked.masked_fill(outside, -torch.inf))
    return gumbel_argmax(scores, [p.seed for p in params], positions)


def gumbel_argmax(scores: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Draw from softmax(scores [R, V]) by the Gumbel-max trick: the argmax of scores plus Gumbel noise.

    It is used because a rounding difference of size e in the scores (another batch, another split) changes the draw
    with probability of order e; inverting a cumulative sum over V terms is far more fragile. Two levels, a group of
    tokens and then a token of it, draw from the same distribution with V/64 + 64 noises instead of V.
    """
    num_rows, vocab_size = scores.shape
    num_groups = -(-vocab_size // _NOISE_GROUP)
    padding = num_groups * _NOISE_GROUP - vocab_size
    grouped = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf).view(num_rows, num_groups, _NOISE_GROUP)
    noise = gumbel_noise(seeds, positions, num_groups + _NOISE_GROUP).to(scores.device)
    group = (grouped.logsumexp(dim=-1) + noise[:, :num_groups]).argmax(dim=-1)  # [R]
    rows = torch.arange(num_rows, device=scores.device)
    member = (grouped[rows, group] + noise[:, num_groups:]).argmax(dim=-1)
    return group * _NOISE_GROUP + member


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], count: int) -> Tensor:
    """Standard Gumbel noise [R, count] in fp64: SplitMix64 (Steele et al., 2014) keyed by (seed, position)."""
    key = _mix(_mix(torch.tensor(seeds, dtype=torch.int64)) + torch.tensor(positions, dtype=torch.int64) * _GOLDEN)
    bits = _mix(key[:, None] + torch.arange(1, count + 1) * _GOLDEN)
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1)
    return -(-uniform.log()).log()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, which wraps around like uint64."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
