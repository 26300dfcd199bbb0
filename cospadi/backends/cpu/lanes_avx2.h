/* Vectors of 8 floats: AVX2, FMA and F16C.  The expansion is a shuffle that a table of the 256 masks gives. */
#include "job.h"
#include <immintrin.h>

#define LANES 8
typedef __m256 lanes;

/* places[m][i]: which of the next values belongs to bit i of mask m; 0x80 (which the shuffle reads as zero) for none. */
static uint8_t places[256][8];

__attribute__((constructor)) static void fill_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0, next = 0; bit < 8; bit++) places[mask][bit] = mask >> bit & 1 ? (uint8_t)next++ : 0x80;
}

INLINE lanes zero(void) { return _mm256_setzero_ps(); }
INLINE lanes load_lanes(const float *p) { return _mm256_loadu_ps(p); }
INLINE lanes multiply_add(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
INLINE lanes scale_lanes(lanes a, float scale) { return _mm256_mul_ps(a, _mm256_set1_ps(scale)); }

INLINE float sum(lanes a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE lanes from_halves(int64_t kind, __m128i halves) {
    if (kind == F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE lanes dense(int64_t kind, const void *values, int64_t index, int64_t count) {
    char last[32] = {0};
    const char *p = (const char *)values + (size_t)index * bytes_of(kind);
    if (count < LANES) {
        memcpy(last, p, (size_t)count * bytes_of(kind));
        p = last;
    }
    if (kind == F32) return _mm256_loadu_ps((const float *)p);
    if (kind == INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
    return from_halves(kind, _mm_loadu_si128((const __m128i *)p));
}

INLINE lanes expand(int64_t kind, const void *values, uint32_t bits) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)places[bits]);
    if (kind == INT8) {
        const __m128i next = _mm_loadl_epi64((const __m128i *)values);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(next, bytes)));
    }
    if (kind == F32) {
        const __m256i order = _mm256_cvtepi8_epi32(bytes);
        const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), order);
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(order, 31)), found);
    }
    /* Both bytes of every half: 2 p and 2 p + 1, with the mark of an empty place kept. */
    const __m128i pairs = _mm_unpacklo_epi8(bytes, bytes);
    const __m128i twice = _mm_or_si128(_mm_add_epi8(pairs, pairs), _mm_and_si128(pairs, _mm_set1_epi8((char)0x80)));
    const __m128i order = _mm_add_epi8(twice, _mm_set1_epi16(0x0100));
    return from_halves(kind, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), order));
}

INLINE void store_lanes(int64_t kind, void *values, int64_t index, int64_t count, lanes a) {
    if (kind == F32 && count >= LANES) {
        _mm256_storeu_ps((float *)values + index, a);
        return;
    }
    float at[LANES];
    _mm256_storeu_ps(at, a);
    for (int i = 0; i < LANES && i < count; i++) put(values, kind, index + i, at[i]);
}
