// Runs the kernels of KERNELS on the host: one thread of the grid after the other, in either order.
//
// Every load and store is checked against the memory that may be touched, and for its alignment;
// it goes to where that memory really is. The first wrong one is the last: to go on might never end.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#include "kernels.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Place {
    unsigned x, y;
};
struct ulonglong2 {
    unsigned long long x, y;
};

// Kernels may run on several threads, each for a stream of its own.
static thread_local Place blockIdx, blockDim, threadIdx;
static thread_local launch* now;

static void* reach(const void* pointer, uint64_t size, const char* what) {
    uint64_t at = (uint64_t)pointer;
    const range* stop = now->ranges + now->count;
    const range* after = std::upper_bound(
        now->ranges, stop, at, [](uint64_t address, const range& r) { return address < r.begin; });
    bool inside = after != now->ranges && at < after[-1].end && size <= after[-1].end - at;
    if (inside && at % size == 0) return (char*)after[-1].bytes + (at - after[-1].begin);
    std::fprintf(stderr, "a kernel's %s of %llu at %#llx: %s\n", what, (unsigned long long)size,
                 (unsigned long long)at, inside ? "misaligned" : "not its memory");
    throw (int)(inside ? MISALIGNED_ADDRESS : ILLEGAL_ADDRESS);
}

template <class T>
static T loaded(const T* pointer) {
    T value = *(const T*)reach(pointer, sizeof(T), "load");
    now->loads++;
    now->bytes_alone += sizeof(T) == 1;
    return value;
}
template <class T>
static T __ldcs(const T* pointer) {
    return loaded(pointer);
}
template <class T>
static T __ldcg(const T* pointer) {
    return loaded(pointer);
}
template <class T>
static T __ldg(const T* pointer);
template <class T>
static void __stwb(T* pointer, T value) {
    *(T*)reach(pointer, sizeof(T), "store") = value;
}

#include KERNELS

// Constants are no memory that was given.
template <class T>
static T __ldg(const T* pointer) {
    uint64_t at = (uint64_t)pointer;
    uint64_t secret = at - (uint64_t)SECRET, start = at - (uint64_t)START;
    if (secret <= sizeof SECRET - sizeof(T) || start <= sizeof START - sizeof(T)) return *pointer;
    return loaded(pointer);
}

template <class T>
static T argument(const uint64_t& word) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <class... T, size_t... I>
static void run_thread(void (*kernel)(T...), std::index_sequence<I...>) {
    static_assert(sizeof...(T) <= MOST_ARGUMENTS, "make MOST_ARGUMENTS more");
    kernel(argument<T>(now->arguments[I])...);
}

template <class... T>
static int run_grid(void (*kernel)(T...), launch* launch) {
    uint64_t columns = launch->grid[0], threads = launch->threads;
    uint64_t all = columns * launch->grid[1] * threads;
    now = launch;
    blockDim = {launch->threads, 1};
    try {
        for (uint64_t i = 0; i < all; i++) {
            uint64_t n = launch->backwards ? all - 1 - i : i;
            threadIdx = {(unsigned)(n % threads), 0};
            blockIdx = {(unsigned)(n / threads % columns), (unsigned)(n / threads / columns)};
            run_thread(kernel, std::index_sequence_for<T...>());
        }
    } catch (int error) {
        return error;
    }
    return 0;
}

extern "C" int run_kvgds_sums(launch* launch) { return run_grid(kvgds_sums, launch); }
extern "C" int run_kvgds_chain(launch* launch) { return run_grid(kvgds_chain, launch); }
extern "C" int run_kvgds_digest(launch* launch) { return run_grid(kvgds_digest, launch); }
extern "C" int run_kvgds_copy(launch* launch) { return run_grid(kvgds_copy, launch); }
