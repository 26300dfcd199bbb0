/* y = (x D) S for a few tokens, straight from the stored tensors, and S with its zeros for many.  Either product can be
 * had alone.
 *
 * Compiled once per instruction set (LEVEL: avx512, avx2, neon, portable) with the flags of that set; the caller asks
 * supported_<level> and takes the best.  No headers beyond C11's own, no OpenMP pragmas: threads are those of the OpenMP
 * runtime that torch has loaded, by pointers to its entry points, since a second pool would fight torch's for the cores.
 *
 * Tensors are read as the checkpoint holds them (docs/format.md): the dictionary (n_atoms, in_features), and for every
 * column of S a row of mask bits, the lowest first, with the values of the bits that are set one after the other.
 * Loads may run past a column's values and past a row's last mask byte; `tail` holds copies with room behind for those
 * columns where that would leave the tensor.
 */
#include "job.h"
#include "run.h"
#include "products.h"

#ifdef HAVE_PAIRS
#define PAIRS bf16
#include "pairs.h"
#undef PAIRS
#define PAIRS int16
#include "pairs.h"
#undef PAIRS
#endif

/* Which arithmetic: pairs of bfloat16, pairs of 16-bit integers, or float32. */
enum arithmetic { EXACT, PAIRS_BF16, PAIRS_INT16 };

INLINE enum arithmetic arithmetic_of(const struct job *job) {
#ifdef HAVE_PAIRS
    const int64_t s = job->n_members ? job->members[0].kind : job->dictionary->kind;
    const int64_t d = job->dictionary ? job->dictionary->kind : s;
    if (job->io == BF16 && d == BF16 && s == BF16) return PAIRS_BF16;
    if (job->io != F32 && d == INT8 && s == INT8) return PAIRS_INT16;
#endif
    (void)job;
    return EXACT;
}

/* y = z: some outputs of a layer whose S is the identity. */
static void give(const struct run *run, int64_t first, int64_t last) {
    const struct job *job = run->job;
    const int64_t width = job->dictionary->n_atoms;
    const float *z = run->z;
#ifdef HAVE_PAIRS
    const enum arithmetic arithmetic = arithmetic_of(job);
    if (arithmetic == PAIRS_INT16) z = run->z_exact;
#endif
    for (int64_t t = 0; t < job->n_tokens; t++)
        for (int64_t atom = first; atom < last; atom++) {
#ifdef HAVE_PAIRS
            if (arithmetic == PAIRS_BF16) {
                const int n = rounded_up(job->n_tokens - t / 8 * 8);
                ((uint16_t *)job->y)[t * width + atom] = ((uint16_t *)run->z)[place(run->z_stride, t, atom, n)];
                continue;
            }
#endif
            put(job->y, job->io, t * width + atom, z[t * run->z_stride + atom]);
        }
}

static void share(void *data) {
    struct run *run = data;
    const struct job *job = run->job;
    const int64_t thread = __atomic_fetch_add(&run->entered, 1, __ATOMIC_RELAXED);
    int64_t first, last;
#ifdef HAVE_PAIRS
    const enum arithmetic arithmetic = arithmetic_of(job);
#endif
    while (take(&run->atoms, thread, &first, &last)) {
#ifdef HAVE_PAIRS
        if (arithmetic == PAIRS_BF16) { project_bf16(run, first, last); continue; }
        if (arithmetic == PAIRS_INT16) { project_int16(run, first, last); continue; }
#endif
        project_exact(run, first, last);
    }
    if (job->n_threads > 1 && job->dictionary) openmp_barrier();
    if (!job->n_members) {
        while (take(&run->columns, thread, &first, &last)) give(run, first, last);
        return;
    }
#ifdef HAVE_PAIRS
    if (arithmetic == PAIRS_INT16 && job->dictionary) {
        /* The scale of a token needs all of its z; one thread rounds while the others wait. */
        if (__atomic_exchange_n(&run->rounding, 1, __ATOMIC_RELAXED) == 0)
            round_int16(run->z_exact, run->z_stride, F32, job->dictionary->n_atoms, run->z, run->z_stride,
                        run->z_scales, job->n_tokens);
        if (job->n_threads > 1) openmp_barrier();
    }
#endif
    while (take(&run->columns, thread, &first, &last)) {
        int64_t offset = 0;
        for (int64_t m = 0; m < job->n_members; offset += job->members[m++].out_features) {
            const struct coefficients *c = &job->members[m];
            const int64_t from = first > offset ? first - offset : 0;
            const int64_t to = last - offset < c->out_features ? last - offset : c->out_features;
            if (from >= to) continue;
#ifdef HAVE_PAIRS
            if (arithmetic == PAIRS_BF16) { combine_bf16(run, c, offset, from, to); continue; }
            if (arithmetic == PAIRS_INT16) { combine_int16(run, c, offset, from, to); continue; }
#endif
            combine_exact(run, c, offset, from, to);
        }
    }
}

/* `scratch`, which may be NULL for one token (the stack is used), has room for x, z and z before it is rounded, rows padded to 64 numbers of 4 bytes, tokens to 8, two
 * scales for each token, and 1024 bytes more. */
void EXPORT(multiply)(const struct dictionary *dictionary, const struct coefficients *members, int64_t n_members,
                      const void *x_given, void *y, void *scratch, int64_t n_tokens, int64_t io,
                      int64_t n_threads) {
    struct job job = {dictionary, members, n_members, x_given, y, scratch, n_tokens, io, n_threads};
    const struct dictionary *d = job.dictionary;
    struct run run;
    run.job = &job;
    const int64_t in_features = d ? d->in_features : 0, n_atoms = d ? d->n_atoms : members[0].n_atoms;
    run.x_stride = padded(in_features);
    run.z_stride = padded(n_atoms);
    run.entered = run.rounding = 0;
    const int64_t columns = n_members ? total_columns(&job) : n_atoms;
    const int64_t bytes = d ? n_atoms * in_features * (int64_t)bytes_of(d->kind) : 0;
    int64_t stored = 0;
    for (int64_t m = 0; m < job.n_members; m++)
        stored += job.members[m].out_features * job.members[m].row_bytes +
                  (job.members[m].starts[job.members[m].out_features] - job.members[m].starts[0]) *
                      (int64_t)bytes_of(job.members[m].kind);
    job.n_threads = threads_for(bytes + stored, n_threads);

    if (!scratch) scratch = __builtin_alloca((size_t)(4 * (run.x_stride + 2 * run.z_stride) + 1024));
    char *room = (char *)(((uintptr_t)scratch + 63) / 64 * 64);
    run.x_scales = (float *)room;
    run.z_scales = run.x_scales + padded(job.n_tokens);
    const int64_t tokens = job.n_tokens == 1 ? 1 : (job.n_tokens + 7) / 8 * 8;
    float *x = run.z_scales + padded(job.n_tokens), *z = x + tokens * run.x_stride;
    run.z_exact = z + tokens * run.z_stride;
    run.x = x;
    run.z = z;
    switch (arithmetic_of(&job)) {
#ifdef HAVE_PAIRS
    case PAIRS_BF16:
        if (!d) {
            /* A step reads whole 64 numbers, beyond a shorter row. */
            if (job.n_tokens == 1 && n_atoms == run.z_stride) run.z = (void *)job.x;
            else interleave(job.x, n_atoms, run.z, run.z_stride, job.n_tokens);
            break;
        }
        if (job.n_tokens == 1) run.x = (void *)job.x;
        else interleave(job.x, in_features, run.x, run.x_stride, job.n_tokens);
        clear_behind(z, run.z_stride, n_atoms, job.n_tokens);
        break;
    case PAIRS_INT16:
        if (d) round_int16(job.x, in_features, job.io, in_features, run.x, run.x_stride, run.x_scales, job.n_tokens);
        else round_int16(job.x, n_atoms, job.io, n_atoms, run.z, run.z_stride, run.z_scales, job.n_tokens);
        break;
#endif
    default:
        for (int64_t t = 0; t < job.n_tokens; t++) {
            if (!d) {
                widen(job.x, job.io, t * n_atoms, n_atoms, z + t * run.z_stride, run.z_stride);
                continue;
            }
            widen(job.x, job.io, t * in_features, in_features, x + t * run.x_stride, run.x_stride);
            memset(z + t * run.z_stride + n_atoms, 0, (size_t)(run.z_stride - n_atoms) * sizeof *z);
        }
    }
    deal_out(&run.atoms, d ? n_atoms : 0, bytes / (n_atoms + 1), job.n_threads);
    deal_out(&run.columns, columns, stored / (columns + 1), job.n_threads);
    on_threads(share, &run, job.n_threads);
}

#ifdef HAVE_PAIRS
static void share_dense(void *data) {
    struct run *run = data;
    const int64_t thread = __atomic_fetch_add(&run->entered, 1, __ATOMIC_RELAXED);
    int64_t first, last;
    while (take(&run->atoms, thread, &first, &last)) project_bf16(run, first, last);
}

/* y = x W^T with a dense bfloat16 weight in the dictionary's place: the yardstick of the benchmarks. */
void EXPORT(dense_bf16)(const struct dictionary *d, const void *x, void *y, void *scratch, int64_t n_tokens,
                        int64_t n_threads) {
    struct job job = {d, NULL, 0, x, y, scratch, n_tokens, BF16, n_threads};
    struct run run;
    run.job = &job;
    run.x = scratch;
    run.x_stride = padded(d->in_features);
    run.z_stride = padded(d->n_atoms);
    run.entered = 0;
    const int64_t tokens = (job.n_tokens + 7) / 8 * 8;
    run.z = (uint16_t *)run.x + tokens * run.x_stride;
    if (job.n_tokens == 1) run.x = (void *)job.x, run.z = job.y;
    else interleave(job.x, d->in_features, run.x, run.x_stride, job.n_tokens);
    job.n_threads = threads_for(d->n_atoms * d->in_features * 2, n_threads);
    deal_out(&run.atoms, d->n_atoms, d->in_features * 2, job.n_threads);
    on_threads(share_dense, &run, job.n_threads);
    for (int64_t t = 0; t < job.n_tokens && job.n_tokens > 1; t++)
        for (int64_t j = 0; j < d->n_atoms; j += 32)
            memcpy((uint16_t *)job.y + t * d->n_atoms + j,
                   (uint16_t *)run.z + place(run.z_stride, t, j, rounded_up(job.n_tokens - t / 8 * 8)),
                   (size_t)(d->n_atoms - j < 32 ? d->n_atoms - j : 32) * 2);
}
#endif

struct filling {
    const struct coefficients *c;
    void *rows;
    int64_t first, io, entered;
    struct deal columns;
};

static void fill(void *data) {
    struct filling *filling = data;
    const int64_t thread = __atomic_fetch_add(&filling->entered, 1, __ATOMIC_RELAXED);
    int64_t first, last;
    while (take(&filling->columns, thread, &first, &last))
        fill_rows(filling->c, filling->rows, filling->first, filling->io, first, last);
}

/* Some rows of S^T with its zeros, (count, n_atoms), of kind `io`. */
void EXPORT(densify)(const struct coefficients *c, void *rows, int64_t first, int64_t count, int64_t io,
                     int64_t n_threads) {
    const int64_t bytes = c->n_atoms * (int64_t)bytes_of(io);
    struct filling filling;
    filling.c = c;
    filling.rows = rows;
    filling.first = first;
    filling.io = io;
    filling.entered = 0;
    n_threads = threads_for(count * bytes, n_threads);
    deal_out(&filling.columns, count, bytes, n_threads);
    on_threads(fill, &filling, n_threads);
}
