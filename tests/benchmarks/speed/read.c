/* Memory read bandwidth: `read THREADS` prints GB/s.
 *
 * Every thread sums its own part of an array that no cache holds, pass after pass; the best pass counts, as the bound
 * that a decoder could reach if nothing else used the memory.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PASSES = 12, MOST_THREADS = 256 };
static const size_t PART_WORDS = (size_t)40 << 20; /* 320 MiB */

static pthread_barrier_t together;
static struct {
    double begin_s[PASSES], end_s[PASSES];
    uint64_t sum;
} readers[MOST_THREADS];

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static uint64_t sum(const uint64_t *words) {
    uint64_t part[32] = {0}, all = 0;
    for (size_t i = 0; i < PART_WORDS; i += 32) {
        __builtin_prefetch(words + i + 512);
        for (int j = 0; j < 32; j++) part[j] += words[i + j];
    }
    for (int j = 0; j < 32; j++) all += part[j];
    return all;
}

static void *reader(void *argument) {
    size_t number = (size_t)argument;
    size_t bytes = PART_WORDS * sizeof(uint64_t);
    uint64_t *words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (words == MAP_FAILED) exit(1);
    madvise(words, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < PART_WORDS; i++) words[i] = i;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_barrier_wait(&together);
        readers[number].begin_s[pass] = now_s();
        readers[number].sum += sum(words);
        readers[number].end_s[pass] = now_s();
    }
    return NULL;
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 1;
    if (threads < 1 || threads > MOST_THREADS) return 2;
    pthread_barrier_init(&together, NULL, threads);
    pthread_t made[MOST_THREADS];
    for (size_t i = 0; i < (size_t)threads; i++) pthread_create(&made[i], NULL, reader, (void *)i);
    uint64_t all = 0;
    for (int i = 0; i < threads; i++) pthread_join(made[i], NULL), all += readers[i].sum;
    double best_s = 1e9;
    for (int pass = 0; pass < PASSES; pass++) {
        double begin_s = 1e18, end_s = 0;
        for (int i = 0; i < threads; i++) {
            if (readers[i].begin_s[pass] < begin_s) begin_s = readers[i].begin_s[pass];
            if (readers[i].end_s[pass] > end_s) end_s = readers[i].end_s[pass];
        }
        if (end_s - begin_s < best_s) best_s = end_s - begin_s;
    }
    printf("%.2f %llu\n", threads * PART_WORDS * sizeof(uint64_t) / best_s / 1e9, (unsigned long long)all);
    return 0;
}
