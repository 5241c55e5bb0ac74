/* Work for several threads: those of the OpenMP runtime that torch has loaded, so that no second pool competes. */
#pragma once

#include "pieces.h"

/* Weak, so NULL where torch has loaded no such runtime. The loader binds it, once, when it loads this library. */
void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

typedef struct {
    void (*run)(void *, i64);
    void *job;
    i64 next;
} team;

static void take(void *it) {
    team *t = it;
    t->run(t->job, __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED));
}

static void in_parallel(void (*run)(void *, i64), void *job, i64 parts) {
    team t = {run, job, 0};
    if (parts > 1 && GOMP_parallel) GOMP_parallel(take, &t, (unsigned)parts, 0);
    while (__atomic_load_n(&t.next, __ATOMIC_RELAXED) < parts) take(&t); /* a runtime may start fewer */
}

/* Where part `part` of `parts` begins, in whole units. */
static i64 share_of(i64 all, i64 unit, i64 part, i64 parts) {
    return least(all, (all + unit - 1) / unit * part / parts * unit);
}
