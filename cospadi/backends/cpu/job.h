/* What the caller gives: the stored tensors of D and S, and a product to compute with them. */
#ifndef COSPADI_JOB_H
#define COSPADI_JOB_H

#include "macros.h"
#include "numbers.h"

struct dictionary {
    const void *values;   /* (n_atoms, in_features) */
    const float *scales;  /* (n_atoms,), for INT8 */
    int64_t n_atoms, in_features;
    int64_t kind;
};

struct coefficients {
    const uint8_t *mask;      /* (out_features, row_bytes) */
    const void *values;
    const int64_t *starts;    /* (out_features + 1,) */
    const float *scales;      /* (out_features,), for INT8 */
    const uint8_t *tail_mask; /* from column `tail` on, with room behind */
    const void *tail_values;
    int64_t tail;
    int64_t n_atoms, out_features, row_bytes;
    int64_t kind;
};

struct job {
    const struct dictionary *dictionary; /* NULL: y = x S, there are members, and x is what z would be */
    const struct coefficients *members; /* none: S is the identity, as many outputs as atoms */
    int64_t n_members;
    const void *x; /* (n_tokens, in_features), or (n_tokens, n_atoms) without a dictionary, of kind `io` */
    void *y;       /* (n_tokens, out_features of all members), of kind `io` */
    void *scratch; /* scratch_bytes */
    int64_t n_tokens, io, n_threads;
};

INLINE size_t bytes_of(int64_t kind) { return kind == F32 ? 4 : kind == INT8 ? 1 : 2; }

INLINE const uint8_t *mask_of(const struct coefficients *c, int64_t column) {
    return column < c->tail ? c->mask + column * c->row_bytes : c->tail_mask + (column - c->tail) * c->row_bytes;
}

INLINE const char *values_of(const struct coefficients *c, int64_t column) {
    const size_t bytes = bytes_of(c->kind);
    return column < c->tail ? (const char *)c->values + (size_t)c->starts[column] * bytes
                            : (const char *)c->tail_values + (size_t)(c->starts[column] - c->starts[c->tail]) * bytes;
}

INLINE void put(void *y, int64_t kind, int64_t index, float value) {
    if (kind == BF16) ((uint16_t *)y)[index] = to_bf16(value);
    else if (kind == F16) ((uint16_t *)y)[index] = to_f16(value);
    else ((float *)y)[index] = value;
}

#endif
