/* The two products in float32, on the vectors of lanes_*.h, for weights of every kind.
 *
 * `lanes` is a vector of LANES floats with: zero(), load_lanes(float *), multiply_add(a, b, c) = a b + c, sum(a),
 * scale_lanes(a, float), dense(kind, values, index, count): the numbers from index on, zeros from `count` on;
 * expand(kind, values, bits): the next numbers at the places of the bits that are set, zeros elsewhere;
 * store_lanes(kind, values, index, count, a).
 */
#include "run.h"

INLINE void project_some(const struct run *run, int64_t first, int64_t last, int64_t token, int64_t kind, const int n) {
    const struct dictionary *d = run->job->dictionary;
    const int64_t width = d->in_features, tokens = run->job->n_tokens;
    const float *x[8];
    UNROLL for (int t = 0; t < n; t++) {
        const int64_t row = token + t < tokens ? token + t : tokens - 1;
        x[t] = (const float *)run->x + row * run->x_stride;
    }
    for (int64_t atom = first; atom < last; atom++) {
        lanes sums[8];
        UNROLL for (int t = 0; t < n; t++) sums[t] = zero();
        for (int64_t i = 0; i < width; i += LANES) {
            const lanes weights = dense(kind, d->values, atom * width + i, width - i);
            UNROLL for (int t = 0; t < n; t++) sums[t] = multiply_add(weights, load_lanes(x[t] + i), sums[t]);
        }
        const float scale = kind == INT8 ? d->scales[atom] : 1.0f;
        UNROLL for (int t = 0; t < n; t++)
            if (token + t < tokens) ((float *)run->z)[(token + t) * run->z_stride + atom] = scale * sum(sums[t]);
    }
}

INLINE uint32_t next_bits(const uint8_t *mask, int64_t atom, int64_t n_atoms) {
    uint32_t bits = 0;
    memcpy(&bits, mask + atom / 8, LANES / 8); /* little-endian machines only; checked by the caller */
    const int64_t left = n_atoms - atom;
    return left < LANES ? bits & ((1u << left) - 1) : bits;
}

INLINE void combine_some(const struct run *run, const struct coefficients *c, int64_t offset, int64_t first,
                         int64_t last, int64_t token, int64_t kind, const int n) {
    const int64_t tokens = run->job->n_tokens, width = total_columns(run->job);
    const float *z[8];
    UNROLL for (int t = 0; t < n; t++) {
        const int64_t row = token + t < tokens ? token + t : tokens - 1;
        z[t] = (const float *)run->z + row * run->z_stride;
    }
    for (int64_t column = first; column < last; column++) {
        const uint8_t *mask = mask_of(c, column);
        const char *values = values_of(c, column);
        lanes sums[8];
        UNROLL for (int t = 0; t < n; t++) sums[t] = zero();
        for (int64_t atom = 0; atom < c->n_atoms; atom += LANES) {
            const uint32_t bits = next_bits(mask, atom, c->n_atoms);
            const lanes weights = expand(kind, values, bits);
            values += (size_t)__builtin_popcount(bits) * bytes_of(kind);
            UNROLL for (int t = 0; t < n; t++) sums[t] = multiply_add(weights, load_lanes(z[t] + atom), sums[t]);
        }
        const float scale = kind == INT8 ? c->scales[column] : 1.0f;
        UNROLL for (int t = 0; t < n; t++)
            if (token + t < tokens)
                put(run->job->y, run->job->io, (token + t) * width + offset + column, scale * sum(sums[t]));
    }
}

/* Constant kinds and token counts, so that the compiler makes a loop of its own for each. */
#define FOR_KIND(kind, body) \
    switch (kind) { \
    case BF16: { enum { K = BF16 }; body; } break; \
    case F16: { enum { K = F16 }; body; } break; \
    case F32: { enum { K = F32 }; body; } break; \
    default: { enum { K = INT8 }; body; } \
    }
#define FOR_TOKENS(left, body) \
    if (left >= 5) { enum { N = 8 }; body; } \
    else if (left >= 3) { enum { N = 4 }; body; } \
    else if (left == 2) { enum { N = 2 }; body; } \
    else { enum { N = 1 }; body; }

static void project_exact(const struct run *run, int64_t first, int64_t last) {
    for (int64_t token = 0; token < run->job->n_tokens; token += 8) {
        const int64_t left = run->job->n_tokens - token;
        FOR_TOKENS(left, FOR_KIND(run->job->dictionary->kind, project_some(run, first, last, token, K, N)))
    }
}

static void combine_exact(const struct run *run, const struct coefficients *c, int64_t offset, int64_t first,
                          int64_t last) {
    for (int64_t token = 0; token < run->job->n_tokens; token += 8) {
        const int64_t left = run->job->n_tokens - token;
        FOR_TOKENS(left, FOR_KIND(c->kind, combine_some(run, c, offset, first, last, token, K, N)))
    }
}

INLINE void fill_some(const struct coefficients *c, void *rows, int64_t start, int64_t io, int64_t first, int64_t last,
                      int64_t kind) {
    for (int64_t row = first; row < last; row++) {
        const uint8_t *mask = mask_of(c, start + row);
        const char *values = values_of(c, start + row);
        for (int64_t atom = 0; atom < c->n_atoms; atom += LANES) {
            const uint32_t bits = next_bits(mask, atom, c->n_atoms);
            lanes weights = expand(kind, values, bits);
            values += (size_t)__builtin_popcount(bits) * bytes_of(kind);
            if (kind == INT8) weights = scale_lanes(weights, c->scales[start + row]);
            store_lanes(io, rows, row * c->n_atoms + atom, c->n_atoms - atom, weights);
        }
    }
}

/* Rows `first` to `last` of `rows`, whose first is column `start` of S. */
static void fill_rows(const struct coefficients *c, void *rows, int64_t start, int64_t io, int64_t first, int64_t last) {
#ifdef HAVE_PAIRS
    if (io == c->kind && c->kind != F32) {
        fill_halves(c, rows, start, first, last);
        return;
    }
#endif
    FOR_KIND(c->kind, fill_some(c, rows, start, io, first, last, K))
}
