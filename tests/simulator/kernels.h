/* How a kernel that was compiled for the host (kernels.cpp) is told what to do. */

#ifndef KERNELS_H
#define KERNELS_H

#include <stdint.h>

enum { MOST_ARGUMENTS = 4, ILLEGAL_ADDRESS = 700, MISALIGNED_ADDRESS = 716 };

/* Addresses that the kernel may touch, and where the first of them really is. */
struct range {
    uint64_t begin, end, bytes;
};

struct launch {
    const struct range *ranges; /* ascending; none overlap */
    uint64_t count;
    uint64_t arguments[MOST_ARGUMENTS]; /* each at the start of its word */
    uint32_t grid[2], threads;
    uint32_t backwards; /* the last thread first: none may need what another has done */
    uint64_t loads, bytes_alone; /* told: all loads, and those of a single byte */
};

/* One per kernel: 0, or the CUDA error of the first load or store that was wrong, where it ends. */
typedef int kernel(struct launch *launch);

#endif
