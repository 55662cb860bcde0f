// The layers of a stage on a CPU with AVX-512: compiled when first needed, called through ctypes (cpu_library.py).
//
// What comes of a token depends on its sequence alone, bit for bit: every sum goes over its terms in the same order
// whatever else is in the microbatch, however a prompt was cut, and on however many threads. So an output of a
// product has one accumulator, and a query's softmax goes over its context from the first token to the last.
//
// Numbers are fp32 between operations. Operands of products are fp32, bf16 or int8; keys and values fp32 or bf16.
//
// A weight [N, K] lies in panels of 32 outputs, and in these in units of 4 bytes: [N/32][K/e][32][e], where e is 1
// element in fp32, 2 in bf16, 4 in int8, and K/e a multiple of 4. So one loop serves all three: a unit of a row times 32
// units of a panel.
// Keys lie as [block][H][Dh][16], so that a vector holds 16 tokens; values as [block][H][16][Dh].

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {

constexpr int PANEL = 32;  // outputs of a weight that are computed together
constexpr int MAX_ROWS = 12;  // of tokens, in one product with a panel: 24 sums, and the rest of 32 registers for operands
constexpr int STEP = 4;  // units that a product goes forward at a time: operands are padded to as many, with zeros
constexpr int BLOCK = 16;  // tokens of a KV block
constexpr int MAX_QUERIES = 16;  // of one row that attend together
constexpr int MAX_PARTS = 1024;  // of a loop that threads share
constexpr int FEW_TOKENS = 8;  // for so few, each thread makes all operands for itself, and need not wait for others

enum Type : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };
enum Activation : int32_t { GELU_TANH = 0, RELU = 1, SILU = 2, QUICK_GELU = 3 };

inline int elements(Type type) { return type == F32 ? 1 : type == BF16 ? 2 : 4; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t pad(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }
inline int64_t units_of(int64_t width, Type type) { return pad(ceil_div(width, elements(type)), STEP); }

// ------------------------------------------------------------------------------------------------ memory

struct Buffer {
    char* data = nullptr;
    size_t size = 0;

    template <class T>
    T* get(size_t count) {
        size_t wanted = pad(count * sizeof(T), 64);
        if (wanted > size) {
            std::free(data);
            data = static_cast<char*>(std::aligned_alloc(64, wanted));
            size = data ? wanted : 0;
            if (!data) std::abort();
        }
        return reinterpret_cast<T*>(data);
    }
    ~Buffer() { std::free(data); }
};

// ------------------------------------------------------------------------------------------------ loops over threads

// Calls `work(i)` for 0 <= i < count on the threads of a team, which then meet. They take what comes next, in parts that
// get smaller towards the end: so all end at one time, also where other processes hold some of them up; memory is read
// in long runs; and they seldom touch the common counter, for which the cores wait as long as for a panel.
template <class Work>
inline void share(int64_t count, int num_threads, Work work) {
    int64_t begins[MAX_PARTS];
    int64_t num_parts = 0;
    for (int64_t begin = 0; begin < count; num_parts++) {
        begins[num_parts] = begin;
        begin += std::max(ceil_div(count, MAX_PARTS), (count - begin) / (3 * num_threads));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < num_parts; part++) {
        const int64_t end = part + 1 < num_parts ? begins[part + 1] : count;
        for (int64_t i = begins[part]; i < end; i++) work(i);
    }
}

// ------------------------------------------------------------------------------------------------ single vectors

inline __m512 load_bf16(const uint16_t* p) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// To nearest, ties to even; NaN stays NaN.
inline __m256i to_bf16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}

inline uint16_t to_bf16(float x) {
    if (x != x) return 0x7fc0;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline __mmask16 first(int n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

// Within 2 ulp. NaN stays NaN: max and min return their second operand then.
inline __m512 exp(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.f), _mm512_min_ps(_mm512_set1_ps(89.f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
    return _mm512_scalef_ps(p, n);
}

// x times the logistic function of z.
inline __m512 gated(__m512 x, __m512 z) {
    __m512 one = _mm512_set1_ps(1.f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), z))));
}

// 0.5 * (1 + tanh(u)) is the logistic function of 2u, which loses nothing where tanh is near -1.
template <Activation activation>
inline __m512 activate(__m512 x) {
    if constexpr (activation == GELU_TANH) {
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        return gated(x, _mm512_mul_ps(u, _mm512_set1_ps(2 * 0.7978845608028654f)));
    } else if constexpr (activation == RELU) {
        return _mm512_max_ps(_mm512_setzero_ps(), x);
    } else if constexpr (activation == SILU) {
        return gated(x, x);
    } else {
        return gated(x, _mm512_mul_ps(x, _mm512_set1_ps(1.702f)));
    }
}

inline __m512 activate(__m512 x, Activation activation) {
    switch (activation) {
        case GELU_TANH: return activate<GELU_TANH>(x);
        case RELU: return activate<RELU>(x);
        case SILU: return activate<SILU>(x);
        default: return activate<QUICK_GELU>(x);
    }
}

// ------------------------------------------------------------------------------------------------ rows of operands

// Rows of operands for products, in a weight's type: `stride` units of 4 bytes from one to the next.
struct Operand {
    Type type = F32;
    uint32_t* units = nullptr;
    int64_t stride = 0;
    float* scale = nullptr;  // int8: x = scale * (u8 - zero)
    int32_t* zero = nullptr;

    Operand from(int64_t row) const { return {type, units + row * stride, stride, scale + row, zero + row}; }
};

struct OperandBuffer {
    Buffer units, scale, zero;

    // A stride that is no power of two keeps the rows of a product apart in the first cache.
    Operand get(Type type, int64_t num_rows, int64_t width) {
        Operand operand;
        operand.type = type;
        operand.stride = pad(ceil_div(width, elements(type)), 16) + 16;
        operand.units = units.get<uint32_t>(num_rows * operand.stride);
        operand.scale = scale.get<float>(num_rows);
        operand.zero = zero.get<int32_t>(num_rows);
        return operand;
    }
};

// To u8 with a scale and a zero of the row's own, which holds 0 exactly. What isn't finite makes the row NaN.
void quantize(const float* x, int64_t width, Operand to, int64_t row) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    __mmask16 is_bad = 0;
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(first(width - i), x + i);
        is_bad |= _mm512_fpclass_ps_mask(v, 0x99);  // NaN, infinities
        low = _mm512_min_ps(low, v);
        high = _mm512_max_ps(high, v);
    }
    float min = _mm512_reduce_min_ps(low), max = _mm512_reduce_max_ps(high);
    float scale = is_bad ? NAN : (max - min) / 255.f;
    float inverse = scale >= FLT_MIN && scale <= FLT_MAX ? 1.f / scale : 0.f;  // of a subnormal one it is infinite
    int32_t zero = inverse > 0 ? static_cast<int32_t>(std::nearbyint(-min * inverse)) : 0;
    to.scale[row] = scale;
    to.zero[row] = zero;
    auto* bytes = reinterpret_cast<uint8_t*>(to.units + row * to.stride);
    for (int64_t i = 0; i < to.stride * 4; i += 16) {
        __m512 v = i < width ? _mm512_maskz_loadu_ps(first(width - i), x + i) : _mm512_setzero_ps();
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
        q = _mm512_add_epi32(q, _mm512_set1_epi32(zero));
        q = _mm512_max_epi32(_mm512_setzero_si512(), _mm512_min_epi32(_mm512_set1_epi32(255), q));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(q));
    }
}

void to_operand(const float* x, int64_t width, Operand to, int64_t row) {
    if (to.type == INT8) return quantize(x, width, to, row);
    if (to.type == F32) {
        auto* out = reinterpret_cast<float*>(to.units + row * to.stride);
        std::memcpy(out, x, width * sizeof(float));
        std::memset(out + width, 0, (to.stride - width) * sizeof(float));
        return;
    }
    auto* out = reinterpret_cast<uint16_t*>(to.units + row * to.stride);
    for (int64_t i = 0; i < to.stride * 2; i += 16) {
        __m512 v = i < width ? _mm512_maskz_loadu_ps(first(width - i), x + i) : _mm512_setzero_ps();
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_bf16(v));
    }
}

// ------------------------------------------------------------------------------------------------ products

struct Weight {
    Type type;
    int32_t num_outputs;  // padded to whole panels
    int32_t width;
    const uint32_t* panels;
    const float* scale;  // int8: of each output
    const int32_t* sum;  // int8: of each output's weights
    const float* bias;  // padded, or null
};

template <Type type>
struct Accumulator {
    using Vector = __m512;
    static Vector zero() { return _mm512_setzero_ps(); }
};

template <>
struct Accumulator<INT8> {
    using Vector = __m512i;
    static Vector zero() { return _mm512_setzero_si512(); }
};

template <Type type>
inline typename Accumulator<type>::Vector accumulate(
    typename Accumulator<type>::Vector sum, __m512i row, __m512i panel
) {
    if constexpr (type == F32) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(panel), sum);
    } else if constexpr (type == INT8) {
#ifdef __AVX512VNNI__
        return _mm512_dpbusd_epi32(sum, row, panel);
#else
        return sum;  // never called: cpu_library.py refuses
#endif
    } else {
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)panel);
#else
        __m512i odd = _mm512_set1_epi32(0xffff0000);
        sum = _mm512_fmadd_ps(
            _mm512_castsi512_ps(_mm512_and_si512(row, odd)), _mm512_castsi512_ps(_mm512_and_si512(panel, odd)), sum
        );
        return _mm512_fmadd_ps(
            _mm512_castsi512_ps(_mm512_slli_epi32(row, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(panel, 16)), sum
        );
#endif
    }
}

// ROWS rows of the operand from `row` times one panel, into tile[ROWS][32]. Many rows keep a core busy while the memory
// has nothing to do: meanwhile half a panel is fetched from `ahead`.
template <Type type, int ROWS>
void multiply(const Weight& weight, int64_t panel, const Operand& x, int64_t row, float* tile, const char* ahead) {
    using Acc = Accumulator<type>;
    const int64_t num_units = units_of(weight.width, type);
    const uint32_t* b = weight.panels + panel * num_units * PANEL;
    const int64_t stride = x.stride;
    constexpr int NUM_BASES = (ROWS + 2) / 3;  // a processor adds once and twice the stride for nothing
    const uint32_t* a[NUM_BASES];
#pragma GCC unroll 16
    for (int i = 0; i < NUM_BASES; i++) a[i] = x.units + (row + 3 * i) * stride;
    typename Acc::Vector sum[ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) sum[m][0] = sum[m][1] = Acc::zero();
    for (int64_t k = 0; k < num_units; k += STEP) {
        if constexpr (ROWS > MAX_ROWS / 2) {
#pragma GCC unroll 4
            for (int j = 0; j < STEP; j++) _mm_prefetch(ahead + j * 64, _MM_HINT_T1);
            ahead += STEP * 64;
        }
#pragma GCC unroll 4
        for (int j = 0; j < STEP; j++) {
            __m512i b0 = _mm512_loadu_si512(b + j * PANEL), b1 = _mm512_loadu_si512(b + j * PANEL + 16);
#pragma GCC unroll 16
            for (int m = 0; m < ROWS; m++) {
                __m512i unit = _mm512_set1_epi32(a[m / 3][m % 3 * stride + j]);
                sum[m][0] = accumulate<type>(sum[m][0], unit, b0);
                sum[m][1] = accumulate<type>(sum[m][1], unit, b1);
            }
        }
        b += STEP * PANEL;
#pragma GCC unroll 16
        for (int i = 0; i < NUM_BASES; i++) a[i] += STEP;
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            float* out = tile + m * PANEL + half * 16;
            if constexpr (type == INT8) {
                int64_t column = panel * PANEL + half * 16;
                __m512i zeros = _mm512_mullo_epi32(
                    _mm512_set1_epi32(x.zero[row + m]), _mm512_loadu_si512(weight.sum + column)
                );
                __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[m][half], zeros));
                value = _mm512_mul_ps(value, _mm512_loadu_ps(weight.scale + column));
                _mm512_storeu_ps(out, _mm512_mul_ps(value, _mm512_set1_ps(x.scale[row + m])));
            } else {
                _mm512_storeu_ps(out, sum[m][half]);
            }
        }
    }
}

using Multiply = void (*)(const Weight&, int64_t, const Operand&, int64_t, float*, const char*);

template <Type type>
Multiply multiplier(int num_rows) {
    static constexpr Multiply table[MAX_ROWS] = {
        multiply<type, 1>, multiply<type, 2>, multiply<type, 3>, multiply<type, 4>, multiply<type, 5>, multiply<type, 6>,
        multiply<type, 7>, multiply<type, 8>, multiply<type, 9>, multiply<type, 10>, multiply<type, 11>,
        multiply<type, 12>,
    };
    return table[num_rows - 1];
}

// All rows times one panel; `take(row, values)` gets each row's 32 outputs.
template <class Take>
inline void product(const Weight& weight, int64_t panel, const Operand& x, int64_t num_rows, Take take) {
    alignas(64) float tile[MAX_ROWS * PANEL];
    const int64_t num_parts = ceil_div(num_rows, MAX_ROWS);
    const int64_t panel_bytes = units_of(weight.width, weight.type) * PANEL * 4;
    const char* own = reinterpret_cast<const char*>(weight.panels) + panel * panel_bytes;
    for (int64_t part = 0; part < num_parts; part++) {
        int64_t row = num_rows * part / num_parts;
        int count = static_cast<int>(num_rows * (part + 1) / num_parts - row);
        Multiply multiply = weight.type == F32    ? multiplier<F32>(count)
                            : weight.type == BF16 ? multiplier<BF16>(count)
                                                  : multiplier<INT8>(count);
        const int64_t num_later = num_parts - 1 - part;  // the last two fetch the next panel, which mostly comes next
        const bool is_ahead = num_parts > 1 && num_later < 2;
        const char* ahead = is_ahead ? own + panel_bytes + (1 - num_later) * panel_bytes / 2 : own;
        multiply(weight, panel, x, row, tile, ahead);
        for (int m = 0; m < count; m++) take(row + m, tile + m * PANEL);
    }
}

// ------------------------------------------------------------------------------------------------ LayerNorm

void layer_norm(const float* x, const float* weight, const float* bias, int64_t width, float eps, float* out) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first(width - i), x + i));
    }
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 mask = first(width - i);
        __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), mean);
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    __m512 factor = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 mask = first(width - i);
        __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean), factor);
        d = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(mask, weight + i), _mm512_maskz_loadu_ps(mask, bias + i));
        _mm512_mask_storeu_ps(out + i, mask, d);
    }
}

// ------------------------------------------------------------------------------------------------ attention

template <class KV>
struct Cache;

template <>
struct Cache<float> {
    static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
    static __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
    static float store(float x) { return x; }
};

template <>
struct Cache<uint16_t> {
    static __m512 load(const uint16_t* p) { return load_bf16(p); }
    static __m512 load(const uint16_t* p, __mmask16 mask) {
        __m256i raw = _mm256_maskz_loadu_epi16(mask, p);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    static uint16_t store(float x) { return to_bf16(x); }
};

// QUERIES queries times the keys of BLOCKS blocks: scores[QUERIES][BLOCKS * 16], not scaled yet. A lone query waits for
// memory most of the time, and blocks lie anywhere: so the `next` ones are fetched meanwhile.
template <class KV, int QUERIES, int BLOCKS>
inline void scores_of(
    const float* q, int64_t q_stride, const KV* const* keys, const KV* const* next, int64_t head_dim, float* scores,
    int64_t stride
) {
    __m512 sum[QUERIES][BLOCKS];
#pragma GCC unroll 16
    for (int i = 0; i < QUERIES; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < BLOCKS; j++) sum[i][j] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < head_dim; d++) {
        __m512 key[BLOCKS];
#pragma GCC unroll 4
        for (int j = 0; j < BLOCKS; j++) {
            key[j] = Cache<KV>::load(keys[j] + d * BLOCK);
            if constexpr (QUERIES == 1) __builtin_prefetch(next[j] + d * BLOCK);
        }
#pragma GCC unroll 16
        for (int i = 0; i < QUERIES; i++) {
            __m512 x = _mm512_set1_ps(q[i * q_stride + d]);
#pragma GCC unroll 4
            for (int j = 0; j < BLOCKS; j++) sum[i][j] = _mm512_fmadd_ps(x, key[j], sum[i][j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < QUERIES; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < BLOCKS; j++) _mm512_storeu_ps(scores + i * stride + j * BLOCK, sum[i][j]);
    }
}

// Softmax of one query's scores over the tokens that it sees.
inline void softmax(float* scores, int64_t num_visible, float scale) {
    __m512 factor = _mm512_set1_ps(scale);
    __m512 max = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < num_visible; t += 16) {
        __mmask16 mask = first(num_visible - t);
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + t), factor);
        s = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, s);
        _mm512_storeu_ps(scores + t, s);
        max = _mm512_max_ps(max, s);
    }
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(max)), sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < num_visible; t += 16) {
        __m512 p = exp(_mm512_sub_ps(_mm512_loadu_ps(scores + t), top));
        p = _mm512_maskz_mov_ps(first(num_visible - t), p);
        _mm512_storeu_ps(scores + t, p);
        sum = _mm512_add_ps(sum, p);
    }
    __m512 inverse = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(sum));
    for (int64_t t = 0; t < num_visible; t += 16) {
        _mm512_storeu_ps(scores + t, _mm512_mul_ps(_mm512_loadu_ps(scores + t), inverse));
    }
}

// out[QUERIES][VECTORS * 16] = weights[QUERIES][num_tokens] times the values of the tokens. The last QUERIES tokens are
// the queries' own: one that comes later is left out, since a weight of 0 would not hide what is not finite in it.
template <class KV, int QUERIES, int VECTORS>
inline void mix(
    const float* weights, int64_t stride, const KV* values, const int32_t* table, int64_t block_stride,
    int64_t head_dim, int64_t num_tokens, __mmask16 last, float* out, int64_t out_stride
) {
    __m512 sum[QUERIES][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < QUERIES; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) sum[i][j] = _mm512_setzero_ps();
    }
    const int64_t num_common = num_tokens - QUERIES + 1;
    auto add = [&](int64_t t, const KV* value, const KV* next, auto is_own) __attribute__((always_inline)) {
        __m512 v[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            if constexpr (QUERIES == 1) __builtin_prefetch(next + j * 16);
            v[j] = j + 1 < VECTORS ? Cache<KV>::load(value + j * 16) : Cache<KV>::load(value + j * 16, last);
        }
#pragma GCC unroll 16
        for (int i = 0; i < QUERIES; i++) {
            const __mmask16 sees = is_own && t >= num_common + i ? 0 : 0xffff;
            __m512 p = _mm512_set1_ps(weights[i * stride + t]);
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) sum[i][j] = _mm512_mask3_fmadd_ps(p, v[j], sum[i][j], sees);
        }
    };
    for (int64_t begin = 0; begin < num_tokens; begin += BLOCK) {
        const KV* value = values + table[begin / BLOCK] * block_stride;
        const KV* next = values + table[std::min(begin + BLOCK, num_tokens - 1) / BLOCK] * block_stride;
        const int64_t end = std::min<int64_t>(num_tokens, begin + BLOCK);
        int64_t t = begin;
        for (; t < std::min(end, num_common); t++, value += head_dim, next += head_dim) {
            add(t, value, next, std::false_type());
        }
        for (; t < end; t++, value += head_dim, next += head_dim) add(t, value, next, std::true_type());
    }
#pragma GCC unroll 16
    for (int i = 0; i < QUERIES; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            _mm512_mask_storeu_ps(out + i * out_stride + j * 16, j + 1 < VECTORS ? 0xffff : last, sum[i][j]);
        }
    }
}

template <class KV, int QUERIES>
void mix_all(
    const float* weights, int64_t stride, const KV* values, const int32_t* table, int64_t block_stride,
    int64_t head_dim, int64_t num_tokens, float* out, int64_t out_stride
) {
    constexpr int MOST = QUERIES == 1 ? 4 : 1;
    for (int64_t d = 0; d < head_dim;) {
        const int64_t num_vectors = ceil_div(head_dim - d, 16);
        if (num_vectors >= MOST) {
            mix<KV, QUERIES, MOST>(
                weights, stride, values + d, table, block_stride, head_dim, num_tokens,
                first(static_cast<int>(std::min<int64_t>(16, head_dim - d - 16 * (MOST - 1)))), out + d, out_stride
            );
            d += 16 * MOST;
        } else {
            mix<KV, QUERIES, 1>(
                weights, stride, values + d, table, block_stride, head_dim, num_tokens,
                first(static_cast<int>(std::min<int64_t>(16, head_dim - d))), out + d, out_stride
            );
            d += 16;
        }
    }
}

// One head of `QUERIES` consecutive queries of a row, the first of them at `position`.
template <class KV, int QUERIES>
void attend(
    const float* q, int64_t q_stride, const KV* keys, const KV* values, const int32_t* table, int64_t block_stride,
    int64_t head_dim, int64_t position, float scale, float* scores, int64_t stride, float* out, int64_t out_stride
) {
    constexpr int TOGETHER = QUERIES == 1 ? 4 : QUERIES <= 4 ? 2 : 1;
    const int64_t num_tokens = position + QUERIES;
    const int64_t num_blocks = ceil_div(num_tokens, BLOCK);
    int64_t block = 0;
    const KV *key[TOGETHER], *next[TOGETHER];
    for (; block + TOGETHER <= num_blocks; block += TOGETHER) {
        for (int j = 0; j < TOGETHER; j++) {
            key[j] = keys + table[block + j] * block_stride;
            next[j] = keys + table[std::min(block + TOGETHER + j, num_blocks - 1)] * block_stride;
        }
        scores_of<KV, QUERIES, TOGETHER>(q, q_stride, key, next, head_dim, scores + block * BLOCK, stride);
    }
    for (; block < num_blocks; block++) {
        key[0] = keys + table[block] * block_stride;
        next[0] = values + table[block + 1 == num_blocks && block > 0] * block_stride;
        scores_of<KV, QUERIES, 1>(q, q_stride, key, next, head_dim, scores + block * BLOCK, stride);
    }
    for (int i = 0; i < QUERIES; i++) softmax(scores + i * stride, position + i + 1, scale);
    mix_all<KV, QUERIES>(scores, stride, values, table, block_stride, head_dim, num_tokens, out, out_stride);
}

template <class KV>
using Attend = void (*)(
    const float*, int64_t, const KV*, const KV*, const int32_t*, int64_t, int64_t, int64_t, float, float*, int64_t,
    float*, int64_t
);

template <class KV>
Attend<KV> attender(int num_queries) {
    static constexpr Attend<KV> table[MAX_QUERIES] = {
        attend<KV, 1>, attend<KV, 2>, attend<KV, 3>, attend<KV, 4>, attend<KV, 5>, attend<KV, 6>,
        attend<KV, 7>, attend<KV, 8>, attend<KV, 9>, attend<KV, 10>, attend<KV, 11>, attend<KV, 12>,
        attend<KV, 13>, attend<KV, 14>, attend<KV, 15>, attend<KV, 16>,
    };
    return table[num_queries - 1];
}

}  // namespace

// ------------------------------------------------------------------------------------------------ the interface

extern "C" {

struct GPTJWeight {
    int32_t type, num_outputs, width;
    const uint32_t* panels;
    const float* scale;
    const int32_t* sum;
    const float* bias;
};

struct GPTJLayer {
    const float *norm_weight, *norm_bias;
    GPTJWeight in;  // q, k, v and fc_in, each padded to whole panels
    GPTJWeight attention_out, mlp_out;
    void *keys, *values;
};

struct GPTJShape {
    int32_t width, num_heads, rotated_dim, inner_width, activation, kv_type, num_layers;
    float eps, scale;
    const float *sin, *cos;  // [n_positions, rotated_dim / 2]
    const GPTJLayer* layers;
};

struct GPTJRow {
    int32_t start, num_tokens, offset, table_offset;
};

}

namespace {

// One head of up to 16 queries of a row.
struct Task {
    int32_t row, head, first_query, num_queries;
};

// Of a packed token.
struct Place {
    int32_t position, block;
};

struct Stage {
    GPTJShape shape;
    Buffer x, normed, qkv, attended, mlp, activated, tasks, places, scores;
    OperandBuffer normed_operand, attended_operand, inner_operand;
};

Weight weight_of(const GPTJWeight& w) {
    return {static_cast<Type>(w.type), w.num_outputs, w.width, w.panels, w.scale, w.sum, w.bias};
}

// Rotates the pairs (0,1), (2,3), … of the first rotated_dim dimensions.
inline void rotate(float* x, const float* sin, const float* cos, int64_t num_pairs) {
    for (int64_t i = 0; i < num_pairs; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
}

template <class KV>
struct Cached {
    KV *keys, *values;
    int64_t head_dim, block_stride;

    // Rotates a token's q and k of one head, and keeps its k and v.
    void put(float* q, float* k, const float* v, int64_t head, Place place, const GPTJShape& shape) const {
        const int64_t position = place.position, num_pairs = shape.rotated_dim / 2, slot = position % BLOCK;
        const float *sin = shape.sin + position * num_pairs, *cos = shape.cos + position * num_pairs;
        rotate(q, sin, cos, num_pairs);
        rotate(k, sin, cos, num_pairs);
        const int64_t at = place.block * block_stride;
        KV* key = keys + at + head * head_dim * BLOCK + slot;
        KV* value = values + at + (head * BLOCK + slot) * head_dim;
        for (int64_t d = 0; d < head_dim; d++) {
            key[d * BLOCK] = Cache<KV>::store(k[d]);
            value[d] = Cache<KV>::store(v[d]);
        }
    }
};

// Whatever one thread does alone, the others wait for, and the memory too; so threads meet as seldom as they can: three
// times a layer for a lone token. The MLP's way out and attention are one loop; what `tokens` does for few of them, every
// thread does for itself; and a lone token's heads are rotated and kept in the tasks that then attend. With more tokens
// that is a loop of its own: a row may read blocks that another row of the same microbatch fills.
template <class KV>
void forward(Stage& stage, float* hidden, int64_t num_tokens, const GPTJRow* rows, int64_t num_rows,
             const int32_t* tables, int num_threads) {
    const GPTJShape& shape = stage.shape;
    const int64_t width = shape.width, num_heads = shape.num_heads, head_dim = width / num_heads;
    const int64_t padded = pad(width, PANEL), inner = shape.inner_width, padded_inner = pad(inner, PANEL);
    const int64_t qkv_stride = 3 * padded + 16;
    const Type type = static_cast<Type>(shape.layers[0].in.type);
    const auto activation = static_cast<Activation>(shape.activation);
    const int64_t block_stride = num_heads * head_dim * BLOCK;
    const bool is_alone = num_tokens == 1, are_few = num_tokens <= FEW_TOKENS;
    const int64_t num_copies = are_few ? num_threads : 1;

    float* x = stage.x.get<float>(num_tokens * padded);
    float* normed = stage.normed.get<float>(num_threads * pad(width, 16));
    float* qkv = stage.qkv.get<float>(num_tokens * qkv_stride);
    float* attended = stage.attended.get<float>(num_tokens * padded);
    float* mlp = stage.mlp.get<float>(num_tokens * padded);
    float* activated = stage.activated.get<float>(type == INT8 ? num_tokens * padded_inner : 0);
    const Operand normed_operands = stage.normed_operand.get(type, num_copies * num_tokens, padded);
    const Operand attended_operands = stage.attended_operand.get(type, num_copies * num_tokens, padded);
    const Operand inner_operands = stage.inner_operand.get(type, num_copies * num_tokens, padded_inner);

    int64_t longest = 0, num_tasks = 0;
    for (int64_t r = 0; r < num_rows; r++) {
        longest = std::max<int64_t>(longest, rows[r].start + rows[r].num_tokens);
        num_tasks += num_heads * ceil_div(rows[r].num_tokens, MAX_QUERIES);
    }
    Task* tasks = stage.tasks.get<Task>(num_tasks);
    Task* task = tasks;
    Place* places = stage.places.get<Place>(num_tokens);
    for (int32_t r = 0; r < num_rows; r++) {
        for (int32_t i = 0; i < rows[r].num_tokens; i++) {
            const int32_t position = rows[r].start + i;
            places[rows[r].offset + i] = {position, tables[rows[r].table_offset + position / BLOCK]};
        }
        for (int32_t head = 0; head < num_heads; head++) {
            for (int32_t q = 0; q < rows[r].num_tokens; q += MAX_QUERIES) {
                *task++ = {r, head, q, std::min(MAX_QUERIES, rows[r].num_tokens - q)};
            }
        }
    }
    const int64_t score_stride = pad(longest, 64) + 16;
    float* all_scores = stage.scores.get<float>(num_threads * MAX_QUERIES * score_stride);
    const int64_t num_panels = padded / PANEL, num_qkv_panels = 3 * num_panels;

#pragma omp parallel num_threads(num_threads)
    {
        const int thread = omp_get_thread_num();
        const int64_t first_row = are_few ? thread * num_tokens : 0;
        float* own_normed = normed + thread * pad(width, 16);
        float* scores = all_scores + thread * MAX_QUERIES * score_stride;
        const Operand normed_operand = normed_operands.from(first_row);
        const Operand attended_operand = attended_operands.from(first_row);
        const Operand inner_operand = inner_operands.from(type == INT8 ? first_row : 0);

        auto tokens = [&](auto&& make) {
            if (are_few) {
                for (int64_t t = 0; t < num_tokens; t++) make(t);
            } else {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < num_tokens; t++) make(t);
            }
        };

#pragma omp for schedule(static)
        for (int64_t t = 0; t < num_tokens; t++) {
            std::memcpy(x + t * padded, hidden + t * width, width * sizeof(float));
            std::memset(x + t * padded + width, 0, (padded - width) * sizeof(float));
        }

        for (int32_t index = 0; index < shape.num_layers; index++) {
            const GPTJLayer& layer = shape.layers[index];
            const Weight in = weight_of(layer.in);
            const Weight attention_out = weight_of(layer.attention_out), mlp_out = weight_of(layer.mlp_out);
            const Cached<KV> cached{
                static_cast<KV*>(layer.keys), static_cast<KV*>(layer.values), head_dim, block_stride
            };
            auto keep = [&](int64_t t, int64_t head) {
                float* q = qkv + t * qkv_stride + head * head_dim;
                cached.put(q, q + padded, q + 2 * padded, head, places[t], shape);
            };

            tokens([&](int64_t t) {
                layer_norm(x + t * padded, layer.norm_weight, layer.norm_bias, width, shape.eps, own_normed);
                to_operand(own_normed, width, normed_operand, t);
            });

            share(in.num_outputs / PANEL, num_threads, [&](int64_t panel) {
                if (panel < num_qkv_panels) {
                    product(in, panel, normed_operand, num_tokens, [&](int64_t t, const float* out) {
                        std::memcpy(qkv + t * qkv_stride + panel * PANEL, out, PANEL * sizeof(float));
                    });
                    return;
                }
                const int64_t column = (panel - num_qkv_panels) * PANEL;
                product(in, panel, normed_operand, num_tokens, [&](int64_t t, const float* out) {
                    for (int half = 0; half < PANEL; half += 16) {
                        __m512 bias = _mm512_loadu_ps(in.bias + panel * PANEL + half);
                        __m512 y = activate(_mm512_add_ps(_mm512_loadu_ps(out + half), bias), activation);
                        uint32_t* units = inner_operand.units + t * inner_operand.stride;
                        if (type == INT8) {
                            _mm512_storeu_ps(activated + t * padded_inner + column + half, y);
                        } else if (type == F32) {
                            _mm512_storeu_ps(reinterpret_cast<float*>(units) + column + half, y);
                        } else {
                            auto* to = reinterpret_cast<uint16_t*>(units) + column + half;
                            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(y));
                        }
                    }
                });
            });

            if (!is_alone) {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < num_tokens; t++) {
                    for (int64_t head = 0; head < num_heads; head++) keep(t, head);
                }
            }
            if (type == INT8) {
                tokens([&](int64_t t) { to_operand(activated + t * padded_inner, inner, inner_operand, t); });
            }

            share(num_tasks + num_panels, num_threads, [&](int64_t i) {
                if (i >= num_tasks) {
                    const int64_t panel = i - num_tasks;
                    product(mlp_out, panel, inner_operand, num_tokens, [&](int64_t t, const float* out) {
                        std::memcpy(mlp + t * padded + panel * PANEL, out, PANEL * sizeof(float));
                    });
                    return;
                }
                const Task& task = tasks[i];
                const GPTJRow& row = rows[task.row];
                const int64_t t = row.offset + task.first_query, head = task.head;
                if (is_alone) keep(t, head);
                attender<KV>(task.num_queries)(
                    qkv + t * qkv_stride + head * head_dim, qkv_stride, cached.keys + head * head_dim * BLOCK,
                    cached.values + head * BLOCK * head_dim, tables + row.table_offset, block_stride, head_dim,
                    row.start + task.first_query, shape.scale, scores, score_stride,
                    attended + t * padded + head * head_dim, padded
                );
            });

            tokens([&](int64_t t) { to_operand(attended + t * padded, width, attended_operand, t); });

            share(num_panels, num_threads, [&](int64_t panel) {
                product(attention_out, panel, attended_operand, num_tokens, [&](int64_t t, const float* out) {
                    const int64_t at = t * padded + panel * PANEL;
                    for (int half = 0; half < PANEL; half += 16) {
                        __m512 bias = _mm512_loadu_ps(mlp_out.bias + panel * PANEL + half);
                        __m512 sum = _mm512_add_ps(_mm512_loadu_ps(x + at + half), _mm512_loadu_ps(out + half));
                        sum = _mm512_add_ps(sum, _mm512_add_ps(_mm512_loadu_ps(mlp + at + half), bias));
                        _mm512_storeu_ps(x + at + half, sum);
                    }
                });
            });
        }

#pragma omp for schedule(static)
        for (int64_t t = 0; t < num_tokens; t++) {
            std::memcpy(hidden + t * width, x + t * padded, width * sizeof(float));
        }
    }
}

}  // namespace

extern "C" {

// `shape` and what it points to must outlive the stage.
void* gptj_stage_new(const GPTJShape* shape) {
    auto* stage = new Stage;
    stage->shape = *shape;
    return stage;
}

void gptj_stage_free(void* stage) { delete static_cast<Stage*>(stage); }

// hidden [num_tokens, width], in place: packed rows, each at the block table that begins at its table_offset.
void gptj_stage_forward(
    void* handle, float* hidden, int64_t num_tokens, const GPTJRow* rows, int64_t num_rows, const int32_t* tables,
    int num_threads
) {
    auto& stage = *static_cast<Stage*>(handle);
    if (stage.shape.kv_type == F32) {
        forward<float>(stage, hidden, num_tokens, rows, num_rows, tables, num_threads);
    } else {
        forward<uint16_t>(stage, hidden, num_tokens, rows, num_rows, tables, num_threads);
    }
}

// out [num_rows, num_outputs] = x [num_rows, width] times the weight, and its bias.
void gptj_linear(const GPTJWeight* w, const float* x, int64_t num_rows, float* out, int num_threads) {
    static thread_local OperandBuffer buffer;
    const Weight weight = weight_of(*w);
    const bool are_few = num_rows <= FEW_TOKENS;
    const Operand operands = buffer.get(weight.type, (are_few ? num_threads : 1) * num_rows, weight.width);
#pragma omp parallel num_threads(num_threads)
    {
        const Operand operand = operands.from(are_few ? omp_get_thread_num() * num_rows : 0);
        auto convert = [&](int64_t row) { to_operand(x + row * weight.width, weight.width, operand, row); };
        if (are_few) {
            for (int64_t row = 0; row < num_rows; row++) convert(row);
        } else {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < num_rows; row++) convert(row);
        }
        share(weight.num_outputs / PANEL, num_threads, [&](int64_t panel) {
            product(weight, panel, operand, num_rows, [&](int64_t row, const float* values) {
                float* to = out + row * weight.num_outputs + panel * PANEL;
                for (int half = 0; half < PANEL; half += 16) {
                    __m512 y = _mm512_loadu_ps(values + half);
                    if (weight.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(weight.bias + panel * PANEL + half));
                    _mm512_storeu_ps(to + half, y);
                }
            });
        });
    }
}

// Of each row of logits [num_rows, num_tokens]: the first of its best, and the log of the sum of exp. Where a row has
// NaN, positive infinity or nothing else than negative infinity, the latter is not finite, and the former any.
void gptj_row_statistics(
    const float* logits, int64_t num_rows, int64_t stride, int64_t num_tokens, int64_t* best, float* normalizer,
    int num_threads
) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows > 1)
    for (int64_t row = 0; row < num_rows; row++) {
        const float* x = logits + row * stride;
        auto load = [&](int64_t i) {
            return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first(num_tokens - i), x + i);
        };
        __m512 peaks = _mm512_set1_ps(-INFINITY);
        for (int64_t i = 0; i < num_tokens; i += 16) peaks = _mm512_max_ps(peaks, load(i));
        const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks));
        best[row] = 0;
        for (int64_t i = 0; i < num_tokens; i += 16) {
            if (const __mmask16 is_best = _mm512_cmpeq_ps_mask(load(i), peak) & first(num_tokens - i)) {
                best[row] = i + __builtin_ctz(is_best);
                break;
            }
        }
        __m512d sum = _mm512_setzero_pd();
        for (int64_t i = 0; i < num_tokens; i += 16) {
            __m512 e = _mm512_maskz_mov_ps(first(num_tokens - i), exp(_mm512_sub_ps(load(i), peak)));
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
        }
        normalizer[row] = static_cast<float>(_mm512_cvtss_f32(peak) + std::log(_mm512_reduce_add_pd(sum)));
    }
}

}
