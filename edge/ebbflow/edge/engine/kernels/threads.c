#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { SPINS = 4000 }; /* some ten microseconds: longer than a pass takes, shorter than a time slice */

struct ebb_team {
    int threads;
    pthread_t *thread; /* [threads - 1] */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    ebb_work *work; /* under lock, as what follows */
    void *what;
    int working; /* threads that take part in this step */
    uint64_t step;
    int ending;
    atomic_int arrived;
    atomic_uint phase;
};

typedef struct {
    ebb_team *team;
    int number;
} member;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void ebb_team_barrier(ebb_team *team, int threads) {
    if (threads == 1) return;
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS) pause_briefly();
        else sched_yield();
    }
}

static void *serve(void *argument) {
    member self = *(member *)argument;
    free(argument);
    ebb_team *team = self.team;
    uint64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&team->lock);
        while (team->step == seen && !team->ending) pthread_cond_wait(&team->wake, &team->lock);
        int ending = team->ending;
        ebb_work *work = team->work;
        void *what = team->what;
        int threads = team->working;
        seen = team->step;
        pthread_mutex_unlock(&team->lock);
        if (ending) return NULL;
        if (self.number >= threads) continue;
        work(what, self.number, threads);
        ebb_team_barrier(team, threads);
    }
}

ebb_team *ebb_team_open(int threads) {
    ebb_team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->wake, NULL);
    team->threads = 1;
    team->thread = calloc((size_t)threads, sizeof *team->thread);
    for (int i = 1; team->thread && i < threads; i++) {
        member *self = malloc(sizeof *self);
        if (!self) break;
        *self = (member){team, i};
        if (pthread_create(&team->thread[i - 1], NULL, serve, self)) {
            free(self);
            break;
        }
        team->threads++;
    }
    if (team->threads == threads) return team;
    ebb_team_close(team);
    return NULL;
}

void ebb_team_run(ebb_team *team, int threads, ebb_work *work, void *what) {
    if (threads > 1) {
        pthread_mutex_lock(&team->lock);
        team->work = work;
        team->what = what;
        team->working = threads;
        team->step++;
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->lock);
    }
    work(what, 0, threads);
    ebb_team_barrier(team, threads);
}

void ebb_team_close(ebb_team *team) {
    pthread_mutex_lock(&team->lock);
    team->ending = 1;
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
    for (int i = 0; i < team->threads - 1; i++) pthread_join(team->thread[i], NULL);
    pthread_mutex_destroy(&team->lock);
    pthread_cond_destroy(&team->wake);
    free(team->thread);
    free(team);
}
