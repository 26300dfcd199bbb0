/* Threads of the OpenMP runtime that torch has loaded, and how work is dealt out to them. */
#ifndef COSPADI_THREADS_H
#define COSPADI_THREADS_H

#include "macros.h"

/* Entry points, from processor.c; NULL where there is no such runtime. */
extern void (*openmp_parallel)(void (*body)(void *), void *data, unsigned n_threads, unsigned flags);
extern void (*openmp_barrier)(void);

/* Bytes below which waking a second thread costs more than it saves. */
#define SMALL 131072
#define MOST_THREADS 64

INLINE int64_t threads_for(int64_t bytes, int64_t wanted) {
    if (bytes < SMALL || !openmp_parallel) return 1;
    return wanted < MOST_THREADS ? wanted : MOST_THREADS;
}

static void on_threads(void (*body)(void *), void *data, int64_t n_threads) {
    if (n_threads > 1) openmp_parallel(body, data, (unsigned)n_threads, 0);
    else body(data);
}

/* Work is dealt out in pieces.  Every thread has a run of its own, so that it reads on where it left off and what was
 * fetched ahead is used; when it is done it helps the others, so that a core that is held up by other programs delays
 * one piece only.  Which thread computes a number does not change it. */

struct deal {
    int64_t piece, n_threads;
    struct {
        int64_t next, end;
        char apart[48]; /* a cache line each */
    } runs[MOST_THREADS];
};

/* Pieces of about 64 KiB, in whole fours. */
static void deal_out(struct deal *deal, int64_t count, int64_t bytes_each, int64_t n_threads) {
    const int64_t piece = 65536 / (bytes_each + 1);
    deal->piece = piece < 8 ? 8 : piece / 4 * 4;
    deal->n_threads = n_threads;
    const int64_t share = (count + 4 * n_threads - 1) / (4 * n_threads) * 4;
    for (int64_t i = 0; i < n_threads; i++) {
        deal->runs[i].next = i * share < count ? i * share : count;
        deal->runs[i].end = (i + 1) * share < count ? (i + 1) * share : count;
    }
}

INLINE int take(struct deal *deal, int64_t thread, int64_t *first, int64_t *last) {
    for (int64_t i = 0; i < deal->n_threads; i++) {
        int64_t run = thread + i;
        if (run >= deal->n_threads) run -= deal->n_threads;
        const int64_t end = deal->runs[run].end;
        if (__atomic_load_n(&deal->runs[run].next, __ATOMIC_RELAXED) >= end) continue;
        *first = __atomic_fetch_add(&deal->runs[run].next, deal->piece, __ATOMIC_RELAXED);
        *last = *first + deal->piece < end ? *first + deal->piece : end;
        if (*first < end) return 1;
    }
    return 0;
}

#endif
