"""The kernel that finds what top-k, top-p and min-p keep of a row: `engine.warpers`, without sorting.

They keep the best tokens: all above a threshold and, of those that equal it, all or (top-p) those with the lowest ids.
The threshold is searched for among integer keys that are ordered like the scores, some pivots at a time, by counting
tokens (top-k) or adding up their weights (top-p): exact, however scores lie, in at most 14 rounds for fp32 and 7 for
16-bit logits. So that a round need not read the whole row, the tokens that can matter are first put together: with
top-k those not below the k-th best of the groups' best; with top-p those that are not so unlikely that all of them
together would not be missed.

Weights are fp32 exponentials, added up in fp64 from partial sums in fp32: which tokens top-p keeps differs from the
CPU's only where the rounding of some 1e-7 of the sum decides whether the last one stays.
"""

import triton
import triton.language as tl

from gptj_serve.kernels.gpu.draw_kernels import UNSPECIALIZED, finite_scores, ordered_keys
from gptj_serve.kernels.gpu.sampling_parameters import Field

_TOP_K, _TEMPERATURE = tl.constexpr(int(Field.TOP_K)), tl.constexpr(int(Field.TEMPERATURE))
_TOP_P, _LOG_MIN_P = tl.constexpr(int(Field.TOP_P)), tl.constexpr(int(Field.LOG_MIN_P))
_KEY_OF_IMPOSSIBLE = tl.constexpr(-0x7F800000)  # -inf
_SIGN = tl.constexpr(-0x80000000)
_LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)
_SLACK = tl.constexpr(1e-3)  # in nats; far more than rounding can amount to


@triton.jit
def _weights(keys, peak, coldness, SHIFT: tl.constexpr):
    """exp of the scores with these keys, relative to the peak, over the temperature."""
    bits = keys << SHIFT
    scores = tl.where(bits < 0, (-bits) | _SIGN, bits).to(tl.float32, bitcast=True)
    return tl.exp((scores - peak) * coldness)


@triton.jit
def _highest_key_reaching(
    share, keys, num_keys, lowest, highest, total, peak, coldness,
    BY_WEIGHT: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr, NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    """The highest in [lowest, highest] for which the keys from it on are `share` of `total`, by count or weight; if
    there is none, `lowest`."""
    low = lowest.to(tl.int64)
    end = highest.to(tl.int64) + 1
    nth = tl.arange(0, NUM_PIVOTS) + 1
    while end - low > 1:
        step = tl.maximum((end - low) // (NUM_PIVOTS + 1), 1)
        pivots = low + nth * step
        reached = tl.zeros([NUM_PIVOTS], tl.float64)
        for start in range(0, num_keys, TILE):
            at = start + tl.arange(0, TILE)
            is_key = at < num_keys
            key = tl.load(keys + at, mask=is_key, other=_KEY_OF_IMPOSSIBLE >> SHIFT)
            amounts = tl.where(is_key, 1.0, 0.0)
            if BY_WEIGHT:
                amounts *= _weights(key, peak, coldness, SHIFT)
            is_from_pivot = key[None, :] >= pivots.to(tl.int32)[:, None]
            reached += tl.sum(tl.where(is_from_pivot, amounts[None, :], 0.0), 1).to(tl.float64)
        num_reaching = tl.sum(((reached / total >= share) & (pivots < end)).to(tl.int32), 0).to(tl.int64)
        low += num_reaching * step
        end = tl.where(num_reaching < NUM_PIVOTS, tl.minimum(end, low + step), end)
    return low.to(tl.int32)


@triton.jit
def _put_together(logits, width, num_tokens, lowest, candidates, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """The keys of the row's tokens from `lowest` on, in the order of ids; how many there are."""
    num_candidates = 0
    for start in range(0, num_tokens, TILE):
        at = start + tl.arange(0, TILE)
        keys = ordered_keys(finite_scores(logits, at, width, num_tokens), SHIFT)
        is_candidate = ((keys >= lowest) & (at < num_tokens)).to(tl.int32)
        places = num_candidates + tl.cumsum(is_candidate, 0) - 1
        tl.store(candidates + places, keys, mask=is_candidate > 0)
        num_candidates += tl.sum(is_candidate, 0)
    tl.debug_barrier()  # other threads of the program read what was written
    return num_candidates


@triton.jit
def _weight_from(keys, num_keys, key, peak, coldness, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """The sum of the weights of keys from `key` on, and how many equal it."""
    weight = tl.full((), 0.0, tl.float64)
    num_equal = 0
    for start in range(0, num_keys, TILE):
        at = start + tl.arange(0, TILE)
        is_key = at < num_keys
        own = tl.load(keys + at, mask=is_key, other=_KEY_OF_IMPOSSIBLE >> SHIFT)
        weights = tl.where(is_key & (own >= key), _weights(own, peak, coldness, SHIFT), 0.0)
        weight += tl.sum(weights, 0).to(tl.float64)
        num_equal += tl.sum((is_key & (own == key)).to(tl.int32), 0)
    return weight, num_equal


@triton.jit
def _id_of_nth(logits, width, num_tokens, key, n, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """The id of the n-th token, from 1, with this key."""
    token_id = 0
    num_seen = 0
    for start in range(0, num_tokens, TILE):
        at = start + tl.arange(0, TILE)
        is_equal = (ordered_keys(finite_scores(logits, at, width, num_tokens), SHIFT) == key) & (at < num_tokens)
        ranks = num_seen + tl.cumsum(is_equal.to(tl.int32), 0)
        token_id += tl.sum(tl.where(is_equal & (ranks == n), at, 0), 0)
        num_seen += tl.sum(is_equal.to(tl.int32), 0)
    return token_id


@triton.jit(do_not_specialize=UNSPECIALIZED)
def narrow(
    logits, stride, width, num_tokens, numbers, reals, num_rows, peaks, warm_sums, maxima, num_groups, num_chunks,
    candidates, thresholds, last_tied_ids,
    PADDED_CHUNKS: tl.constexpr, SHIFT: tl.constexpr, ROW_TILE: tl.constexpr, TILE: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    """Each row's threshold, as a key, and the last id that stays of those that equal it [R]. Grid (R,).

    `maxima` [R, G] are the groups' best keys; `candidates` [R, V] is room to work in."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    candidates += row.to(tl.int64) * num_tokens
    maxima += row * num_groups
    top_k = tl.load(numbers + _TOP_K * num_rows + row).to(tl.int32)
    temperature = tl.load(reals + _TEMPERATURE * num_rows + row)
    top_p = tl.load(reals + _TOP_P * num_rows + row)
    log_min_p = tl.load(reals + _LOG_MIN_P * num_rows + row)
    chunks = tl.arange(0, PADDED_CHUNKS)
    exists = chunks < num_chunks
    chunk_peaks = tl.load(peaks + row * num_chunks + chunks, mask=exists, other=float("-inf"))
    peak = tl.max(chunk_peaks, 0)
    threshold = _KEY_OF_IMPOSSIBLE >> SHIFT
    last_tied_id = num_tokens
    is_drawn = (temperature > 0) & (peak > float("-inf"))
    has_top_k = (top_k > 0) & (top_k < num_tokens)
    if is_drawn & (has_top_k | (top_p < 1)):
        coldness = (1.0 / temperature).to(tl.float32)
        wide_peak = peak.to(tl.float64)
        highest = ordered_keys(peak, SHIFT)
        chunk_sums = tl.load(warm_sums + row * num_chunks + chunks, mask=exists, other=0.0).to(tl.float64)
        total = tl.sum(chunk_sums * tl.exp((chunk_peaks - peak) * coldness).to(tl.float64), 0)
        lowest = threshold
        if has_top_k:
            if top_k <= num_groups:
                lowest = _highest_key_reaching(
                    top_k.to(tl.float64), maxima, num_groups, threshold, highest, 1.0, peak, coldness,
                    False, SHIFT, TILE, NUM_PIVOTS,
                )  # fmt: skip
        else:
            # All tokens below this together weigh less than what top-p leaves out.
            spare = tl.maximum(1.0 - top_p, 1e-300) * total / num_tokens
            bound = wide_peak + (tl.log(spare) - _SLACK) * temperature
            lowest = ordered_keys(tl.maximum(bound, _LOWEST_SCORE).to(tl.float32), SHIFT) - 1
        num_candidates = _put_together(logits, width, num_tokens, lowest, candidates, SHIFT, ROW_TILE)
        threshold = lowest
        if has_top_k:
            threshold = _highest_key_reaching(
                top_k.to(tl.float64), candidates, num_candidates, lowest, highest, 1.0, peak, coldness,
                False, SHIFT, TILE, NUM_PIVOTS,
            )  # fmt: skip
            total, _ = _weight_from(candidates, num_candidates, threshold, peak, coldness, SHIFT, TILE)
        if top_p < 1:
            threshold = _highest_key_reaching(
                top_p, candidates, num_candidates, threshold, highest, total, peak, coldness,
                True, SHIFT, TILE, NUM_PIVOTS,
            )  # fmt: skip
            better, _ = _weight_from(candidates, num_candidates, threshold + 1, peak, coldness, SHIFT, TILE)
            _, num_tied = _weight_from(candidates, num_candidates, threshold, peak, coldness, SHIFT, TILE)
            # Tied tokens stay as long as what is before them has not reached top-p.
            weight = _weights(threshold, peak, coldness, SHIFT).to(tl.float64)
            if weight > 0:
                about = tl.minimum(tl.maximum((top_p * total - better) / weight, 1.0), num_tied.to(tl.float64))
                first = about.to(tl.int32) - 1
                is_before = (better + (first + tl.arange(0, 4)) * weight) / total < top_p
                num_staying = tl.maximum(first + tl.sum(is_before.to(tl.int32), 0), 1)
                if num_staying < num_tied:
                    last_tied_id = _id_of_nth(logits, width, num_tokens, threshold, num_staying, SHIFT, ROW_TILE)
    if is_drawn & (log_min_p > float("-inf")):
        bound = tl.maximum(peak.to(tl.float64) + log_min_p * temperature, _LOWEST_SCORE)
        rounded = bound.to(tl.float32)
        full_key = ordered_keys(rounded, 0) + tl.where(rounded.to(tl.float64) < bound, 1, 0)
        key = (full_key + ((1 << SHIFT) - 1)) >> SHIFT
        last_tied_id = tl.where(key > threshold, num_tokens, last_tied_id)
        threshold = tl.maximum(threshold, key)
    tl.store(thresholds + row, threshold)
    tl.store(last_tied_ids + row, last_tied_id)
