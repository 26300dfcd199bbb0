/* A job on its way: the vectors of the instruction set, and what the threads share. */
#ifndef COSPADI_RUN_H
#define COSPADI_RUN_H

#include "job.h"
#include "threads.h"

#if defined(WITH_AVX512)
#include "lanes_avx512.h"
#elif defined(WITH_AVX2)
#include "lanes_avx2.h"
#elif defined(WITH_NEON)
#include "lanes_neon.h"
#else
#include "lanes_portable.h"
#endif

struct run {
    const struct job *job;
    struct deal atoms, columns;
    int64_t entered, rounding; /* how many threads have come; whether one has taken the rounding upon it */
    void *x, *z;                /* in the type that is computed in, rows padded with zeros */
    int64_t x_stride, z_stride; /* elements */
    float *z_exact;             /* (n_tokens, z_stride), where z is rounded after all of it is known */
    float *x_scales, *z_scales; /* (n_tokens,), of 16-bit integers */
};

INLINE int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

INLINE int64_t total_columns(const struct job *job) {
    int64_t total = 0;
    for (int64_t m = 0; m < job->n_members; m++) total += job->members[m].out_features;
    return total;
}

#endif
