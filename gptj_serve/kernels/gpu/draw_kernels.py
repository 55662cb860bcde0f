"""The kernels that choose tokens from logits: `engine.draws`, row by row on a GPU.

A row is read in chunks of whole groups, one program each, so that a few rows busy many multiprocessors. `measure` finds
each chunk's best token and its part of the normaliser; `weigh` needs the row's best score from them, and finds the
best perturbed group of each chunk; `choose` takes the best chunk, and the group's best member. Between the first two,
`narrowing_kernel` finds the tokens that top-k, top-p and min-p keep: those above a threshold, and of those that equal
it the ones up to a certain id. How a row is cut does not depend on the other rows, so neither does any bit of what
comes of it.

Where bits differ from the CPU's: a group's weight is a sum of fp32 exponentials, here the GPU's own (and rounded in
another order), where `draws.draw` has fp32 ones too and `draws.draw_ranked` fp64 ones. An error of 0.001 in each weight
changed 23 of 75,000 draws, so one of a millionth changes one in some millions. Noise, the logarithms of weights and the
choice in the group are in fp64 as there: a thousand numbers of a row, so that GPUs with few fp64 units keep up.

Shapes: `R` rows, `V` tokens, `C` chunks of a row, `G` groups of 64 tokens.
"""

import triton
import triton.language as tl

from gptj_serve.engine.draws import GROUP_SIZE
from gptj_serve.kernels.gpu.sampling_parameters import Field

OK, NOT_FINITE, NOTHING_POSSIBLE = 0, 1, 2
"""What `choose` says of a row: there is NaN or positive infinity in it, or nothing but negative infinity."""

_OK, _NOT_FINITE, _NOTHING_POSSIBLE = tl.constexpr(OK), tl.constexpr(NOT_FINITE), tl.constexpr(NOTHING_POSSIBLE)
_GROUP_SIZE = tl.constexpr(GROUP_SIZE)
_SEED, _POSITION = tl.constexpr(int(Field.SEED)), tl.constexpr(int(Field.POSITION))
_TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))
_BEYOND = tl.constexpr(2**31 - 1)  # no token, no group

UNSPECIALIZED = ["num_tokens", "num_rows", "num_groups", "num_chunks"]
"""Arguments for whose values, 1 or multiples of 16, no kernels of their own are worth being compiled."""

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def finite_scores(logits, token_ids, width, num_tokens):
    """Scores of one row in fp32: -inf for what is not finite, and for ids without a token.

    The load is masked by the row's whole width, which is a multiple of 16 where `num_tokens` is not: only so are
    several numbers loaded at once.
    """
    raw = tl.load(logits + token_ids, mask=token_ids < width, other=float("-inf")).to(tl.float32)
    return tl.where((raw < float("inf")) & (token_ids < num_tokens), raw, float("-inf"))


@triton.jit
def ordered_keys(scores, SHIFT: tl.constexpr):
    """int32 in the order of fp32 scores, equal ones for equal scores (0 and -0 too). `SHIFT` low bits, which are 0 in
    all numbers of a narrower type, are left away."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits) >> SHIFT


@triton.jit
def is_kept(scores, token_ids, threshold, last_tied_id, SHIFT: tl.constexpr):
    keys = ordered_keys(scores, SHIFT)
    return (keys > threshold) | ((keys == threshold) & (token_ids <= last_tied_id))


@triton.jit
def row_peak(peaks, row, num_chunks, PADDED_CHUNKS: tl.constexpr):
    """The row's best score, from its chunks' [R, C]."""
    chunks = tl.arange(0, PADDED_CHUNKS)
    return tl.max(tl.load(peaks + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf")), 0)


@triton.jit
def _mix(x):
    """SplitMix64's finalizer on uint64."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _noise(numbers, row, num_rows, places):
    """Standard Gumbel noise at `places` of the row's stream: `draws.gumbel_noise`."""
    seed = tl.load(numbers + _SEED * num_rows + row).to(tl.uint64)
    position = tl.load(numbers + _POSITION * num_rows + row).to(tl.uint64)
    key = _mix(_mix(seed) + position * _GOLDEN)
    bits = _mix(key + (places + 1).to(tl.uint64) * _GOLDEN)
    uniform = ((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def measure(
    logits, stride, width, num_tokens, reals, num_rows, peaks, best_ids, sums, warm_sums, maxima, num_groups,
    CHUNK_GROUPS: tl.constexpr, SHIFT: tl.constexpr, NARROWS: tl.constexpr,
):  # fmt: skip
    """Of each chunk [R, C]: best score, its lowest id (-1 if a score is not finite), sum of exp relative to the best;
    if a row is narrowed also that sum at its temperature, and each group's best key [R, G]. Grid (R, C)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    groups = chunk * CHUNK_GROUPS + tl.arange(0, CHUNK_GROUPS)
    token_ids = groups[:, None] * _GROUP_SIZE + tl.arange(0, _GROUP_SIZE)[None, :]
    raw = tl.load(logits + row.to(tl.int64) * stride + token_ids, mask=token_ids < width, other=0.0).to(tl.float32)
    is_token = token_ids < num_tokens
    is_sound = raw < float("inf")  # NaN is not
    scores = tl.where(is_sound & is_token, raw, float("-inf"))
    group_peaks = tl.max(scores, 1)
    peak = tl.max(group_peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    best_id = tl.min(tl.min(tl.where((scores == peak) & is_token, token_ids, _BEYOND), 1), 0)
    num_unsound = tl.sum(tl.sum((is_token & (is_sound == 0)).to(tl.int32), 1), 0)
    place = row * tl.num_programs(1) + chunk
    tl.store(peaks + place, peak)
    tl.store(best_ids + place, tl.where(num_unsound > 0, -1, best_id))
    tl.store(sums + place, tl.sum(tl.sum(tl.exp(scores - base), 1), 0))
    if NARROWS:
        temperature = tl.load(reals + _TEMPERATURE * num_rows + row)
        coldness = (1.0 / tl.where(temperature > 0, temperature, 1.0)).to(tl.float32)
        tl.store(warm_sums + place, tl.sum(tl.sum(tl.exp((scores - base) * coldness), 1), 0))
        tl.store(maxima + row * num_groups + groups, ordered_keys(group_peaks, SHIFT), mask=groups < num_groups)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weigh(
    logits, stride, width, num_tokens, numbers, reals, num_rows, peaks, thresholds, last_tied_ids, values, best_groups,
    num_groups, CHUNK_GROUPS: tl.constexpr, PADDED_CHUNKS: tl.constexpr, SHIFT: tl.constexpr, NARROWS: tl.constexpr,
):  # fmt: skip
    """Of each chunk of a drawn row [R, C]: the best of its groups by perturbed weight, and that value. Grid (R, C)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    num_chunks = tl.num_programs(1)
    temperature = tl.load(reals + _TEMPERATURE * num_rows + row)
    peak = row_peak(peaks, row, num_chunks, PADDED_CHUNKS)
    if (temperature > 0) & (peak > float("-inf")):
        groups = chunk * CHUNK_GROUPS + tl.arange(0, CHUNK_GROUPS)
        token_ids = groups[:, None] * _GROUP_SIZE + tl.arange(0, _GROUP_SIZE)[None, :]
        scores = finite_scores(logits + row.to(tl.int64) * stride, token_ids, width, num_tokens)
        weights = tl.exp((scores - peak) * (1.0 / temperature).to(tl.float32))
        if NARROWS:
            kept = is_kept(scores, token_ids, tl.load(thresholds + row), tl.load(last_tied_ids + row), SHIFT)
            weights = tl.where(kept, weights, 0.0)
        sums = tl.sum(weights, 1).to(tl.float64)
        is_possible = sums > 0
        perturbed = tl.log(tl.where(is_possible, sums, 1.0)) + _noise(numbers, row, num_rows, groups)
        perturbed = tl.where(is_possible, perturbed, float("-inf"))
        value = tl.max(perturbed, 0)
        place = row * num_chunks + chunk
        tl.store(values + place, value)
        tl.store(best_groups + place, tl.min(tl.where(perturbed == value, groups, _BEYOND), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def choose(
    logits, stride, width, num_tokens, numbers, reals, num_rows, peaks, best_ids, sums, thresholds, last_tied_ids,
    values, best_groups, num_groups, num_chunks, sampled, normalizers,
    PADDED_CHUNKS: tl.constexpr, SHIFT: tl.constexpr, DRAWS: tl.constexpr, NARROWS: tl.constexpr,
):  # fmt: skip
    """Each row's token, the bits of its log-probability among all tokens, and its status [3, R]; the logarithm of its
    sum of exp [R]. Grid (R,)."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    chunks = tl.arange(0, PADDED_CHUNKS)
    places, exists = row * num_chunks + chunks, chunks < num_chunks
    chunk_peaks = tl.load(peaks + places, mask=exists, other=float("-inf"))
    chunk_ids = tl.load(best_ids + places, mask=exists, other=0)
    chunk_sums = tl.load(sums + places, mask=exists, other=0.0)
    peak = tl.max(chunk_peaks, 0)
    status = tl.where(peak == float("-inf"), _NOTHING_POSSIBLE, _OK)
    status = tl.where(tl.min(chunk_ids, 0) < 0, _NOT_FINITE, status)
    is_sound = status == _OK
    base = tl.where(is_sound, peak, 0.0)
    total = tl.sum(chunk_sums.to(tl.float64) * tl.exp(tl.where(is_sound, chunk_peaks - base, 0.0).to(tl.float64)), 0)
    normalizer = base.to(tl.float64) + tl.log(tl.where(is_sound, total, 1.0))
    token_id = tl.min(tl.where(chunk_peaks == peak, chunk_ids, _BEYOND), 0)
    if DRAWS:
        temperature = tl.load(reals + _TEMPERATURE * num_rows + row)
        if is_sound & (temperature > 0):
            chunk_values = tl.load(values + places, mask=exists, other=float("-inf"))
            chunk_groups = tl.load(best_groups + places, mask=exists, other=_BEYOND)
            group = tl.min(tl.where(chunk_values == tl.max(chunk_values, 0), chunk_groups, _BEYOND), 0)
            members = tl.arange(0, _GROUP_SIZE)
            member_ids = group * _GROUP_SIZE + members
            scores = finite_scores(logits, member_ids, width, num_tokens)
            perturbed = (scores.to(tl.float64) - peak.to(tl.float64)) / temperature
            perturbed += _noise(numbers, row, num_rows, num_groups + members)
            if NARROWS:
                kept = is_kept(scores, member_ids, tl.load(thresholds + row), tl.load(last_tied_ids + row), SHIFT)
                perturbed = tl.where(kept, perturbed, float("-inf"))
            token_id = tl.min(tl.where(perturbed == tl.max(perturbed, 0), member_ids, _BEYOND), 0)
    token_id = tl.where(is_sound, token_id, 0)
    score = finite_scores(logits, token_id, width, num_tokens)
    logprob = tl.where(is_sound, score.to(tl.float64) - normalizer, 0.0).to(tl.float32)
    tl.store(sampled + row, token_id)
    tl.store(sampled + num_rows + row, logprob.to(tl.int32, bitcast=True))
    tl.store(sampled + 2 * num_rows + row, status)
    tl.store(normalizers + row, normalizer.to(tl.float32))
