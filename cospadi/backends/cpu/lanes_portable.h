/* Eight numbers in plain C, for processors without a path of their own. */
#include "job.h"

#define LANES 8
typedef struct { float at[LANES]; } lanes;

INLINE lanes zero(void) { return (lanes){{0}}; }

INLINE lanes load_lanes(const float *p) {
    lanes a;
    memcpy(a.at, p, sizeof a.at);
    return a;
}

INLINE lanes multiply_add(lanes a, lanes b, lanes c) {
    UNROLL for (int i = 0; i < LANES; i++) c.at[i] += a.at[i] * b.at[i];
    return c;
}

INLINE lanes scale_lanes(lanes a, float scale) {
    UNROLL for (int i = 0; i < LANES; i++) a.at[i] *= scale;
    return a;
}

INLINE float sum(lanes a) {
    float total = 0;
    UNROLL for (int i = 0; i < LANES; i++) total += a.at[i];
    return total;
}

INLINE lanes dense(int64_t kind, const void *values, int64_t index, int64_t count) {
    lanes a = zero();
    for (int i = 0; i < LANES && i < count; i++) a.at[i] = number_at(values, kind, index + i);
    return a;
}

INLINE lanes expand(int64_t kind, const void *values, uint32_t bits) {
    lanes a = zero();
    int64_t next = 0;
    UNROLL for (int i = 0; i < LANES; i++)
        if (bits >> i & 1) a.at[i] = number_at(values, kind, next++);
    return a;
}

INLINE void store_lanes(int64_t kind, void *values, int64_t index, int64_t count, lanes a) {
    for (int i = 0; i < LANES && i < count; i++) put(values, kind, index + i, a.at[i]);
}
