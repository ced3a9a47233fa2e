/* A team of threads that takes steps together. Between steps it sleeps; inside one, a barrier spins a little and then
 * yields, so that a busy neighbour costs one time slice and not the rest of the step. */
#ifndef EBB_THREADS_H
#define EBB_THREADS_H

#include <stdint.h>

typedef struct ebb_team ebb_team;
typedef void ebb_work(void *what, int thread, int threads);

ebb_team *ebb_team_open(int threads);                    /* NULL when the machine has no more threads */
/* `threads` of the team do the work, the caller is the first of them; returns when each has done its part. */
void ebb_team_run(ebb_team *team, int threads, ebb_work *work, void *what);
void ebb_team_barrier(ebb_team *team, int threads); /* all that do the work have come here */
void ebb_team_close(ebb_team *team);

#endif
