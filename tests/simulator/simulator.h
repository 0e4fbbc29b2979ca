/* What the simulated libcufile asks of the simulated libcudart. */

#ifndef SIMULATOR_H
#define SIMULATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

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

#endif
