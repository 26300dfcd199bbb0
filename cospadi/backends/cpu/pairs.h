/* The two products on pairs of 16-bit numbers, 32 to a vector; included once for each type.
 *
 * bf16: weights and activations are bfloat16, sums float32.  int16: weights are 8-bit integers, activations 16-bit
 * integers with a scale per token, sums exact in 32 bits over BLOCK numbers and float32 beyond.
 */
#include "run.h"

#define IS_BF16 JOIN(IS, PAIRS)
#define IS_bf16 1
#define IS_int16 0
#define PAIR(name) JOIN(name, PAIRS)

#if IS_BF16
typedef __m512 PAIR(sums);
typedef uint16_t PAIR(weight);
#define EMPTY _mm512_setzero_ps()
#define DOT(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#define AS_FLOATS(sum) (sum)
#else
typedef __m512i PAIR(sums);
typedef int8_t PAIR(weight);
#define EMPTY _mm512_setzero_si512()
#define DOT(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#define AS_FLOATS(sum) _mm512_cvtepi32_ps(sum)
#endif
/* A lane adds one product in 16: 8192 * 127 * 32767 / 16 stays below 2^31. */
#define BLOCK 8192
/* Bytes to fetch ahead into the second-level cache: the processor's own prefetching keeps too few lines under way.  A
 * line left out disturbs it more than it helps, so all that a step may consume are named. */
#define AHEAD 16384

INLINE __m512i PAIR(load_weights)(const PAIR(weight) *p) {
#if IS_BF16
    return _mm512_loadu_si512(p);
#else
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#endif
}

INLINE __m512i PAIR(load_last)(const PAIR(weight) *p, __mmask32 inside) {
#if IS_BF16
    return _mm512_maskz_loadu_epi16(inside, p);
#else
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(inside, p));
#endif
}

INLINE __m512i PAIR(spread)(const PAIR(weight) *p, uint32_t bits) {
#if IS_BF16
    return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(p));
#else
    return _mm512_cvtepi8_epi16(_mm256_maskz_expand_epi8(bits, _mm256_loadu_si256((const __m256i *)p)));
#endif
}

/* Rows of the dictionary at a time: their sums, their weights and the activations must fit 32 registers. */
INLINE void PAIR(project_some)(const struct run *run, int64_t first, int64_t last, int64_t token, const int rows,
                               const int n) {
    const struct dictionary *d = run->job->dictionary;
    const int64_t width = d->in_features, tokens = run->job->n_tokens, whole = width / 32 * 32;
    const __mmask32 inside = (1u << (width - whole)) - 1;
    const uint16_t *x = (const uint16_t *)run->x + token * run->x_stride;
#if IS_BF16
    uint16_t *z = (uint16_t *)run->z + token * run->z_stride;
#endif
    for (int64_t atom = first; atom < last; atom += rows) {
        const PAIR(weight) *weights[4];
        UNROLL for (int r = 0; r < rows; r++)
            weights[r] = (const PAIR(weight) *)d->values + (atom + r < last ? atom + r : last - 1) * width;
        __m512 totals[4][n];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int t = 0; t < n; t++) totals[r][t] = zero();
        for (int64_t block = 0; block < width; block += BLOCK) {
            const int64_t end = block + BLOCK < whole ? block + BLOCK : whole;
            PAIR(sums) sums[4][8];
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int t = 0; t < n; t++) sums[r][t] = EMPTY;
            for (int64_t i = block; i < end; i += 32) {
                __m512i row[4];
                UNROLL for (int r = 0; r < rows; r++) {
                    _mm_prefetch((const char *)(weights[r] + rows * width + i), _MM_HINT_T1);
                    row[r] = PAIR(load_weights)(weights[r] + i);
                }
                UNROLL for (int t = 0; t < n; t++) {
                    const __m512i numbers = _mm512_loadu_si512(x + i * n + t * 32);
                    UNROLL for (int r = 0; r < rows; r++) sums[r][t] = DOT(sums[r][t], row[r], numbers);
                }
            }
            if (inside && whole < block + BLOCK) {
                UNROLL for (int r = 0; r < rows; r++) {
                    const __m512i row = PAIR(load_last)(weights[r] + whole, inside);
                    UNROLL for (int t = 0; t < n; t++)
                        sums[r][t] = DOT(sums[r][t], row, _mm512_maskz_loadu_epi16(inside, x + whole * n + t * 32));
                }
            }
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int t = 0; t < n; t++) totals[r][t] = _mm512_add_ps(totals[r][t], AS_FLOATS(sums[r][t]));
        }
        float found[32];
        sum_all(&totals[0][0], rows * n, found);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int t = 0; t < n; t++)
                if (atom + r < last && token + t < tokens) {
#if IS_BF16
                    z[place(run->z_stride, t, atom + r, n)] = to_bf16(found[r * n + t]);
#else
                    run->z_exact[(token + t) * run->z_stride + atom + r] =
                        found[r * n + t] * run->x_scales[token + t] * d->scales[atom + r];
#endif
                }
    }
}

/* 64 atoms to a step, so that two expansions of a column are under way at once and the place of its next values depends
 * on one count.  `columns` at a time share the activations; `sets` of sums take turns. */
INLINE void PAIR(combine_some)(const struct run *run, const struct coefficients *c, int64_t offset, int64_t first,
                               int64_t last, int64_t token, int64_t width, const int columns, const int sets,
                               const int n) {
    const int64_t tokens = run->job->n_tokens, n_atoms = c->n_atoms, whole = n_atoms / 64 * 64;
    const uint64_t inside = (1ull << (n_atoms - whole)) - 1;
    const uint16_t *z = (const uint16_t *)run->z + token * run->z_stride;
    for (int64_t column = first; column < last; column += columns) {
        const uint8_t *mask[2];
        const PAIR(weight) *values[2];
        UNROLL for (int j = 0; j < columns; j++) {
            const int64_t own = column + j < last ? column + j : last - 1;
            mask[j] = mask_of(c, own);
            values[j] = (const PAIR(weight) *)values_of(c, own);
        }
        __m512 totals[2][n];
        UNROLL for (int j = 0; j < columns; j++)
            UNROLL for (int t = 0; t < n; t++) totals[j][t] = zero();
        for (int64_t block = 0; block < n_atoms; block += BLOCK) {
            const int64_t end = block + BLOCK < n_atoms ? block + BLOCK : n_atoms;
            PAIR(sums) sums[2][2][8];
            UNROLL for (int j = 0; j < columns; j++)
                UNROLL for (int half = 0; half < sets; half++)
                    UNROLL for (int t = 0; t < n; t++) sums[j][half][t] = EMPTY;
            for (int64_t atom = block; atom < end; atom += 64) {
                __m512i weights[2][2];
                UNROLL for (int j = 0; j < columns; j++) {
                    uint64_t bits;
                    memcpy(&bits, mask[j] + atom / 8, 8);
                    if (atom == whole) bits &= inside;
                    _mm_prefetch((const char *)values[j] + AHEAD, _MM_HINT_T1);
                    if (IS_BF16) _mm_prefetch((const char *)values[j] + AHEAD + 64, _MM_HINT_T1);
                    _mm_prefetch((const char *)mask[j] + atom / 8 + AHEAD / 8, _MM_HINT_T1);
                    const PAIR(weight) *middle = values[j] + __builtin_popcount((uint32_t)bits);
                    weights[j][0] = PAIR(spread)(values[j], (uint32_t)bits);
                    weights[j][1] = PAIR(spread)(middle, (uint32_t)(bits >> 32));
                    values[j] += __builtin_popcountll(bits);
                }
                UNROLL for (int half = 0; half < 2; half++)
                    UNROLL for (int t = 0; t < n; t++) {
                        const __m512i numbers = _mm512_loadu_si512(z + (atom + 32 * half) * n + t * 32);
                        UNROLL for (int j = 0; j < columns; j++)
                            sums[j][half % sets][t] = DOT(sums[j][half % sets][t], weights[j][half], numbers);
                    }
            }
            UNROLL for (int j = 0; j < columns; j++)
                UNROLL for (int half = 0; half < sets; half++)
                    UNROLL for (int t = 0; t < n; t++)
                        totals[j][t] = _mm512_add_ps(totals[j][t], AS_FLOATS(sums[j][half][t]));
        }
        float found[16];
        sum_all(&totals[0][0], columns * n, found);
        UNROLL for (int j = 0; j < columns; j++)
            UNROLL for (int t = 0; t < n; t++)
                if (column + j < last && token + t < tokens) {
#if IS_BF16
                    ((uint16_t *)run->job->y)[(token + t) * width + offset + column + j] = to_bf16(found[j * n + t]);
#else
                    put(run->job->y, run->job->io, (token + t) * width + offset + column + j,
                        found[j * n + t] * run->z_scales[token + t] * c->scales[column + j]);
#endif
                }
    }
}

static void PAIR(project)(const struct run *run, int64_t first, int64_t last) {
    for (int64_t token = 0; token < run->job->n_tokens; token += 8) {
        const int64_t left = run->job->n_tokens - token;
        FOR_TOKENS(left, PAIR(project_some)(run, first, last, token, N < 8 ? 4 : IS_BF16 ? 3 : 2, N))
    }
}

static void PAIR(combine)(const struct run *run, const struct coefficients *c, int64_t offset, int64_t first,
                          int64_t last) {
    const int64_t width = total_columns(run->job);
    for (int64_t token = 0; token < run->job->n_tokens; token += 8) {
        const int64_t left = run->job->n_tokens - token;
        FOR_TOKENS(left, PAIR(combine_some)(run, c, offset, first, last, token, width, N > 2 ? 2 : 1, N == 8 ? 1 : 2, N))
    }
}

#undef IS_BF16
#undef IS_bf16
#undef IS_int16
#undef PAIR
#undef EMPTY
#undef DOT
#undef AS_FLOATS
#undef BLOCK
#undef AHEAD
