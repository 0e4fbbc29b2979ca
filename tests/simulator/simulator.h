/* What the simulated libcufile asks of the simulated libcudart. */

#ifndef SIMULATOR_H
#define SIMULATOR_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

struct simcuda_range {
    bool on_device; /* false: host memory, or at least not ours; `bytes` is then the address given */
    int device;
    char *bytes; /* where the simulator keeps what the address stands for */
    void *keeper; /* for simcuda_unuse; until then the bytes stay, even if they are freed */
};

/* 0, or the cuFile error for a range that is not wholly inside one living allocation. */
int simcuda_use(const void *address, size_t nbytes, struct simcuda_range *range);
void simcuda_unuse(struct simcuda_range *range);

/* The device that is current on this thread, as the driver's context would tell cuFile. */
int simcuda_current(void);

/* Wait until a value that `lock` guards and `changed` tells of has reached this: 0, or ETIMEDOUT. */
static inline int wait_until(const int64_t *value, int64_t least, int64_t timeout_ms,
                             pthread_mutex_t *lock, pthread_cond_t *changed) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    int error = 0;
    pthread_mutex_lock(lock);
    while (*value < least && !error) error = pthread_cond_timedwait(changed, lock, &until);
    error = *value < least ? ETIMEDOUT : 0;
    pthread_mutex_unlock(lock);
    return error;
}

#endif
