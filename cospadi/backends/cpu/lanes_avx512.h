/* Vectors of 16 floats: AVX-512 F, BW, VL, VBMI2 (expand), BF16 and VNNI (products of pairs). */
#include "job.h"
#include <immintrin.h>

#define LANES 16
#define HAVE_PAIRS
typedef __m512 lanes;

INLINE lanes zero(void) { return _mm512_setzero_ps(); }
INLINE lanes load_lanes(const float *p) { return _mm512_loadu_ps(p); }
INLINE lanes multiply_add(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE lanes scale_lanes(lanes a, float scale) { return _mm512_mul_ps(a, _mm512_set1_ps(scale)); }
INLINE float sum(lanes a) { return _mm512_reduce_add_ps(a); }

INLINE lanes from_halves(int64_t kind, __m256i halves) {
    if (kind == F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE lanes dense(int64_t kind, const void *values, int64_t index, int64_t count) {
    const __mmask16 inside = count < LANES ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff;
    if (kind == F32) return _mm512_maskz_loadu_ps(inside, (const float *)values + index);
    if (kind == INT8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(inside, (const int8_t *)values + index)));
    return from_halves(kind, _mm256_maskz_loadu_epi16(inside, (const uint16_t *)values + index));
}

/* Load, then expand in registers: expanding from memory is much slower on the processors measured. */
INLINE lanes expand(int64_t kind, const void *values, uint32_t bits) {
    const __mmask16 places = (__mmask16)bits;
    if (kind == F32) return _mm512_maskz_expand_ps(places, _mm512_loadu_ps(values));
    if (kind == INT8)
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_maskz_expand_epi8(places, _mm_loadu_si128((const __m128i *)values))));
    return from_halves(kind, _mm256_maskz_expand_epi16(places, _mm256_loadu_si256((const __m256i *)values)));
}

INLINE void store_lanes(int64_t kind, void *values, int64_t index, int64_t count, lanes a) {
    const __mmask16 inside = count < LANES ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff;
    if (kind == F32) {
        _mm512_mask_storeu_ps((float *)values + index, inside, a);
        return;
    }
    const __m256i halves = kind == F16 ? _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                       : (__m256i)_mm512_cvtneps_pbh(a);
    _mm256_mask_storeu_epi16((uint16_t *)values + index, inside, halves);
}

/* The sums of `count` vectors, four at a time: fewer steps than one by one. */
INLINE void sum_all(const lanes *a, const int count, float *sums) {
    UNROLL for (int i = 0; i < count; i += 4) {
        const int last = count - 1;
        const lanes a0 = a[i], a1 = a[i + 1 < last ? i + 1 : last], a2 = a[i + 2 < last ? i + 2 : last],
                    a3 = a[i + 3 < last ? i + 3 : last];
        const __m512d pairs = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1)));
        const __m512d others = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3)));
        const lanes fours = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs, others)),
                                          _mm512_castpd_ps(_mm512_unpackhi_pd(pairs, others)));
        const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
        _mm_storeu_ps(sums + i, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    }
}

/* The 32 mask bits from `atom` on. */
INLINE uint32_t word_of(const uint8_t *mask, int64_t atom, int64_t n_atoms) {
    uint32_t bits;
    memcpy(&bits, mask + atom / 8, 4);
    const int64_t left = n_atoms - atom;
    return left < 32 ? bits & ((1u << left) - 1) : bits;
}

/* S with its zeros where no number changes: 16-bit values as they are. */
static void fill_halves(const struct coefficients *c, void *rows, int64_t start, int64_t first, int64_t last) {
    for (int64_t place = first; place < last; place++) {
        const uint8_t *mask = mask_of(c, start + place);
        const uint16_t *values = (const uint16_t *)values_of(c, start + place);
        uint16_t *row = (uint16_t *)rows + place * c->n_atoms;
        for (int64_t atom = 0; atom < c->n_atoms; atom += 32) {
            const uint32_t bits = word_of(mask, atom, c->n_atoms);
            const __m512i dense = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
            const int64_t left = c->n_atoms - atom;
            values += __builtin_popcount(bits);
            if (left < 32) _mm512_mask_storeu_epi16(row + atom, (1u << left) - 1, dense);
            else _mm512_storeu_si512(row + atom, dense);
        }
    }
}

/* Activations of up to 8 tokens lie interleaved, [features / 32][n][32], so that they are read in one stream: rows a
 * power of two apart would meet in the same few places of the cache.  `n` is the number of tokens, rounded up to 1, 2,
 * 4 or 8; what lies in the places of tokens that do not exist is computed with and dropped. */
INLINE int64_t place(int64_t stride, int64_t token, int64_t feature, int n) {
    return token / 8 * 8 * stride + feature / 32 * (32 * n) + token % 8 * 32 + feature % 32;
}

INLINE int rounded_up(int64_t left) { return left > 4 ? 8 : left > 2 ? 4 : (int)left; }

/* Rows of 16-bit numbers, interleaved; what lies behind `count` is set to zero. */
static void interleave(const uint16_t *from, int64_t count, uint16_t *to, int64_t stride, int64_t n_tokens) {
    for (int64_t token = 0; token < n_tokens; token++) {
        const int n = rounded_up(n_tokens - token / 8 * 8);
        for (int64_t i = 0; i < stride; i += 32) {
            const int64_t left = count - i;
            const __mmask32 inside = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
            _mm512_storeu_si512(to + place(stride, token, i, n), _mm512_maskz_loadu_epi16(inside, from + token * count + i));
        }
    }
}

/* The places of the atoms behind the last, which a step may read. */
static void clear_behind(void *z, int64_t stride, int64_t count, int64_t n_tokens) {
    for (int64_t token = 0; token < n_tokens; token++)
        for (int64_t i = count; i < stride; i++)
            ((uint16_t *)z)[place(stride, token, i, rounded_up(n_tokens - token / 8 * 8))] = 0;
}

/* Rows as 16-bit integers with one scale each, interleaved; what lies behind `count` is set to zero.
 *
 * The largest magnitude becomes 32767, so a row of n numbers changes by at most sqrt(n) / 65534 of its norm. */
static void round_int16(const void *from, int64_t from_stride, int64_t kind, int64_t count, int16_t *to, int64_t stride,
                        float *scales, int64_t n_tokens) {
    for (int64_t token = 0; token < n_tokens; token++) {
        const int n = rounded_up(n_tokens - token / 8 * 8);
        /* Compared as integers, among which NaN is above all numbers, so that it is not lost. */
        __m512i largest = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += LANES) {
            const lanes magnitudes = _mm512_abs_ps(dense(kind, from, token * from_stride + i, count - i));
            largest = _mm512_max_epi32(largest, _mm512_castps_si512(magnitudes));
        }
        const float most = from_bits((uint32_t)_mm512_reduce_max_epi32(largest));
        /* Below, the inverse would overflow; such a row is as good as zero and becomes zero. */
        const float scale = most < 0x1p-100f ? 1.0f : most / 32767.0f;
        const __m512 inverse = _mm512_set1_ps(1.0f / scale);
        for (int64_t i = 0; i < stride; i += LANES) {
            const __m512 numbers = i < count ? dense(kind, from, token * from_stride + i, count - i) : zero();
            const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse));
            _mm256_storeu_si256((__m256i *)(to + place(stride, token, i, n)), _mm512_cvtsepi32_epi16(integers));
        }
        scales[token] = scale;
    }
}
