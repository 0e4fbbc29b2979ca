/* A libcudart.so.12 for machines without a GPU.
 *
 * Device memory is a reserved address that nobody can touch: the arena of a device is never mapped
 * with any access, and the bytes of an allocation live elsewhere. So host code that dereferences a
 * device pointer dies, here as on a GPU. Addresses are never handed out twice: a stale one is found.
 *
 * A stream is a queue and a thread. Everything that one may wait for is a mark: "this stream has done
 * its n-th operation". Events, cudaStreamWaitEvent and the legacy default stream all come down to
 * marks. Streams are never freed, so that a mark never dangles.
 *
 * A kernel is a function of the host that is told where its memory really is. One that touches
 * anything else breaks its device, as on a GPU: nothing runs on it any more, and it says so.
 *
 * `lock` guards everything; `changed` tells of every change. Copies and kernels run without it.
 */

#define _GNU_SOURCE
#include "kernels.h"
#include "simulator.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE_POINTER = 17,
    INVALID_DIRECTION = 21,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    UNKNOWN = 999,
};

static const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {SUCCESS, "cudaSuccess", "no error"},
    {INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument"},
    {OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {INVALID_DEVICE_POINTER, "cudaErrorInvalidDevicePointer", "invalid device pointer"},
    {INVALID_DIRECTION, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {NO_DEVICE, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {NOT_READY, "cudaErrorNotReady", "device not ready"},
    {ALREADY_REGISTERED, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {NOT_REGISTERED, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {ILLEGAL_ADDRESS, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {MISALIGNED_ADDRESS, "cudaErrorMisalignedAddress", "misaligned address"},
    {NOT_SUPPORTED, "cudaErrorNotSupported", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {UNKNOWN, "cudaErrorUnknown", "unknown error"},
};

enum { CUFILE_BAD_POINTER = 5012, CUFILE_BAD_RANGE = 5014 };
enum { MAX_DEVICES = 8, VERSION = 12090, CUDA_13 = 13000, NONBLOCKING = 1, LEGACY = 1, PER_THREAD = 2 };
enum { GARBAGE = 0xA5 };
enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, BY_ADDRESS = 4 };

static const size_t ARENA = (size_t)1 << 36;
static const size_t GRAIN = 1 << 16; /* addresses are handed out in these, with one free between */

struct allocation {
    struct allocation *next;
    char *address, *bytes;
    size_t nbytes;
    int device;
    unsigned users; /* copies, kernels and cuFile operations under way */
    bool freed;
};

struct pinned {
    struct pinned *next;
    char *address;
    size_t nbytes;
    int device;
    unsigned users;
    bool gone;
};

struct mark {
    struct stream *stream;
    uint64_t number;
};

struct operation {
    struct operation *next;
    uint64_t number;
    struct mark *after;
    size_t marks;
    char *to, *from;
    size_t to_pitch, from_pitch, width, height;
    kernel *kernel;
    struct launch launch;
    struct allocation *memory[MOST_ARGUMENTS];
    struct pinned *host[2];
};

struct stream {
    struct stream *next;
    struct operation *first, *last;
    uint64_t submitted, done;
    int device;
    bool nonblocking, destroyed, held;
};

struct event {
    struct event *next;
    struct mark mark;
    int device;
};

struct attributes {
    int type, device;
    void *device_pointer, *host_pointer;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static int devices = 1;
static size_t capacity = (size_t)1 << 30, used[MAX_DEVICES];
static char *arena[MAX_DEVICES];
static size_t handed_out[MAX_DEVICES];
static struct allocation *allocations;
static struct pinned *pins;
static struct stream *streams, *legacy[MAX_DEVICES];
static struct event *events;
static bool strict_pinned, all_held, capturing;
static int runtime_version = VERSION, driver_version = VERSION, batch_answer;
static long copy_delay_us;
static bool in_use[MAX_DEVICES]; /* a context is made as a device is first used; it takes memory */
static int failure[MAX_DEVICES]; /* of a kernel: what the device answers from then on */

/* Calls of one function that fail: first `skip` pass, then `left` do. */
static struct {
    char function[32];
    int error;
    int64_t skip, left;
} refusals[8];
static unsigned refusal_count;

static __thread int current, last_error, capture_mode;
static __thread struct stream *per_thread[MAX_DEVICES];

#define COUNTERS(C) \
    C(copies) C(async_copies) C(batched_copies) C(copy_batches) C(launches) C(unpinned_copies) C(refused_copies) \
    C(events_recorded) C(events_waited) C(live_allocations) C(live_bytes) C(live_pinned) \
    C(live_streams) C(live_events) C(contexts) C(broken_captures) C(freed_in_use) C(unpinned_in_use) C(pending) C(waiting)
#define FIELD(name) int64_t name;
#define NAME(name) #name,
static struct { COUNTERS(FIELD) } count;
static const char *const counter_names[] = {COUNTERS(NAME) NULL};

static int give(int error) {
    if (error) last_error = error;
    return error;
}

static int unlock_and_give(int error) {
    pthread_mutex_unlock(&lock);
    return give(error);
}

/* What no thread may do while one captures a graph, but those whose mode is not the default. */
static bool harms_captures(const char *function) {
    static const char *const names[] = {"cudaMalloc",         "cudaFree",
                                        "cudaHostRegister",   "cudaHostUnregister",
                                        "cudaEventQuery",     "cudaStreamSynchronize"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(function, names[i])) return true;
    return false;
}

/* Whether this call of a function is to fail: with which error. */
static int refused(const char *function) {
    int error = SUCCESS;
    pthread_mutex_lock(&lock);
    count.contexts += !in_use[current];
    in_use[current] = true;
    if (capturing && !capture_mode && harms_captures(function)) {
        count.broken_captures++;
        error = CAPTURE_UNSUPPORTED;
    }
    for (unsigned i = 0; i < refusal_count && !error; i++) {
        if (strcmp(refusals[i].function, function) || !refusals[i].left) continue;
        if (refusals[i].skip > 0) {
            refusals[i].skip--;
            continue;
        }
        if (refusals[i].left > 0) refusals[i].left--;
        error = refusals[i].error;
    }
    pthread_mutex_unlock(&lock);
    return give(error);
}

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 0) : otherwise;
}

__attribute__((constructor)) static void start(void) {
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &clock);
    devices = (int)setting("SIMCUDA_DEVICES", 1);
    if (devices < 0 || devices > MAX_DEVICES) devices = MAX_DEVICES;
    capacity = (size_t)setting("SIMCUDA_VRAM_BYTES", 1 << 30);
    strict_pinned = setting("SIMCUDA_STRICT_PINNED", 0);
    copy_delay_us = setting("SIMCUDA_COPY_DELAY_US", 0);
    runtime_version = (int)setting("SIMCUDA_RUNTIME", VERSION);
    driver_version = (int)setting("SIMCUDA_DRIVER", VERSION);
    batch_answer = (int)setting("SIMCUDA_COPY_BATCH", 0);
    for (int device = 0; device < devices; device++) {
        arena[device] =
            mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena[device] == MAP_FAILED) {
            perror("simulated libcudart: no address space for device memory");
            abort();
        }
    }
}

/* --- memory ------------------------------------------------------------------------------------ */

static int arena_of(const void *address) {
    for (int device = 0; device < devices; device++)
        if ((size_t)((const char *)address - arena[device]) < ARENA) return device;
    return -1;
}

static struct allocation *allocation_at(const void *address) {
    for (struct allocation *a = allocations; a; a = a->next)
        if (!a->freed && (size_t)((const char *)address - a->address) < a->nbytes) return a;
    return NULL;
}

static struct pinned *pin_at(const void *address) {
    for (struct pinned *p = pins; p; p = p->next)
        if (!p->gone && (size_t)((const char *)address - p->address) < p->nbytes) return p;
    return NULL;
}

static bool inside(const char *address, size_t nbytes, const char *start, size_t length) {
    size_t offset = (size_t)(address - start);
    return address >= start && offset <= length && nbytes <= length - offset;
}

static void drop_allocation(struct allocation *gone) {
    struct allocation **link = &allocations;
    while (*link != gone) link = &(*link)->next;
    *link = gone->next;
    munmap(gone->bytes, gone->nbytes);
    free(gone);
}

static void unuse_allocation(struct allocation *a) {
    if (a && !--a->users && a->freed) drop_allocation(a);
}

static void unuse_pin(struct pinned *p) {
    if (!p || --p->users || !p->gone) return;
    struct pinned **link = &pins;
    while (*link != p) link = &(*link)->next;
    *link = p->next;
    free(p);
}

int simcuda_use(const void *address, size_t nbytes, struct simcuda_range *range) {
    *range = (struct simcuda_range){.device = arena_of(address), .bytes = (char *)address};
    if (range->device < 0) return 0;
    pthread_mutex_lock(&lock);
    struct allocation *a = allocation_at(address);
    int error = a ? 0 : CUFILE_BAD_POINTER;
    if (a && !inside(address, nbytes, a->address, a->nbytes)) error = CUFILE_BAD_RANGE;
    if (!error) {
        a->users++;
        range->on_device = true;
        range->bytes = a->bytes + ((const char *)address - a->address);
        range->keeper = a;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

void simcuda_unuse(struct simcuda_range *range) {
    pthread_mutex_lock(&lock);
    unuse_allocation(range->keeper);
    range->keeper = NULL;
    pthread_mutex_unlock(&lock);
}

int simcuda_current(void) { return current; }

int cudaMalloc(void **address, size_t nbytes) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    if (!address) return give(INVALID_VALUE);
    *address = NULL;
    if (!devices) return give(NO_DEVICE);
    if (!nbytes) return SUCCESS;
    pthread_mutex_lock(&lock);
    size_t room = (nbytes + GRAIN - 1) / GRAIN * GRAIN + GRAIN;
    if (nbytes > capacity - used[current] || room > ARENA - handed_out[current])
        return unlock_and_give(OUT_OF_MEMORY);
    char *bytes = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED) return unlock_and_give(OUT_OF_MEMORY);
    memset(bytes, GARBAGE, nbytes); /* who forgets to write it shall not find zeros */
    struct allocation *a = calloc(1, sizeof *a);
    *a = (struct allocation){allocations, arena[current] + handed_out[current], bytes, nbytes,
                             current,     0,                                    false};
    allocations = a;
    handed_out[current] += room;
    used[current] += nbytes;
    count.live_allocations++;
    count.live_bytes += (int64_t)nbytes;
    *address = a->address;
    return unlock_and_give(SUCCESS);
}

static void wait_for_device(int device);

static void free_now(struct allocation *a) {
    used[a->device] -= a->nbytes;
    count.live_allocations--;
    count.live_bytes -= (int64_t)a->nbytes;
    a->freed = true;
    if (a->users)
        count.freed_in_use++;
    else
        drop_allocation(a);
}

int cudaFree(void *address) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    if (!address) return SUCCESS;
    pthread_mutex_lock(&lock);
    struct allocation *a = allocation_at(address);
    if (!a || a->address != address) return unlock_and_give(INVALID_VALUE);
    wait_for_device(a->device); /* as the real one does */
    a = allocation_at(address); /* somebody else may have freed it meanwhile */
    if (!a) return unlock_and_give(INVALID_VALUE);
    free_now(a);
    return unlock_and_give(SUCCESS);
}

/* Free memory as a pool does that gives it to the next who asks: without waiting for anything. */
int simcuda_free_now(void *address) {
    pthread_mutex_lock(&lock);
    struct allocation *a = allocation_at(address);
    bool found = a && a->address == address;
    if (found) free_now(a);
    return unlock_and_give(found ? SUCCESS : INVALID_VALUE);
}

int cudaMemGetInfo(size_t *unused, size_t *total) {
    if (!devices) return give(NO_DEVICE);
    pthread_mutex_lock(&lock);
    *unused = capacity - used[current];
    *total = capacity;
    return unlock_and_give(SUCCESS);
}

static bool mapped(char *address, size_t nbytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *start = (char *)((uintptr_t)address / page * page);
    size_t length = nbytes + (size_t)(address - start);
    unsigned char *resident = malloc(length / page + 1);
    bool answer = !mincore(start, length, resident);
    free(resident);
    return answer;
}

int cudaHostRegister(void *address, size_t nbytes, unsigned flags) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    (void)flags;
    if (!devices) return give(NO_DEVICE);
    if (!address || !nbytes || arena_of(address) >= 0 || !mapped(address, nbytes))
        return give(INVALID_VALUE);
    pthread_mutex_lock(&lock);
    for (struct pinned *p = pins; p; p = p->next)
        if (!p->gone && p->address < (char *)address + nbytes &&
            (char *)address < p->address + p->nbytes)
            return unlock_and_give(ALREADY_REGISTERED);
    struct pinned *p = calloc(1, sizeof *p);
    *p = (struct pinned){pins, address, nbytes, current, 1, false};
    pins = p;
    count.live_pinned++;
    return unlock_and_give(SUCCESS);
}

/* Unlock memory as a pool does that keeps it locked, for the next who asks. */
int simcuda_unpin(void *address) {
    pthread_mutex_lock(&lock);
    struct pinned *p = pin_at(address);
    if (!p || p->address != address) return unlock_and_give(NOT_REGISTERED);
    p->gone = true;
    count.live_pinned--;
    if (p->users > 1) count.unpinned_in_use++;
    unuse_pin(p);
    return unlock_and_give(SUCCESS);
}

int cudaHostUnregister(void *address) {
    int refusal = refused(__func__);
    return refusal ? refusal : simcuda_unpin(address);
}

int cudaPointerGetAttributes(struct attributes *attributes, const void *address) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    if (!attributes) return give(INVALID_VALUE);
    if (!devices) return give(NO_DEVICE);
    pthread_mutex_lock(&lock);
    struct allocation *a = allocation_at(address);
    struct pinned *p = pin_at(address);
    if (a)
        *attributes = (struct attributes){2, a->device, (void *)address, NULL};
    else if (p)
        *attributes = (struct attributes){1, p->device, (void *)address, (void *)address};
    else
        *attributes = (struct attributes){0, -2, NULL, (void *)address};
    return unlock_and_give(SUCCESS);
}

/* --- streams ----------------------------------------------------------------------------------- */

static bool reached(struct mark mark) { return !mark.stream || mark.stream->done >= mark.number; }

static bool may_run(const struct stream *stream) {
    const struct operation *op = stream->first;
    if (!op || stream->held || all_held) return false;
    for (size_t i = 0; i < op->marks; i++)
        if (!reached(op->after[i])) return false;
    return true;
}

static bool needs(const struct operation *op, const struct allocation *a) {
    for (int i = 0; i < MOST_ARGUMENTS; i++)
        if (op->memory[i] == a) return true;
    return false;
}

static int by_address(const void *one, const void *other) {
    uint64_t a = ((const struct range *)one)->begin, b = ((const struct range *)other)->begin;
    return (a > b) - (a < b);
}

/* What a kernel may touch: all that is alive on its device as it starts, and what it was given. */
static void open_memory(struct operation *op, int device) {
    size_t n = 1;
    for (struct allocation *a = allocations; a; a = a->next) n++;
    struct range *ranges = calloc(n, sizeof *ranges);
    for (struct allocation *a = allocations; a; a = a->next) {
        uint64_t start = (uintptr_t)a->address;
        if (a->device == device && (!a->freed || needs(op, a)))
            ranges[op->launch.count++] =
                (struct range){start, start + a->nbytes, (uintptr_t)a->bytes};
    }
    qsort(ranges, op->launch.count, sizeof *ranges, by_address);
    op->launch.ranges = ranges;
}

static int perform(struct operation *op, long delay_us) {
    if (!op->height && !op->kernel) return SUCCESS;
    if (delay_us > 0) {
        struct timespec delay = {delay_us / 1000000, delay_us % 1000000 * 1000};
        nanosleep(&delay, NULL);
    }
    if (op->kernel) return op->kernel(&op->launch);
    for (size_t row = 0; row < op->height; row++)
        memmove(op->to + row * op->to_pitch, op->from + row * op->from_pitch, op->width);
    return SUCCESS;
}

/* Run a stream's next operation, without the lock. */
static void advance(struct stream *stream) {
    struct operation *op = stream->first;
    if (failure[stream->device]) return;
    long delay_us = copy_delay_us;
    if (op->kernel) open_memory(op, stream->device);
    pthread_mutex_unlock(&lock);
    int error = perform(op, delay_us);
    pthread_mutex_lock(&lock);
    if (error) failure[stream->device] = error;
}

static void finish(struct stream *stream) {
    struct operation *op = stream->first;
    stream->first = op->next;
    if (!stream->first) stream->last = NULL;
    stream->done = op->number;
    for (int i = 0; i < MOST_ARGUMENTS; i++) unuse_allocation(op->memory[i]);
    for (int i = 0; i < 2; i++) unuse_pin(op->host[i]);
    free(op->after);
    free((void *)op->launch.ranges);
    free(op);
    count.pending--;
    pthread_cond_broadcast(&changed);
}

static void *run(void *argument) {
    struct stream *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!may_run(stream)) {
            if (stream->destroyed && !stream->first) {
                pthread_mutex_unlock(&lock);
                return NULL;
            }
            pthread_cond_wait(&changed, &lock);
        }
        advance(stream);
        finish(stream);
    }
}

static struct stream *new_stream(int device, bool nonblocking) {
    struct stream *stream = calloc(1, sizeof *stream);
    *stream = (struct stream){.next = streams, .device = device, .nonblocking = nonblocking};
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &detached, run, stream)) {
        free(stream);
        return NULL;
    }
    streams = stream;
    return stream;
}

/* The stream of a handle, which may be one of CUDA's special ones; NULL if there is none. */
static struct stream *stream_of(void *handle) {
    if (!devices) return NULL;
    if ((uintptr_t)handle <= LEGACY) {
        if (!legacy[current]) legacy[current] = new_stream(current, false);
        return legacy[current];
    }
    if ((uintptr_t)handle == PER_THREAD) {
        if (!per_thread[current]) per_thread[current] = new_stream(current, false);
        return per_thread[current];
    }
    for (struct stream *s = streams; s; s = s->next)
        if (s == handle && !s->destroyed) return s;
    return NULL;
}

static bool is_legacy(const struct stream *stream) { return stream == legacy[stream->device]; }

/* Whether these two wait for each other: a device's default stream and its blocking streams. */
static bool entangled(const struct stream *one, const struct stream *other) {
    return one != other && one->device == other->device && !one->nonblocking &&
           !other->nonblocking && (is_legacy(one) || is_legacy(other));
}

static struct mark submit(struct stream *stream, struct operation *op, struct mark extra) {
    size_t n = 1;
    for (struct stream *s = streams; s; s = s->next) n += entangled(stream, s);
    op->after = calloc(n, sizeof *op->after);
    op->after[op->marks++] = extra;
    for (struct stream *s = streams; s; s = s->next)
        if (entangled(stream, s)) op->after[op->marks++] = (struct mark){s, s->submitted};
    op->number = ++stream->submitted;
    if (stream->last)
        stream->last->next = op;
    else
        stream->first = op;
    stream->last = op;
    count.pending++;
    pthread_cond_broadcast(&changed);
    return (struct mark){stream, op->number};
}

/* What a call to a device answers, which is nothing else once that is broken. */
static int answer(int device, int otherwise) {
    return failure[device] ? failure[device] : otherwise;
}

static void wait_for(struct mark mark) {
    if (reached(mark)) return;
    count.waiting++;
    pthread_cond_broadcast(&changed);
    while (!reached(mark)) pthread_cond_wait(&changed, &lock);
    count.waiting--;
}

static void wait_for_device(int device) {
    for (struct stream *s = streams; s; s = s->next)
        if (s->device == device) wait_for((struct mark){s, s->submitted});
}

int cudaStreamCreateWithFlags(void **handle, unsigned flags) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    if (!handle || flags > NONBLOCKING) return give(INVALID_VALUE);
    if (!devices) return give(NO_DEVICE);
    pthread_mutex_lock(&lock);
    *handle = new_stream(current, flags == NONBLOCKING);
    if (*handle) count.live_streams++;
    return unlock_and_give(*handle ? SUCCESS : OUT_OF_MEMORY);
}

int cudaStreamDestroy(void *handle) {
    pthread_mutex_lock(&lock);
    struct stream *stream = (uintptr_t)handle <= PER_THREAD ? NULL : stream_of(handle);
    if (!stream) return unlock_and_give(INVALID_HANDLE);
    stream->destroyed = true; /* what is queued still runs */
    count.live_streams--;
    pthread_cond_broadcast(&changed);
    return unlock_and_give(SUCCESS);
}

int cudaStreamSynchronize(void *handle) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    if (!stream) return unlock_and_give(INVALID_HANDLE);
    wait_for((struct mark){stream, stream->submitted});
    if (is_legacy(stream))
        for (struct stream *s = streams; s; s = s->next)
            if (entangled(stream, s)) wait_for((struct mark){s, s->submitted});
    return unlock_and_give(answer(stream->device, SUCCESS));
}

int cudaStreamQuery(void *handle) {
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    if (!stream) return unlock_and_give(INVALID_HANDLE);
    bool done = stream->done == stream->submitted;
    if (is_legacy(stream))
        for (struct stream *s = streams; s; s = s->next)
            done = done && !(entangled(stream, s) && s->done < s->submitted);
    return unlock_and_give(answer(stream->device, done ? SUCCESS : NOT_READY));
}

int cudaDeviceSynchronize(void) {
    if (!devices) return give(NO_DEVICE);
    pthread_mutex_lock(&lock);
    wait_for_device(current);
    return unlock_and_give(answer(current, SUCCESS));
}

/* --- events ------------------------------------------------------------------------------------ */

static struct event *event_of(void *handle) {
    for (struct event *e = events; e; e = e->next)
        if (e == handle) return e;
    return NULL;
}

int cudaEventCreateWithFlags(void **handle, unsigned flags) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    if (!handle || flags > 7) return give(INVALID_VALUE);
    if (!devices) return give(NO_DEVICE);
    pthread_mutex_lock(&lock);
    struct event *event = calloc(1, sizeof *event);
    *event = (struct event){.next = events, .device = current};
    *handle = events = event;
    count.live_events++;
    return unlock_and_give(SUCCESS);
}

int cudaEventDestroy(void *handle) {
    pthread_mutex_lock(&lock);
    struct event *event = event_of(handle);
    if (!event) return unlock_and_give(INVALID_HANDLE);
    struct event **link = &events;
    while (*link != event) link = &(*link)->next;
    *link = event->next;
    free(event);
    count.live_events--;
    return unlock_and_give(SUCCESS);
}

int cudaEventRecord(void *handle, void *stream_handle) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    pthread_mutex_lock(&lock);
    struct event *event = event_of(handle);
    struct stream *stream = stream_of(stream_handle);
    if (!event || !stream || event->device != stream->device)
        return unlock_and_give(INVALID_HANDLE);
    event->mark = submit(stream, calloc(1, sizeof(struct operation)), (struct mark){0});
    count.events_recorded++;
    return unlock_and_give(SUCCESS);
}

int cudaEventQuery(void *handle) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    pthread_mutex_lock(&lock);
    struct event *event = event_of(handle);
    if (!event) return unlock_and_give(INVALID_HANDLE);
    return unlock_and_give(answer(event->device, reached(event->mark) ? SUCCESS : NOT_READY));
}

int cudaEventSynchronize(void *handle) {
    pthread_mutex_lock(&lock);
    struct event *event = event_of(handle);
    if (!event) return unlock_and_give(INVALID_HANDLE);
    int device = event->device;
    wait_for(event->mark); /* of this recording, whatever becomes of the event meanwhile */
    return unlock_and_give(answer(device, SUCCESS));
}

int cudaStreamWaitEvent(void *stream_handle, void *handle, unsigned flags) {
    if (flags > 1) return give(INVALID_VALUE);
    pthread_mutex_lock(&lock);
    struct event *event = event_of(handle);
    struct stream *stream = stream_of(stream_handle);
    if (!event || !stream) return unlock_and_give(INVALID_HANDLE);
    submit(stream, calloc(1, sizeof(struct operation)), event->mark);
    count.events_waited++;
    return unlock_and_give(SUCCESS);
}

/* --- copies ------------------------------------------------------------------------------------ */

/* Find where one side of a copy lives. */
static int resolve(const void *address, size_t nbytes, char **bytes, struct allocation **memory,
                   struct pinned **host) {
    *bytes = (char *)address;
    if (arena_of(address) >= 0) {
        *memory = allocation_at(address);
        if (!*memory || !inside(address, nbytes, (*memory)->address, (*memory)->nbytes))
            return INVALID_VALUE;
        *bytes = (*memory)->bytes + ((const char *)address - (*memory)->address);
        return SUCCESS;
    }
    *host = pin_at(address);
    if (*host && !inside(address, nbytes, (*host)->address, (*host)->nbytes)) *host = NULL;
    return address ? SUCCESS : INVALID_VALUE;
}

static int check_direction(const struct operation *op, int kind) {
    bool to_device = op->memory[0], from_device = op->memory[1];
    if (kind < 0 || kind > BY_ADDRESS) return INVALID_DIRECTION;
    if (kind == BY_ADDRESS) return SUCCESS;
    bool right = to_device == (kind == HOST_TO_DEVICE || kind == DEVICE_TO_DEVICE) &&
                 from_device == (kind == DEVICE_TO_HOST || kind == DEVICE_TO_DEVICE);
    return right ? SUCCESS : INVALID_VALUE;
}

static size_t span(size_t pitch, size_t width, size_t height) { return pitch * (height - 1) + width; }

/* Fill in, check and submit one copy; waits for it if it is not really asynchronous. */
static int copy_locked(struct operation *op, const void *to, const void *from, int kind,
                       struct stream *stream, int64_t *counter) {
    bool async = counter != &count.copies;
    int error = resolve(to, span(op->to_pitch, op->width, op->height), &op->to, &op->memory[0],
                        &op->host[0]);
    if (!error)
        error = resolve(from, span(op->from_pitch, op->width, op->height), &op->from,
                        &op->memory[1], &op->host[1]);
    if (!error) error = check_direction(op, kind);
    if (error) return error;
    bool crosses = !op->memory[0] != !op->memory[1];
    bool pageable = crosses && !op->host[0] && !op->host[1];
    if (async && pageable) {
        if (strict_pinned) {
            count.refused_copies++;
            return NOT_REGISTERED;
        }
        count.unpinned_copies++;
    }
    for (int i = 0; i < 2; i++) {
        if (op->memory[i]) op->memory[i]->users++;
        if (op->host[i]) op->host[i]->users++;
    }
    *counter += 1;
    struct mark mark = submit(stream, op, (struct mark){0});
    if (!async || pageable) wait_for(mark); /* a GPU can't reach memory that may move */
    return SUCCESS;
}

static int copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                size_t height, int kind, void *handle, bool async) {
    if (!devices) return give(NO_DEVICE);
    if (width > to_pitch || width > from_pitch) return give(INVALID_VALUE);
    if (!width || !height) return SUCCESS;
    struct operation *op = calloc(1, sizeof *op);
    *op = (struct operation){
        .to_pitch = to_pitch, .from_pitch = from_pitch, .width = width, .height = height};
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    int error = stream ? answer(stream->device, SUCCESS) : INVALID_HANDLE;
    int64_t *counter = async ? &count.async_copies : &count.copies;
    if (!error) error = copy_locked(op, to, from, kind, stream, counter);
    if (error) free(op);
    return unlock_and_give(error ? error : answer(stream->device, SUCCESS));
}

int cudaMemcpy(void *to, const void *from, size_t nbytes, int kind) {
    return copy(to, nbytes, from, nbytes, nbytes, 1, kind, NULL, false);
}

int cudaMemcpyAsync(void *to, const void *from, size_t nbytes, int kind, void *stream) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    return copy(to, nbytes, from, nbytes, nbytes, 1, kind, stream, true);
}

int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                      size_t height, int kind, void *stream) {
    return copy(to, to_pitch, from, from_pitch, width, height, kind, stream, true);
}

/* The last first: within a batch there is no order. CUDA 13 has no `failed`, but the stream there. */
int cudaMemcpyBatchAsync(void **to, void **from, size_t *sizes, size_t number, const int *attributes,
                         const size_t *first, size_t kinds, void *failed, ...) {
    va_list more; /* a parameter that is not there would have its place in the caller's memory */
    va_start(more, failed);
    void *handle = runtime_version >= CUDA_13 ? failed : va_arg(more, void *);
    va_end(more);
    int refusal = refused(__func__);
    if (refusal) return refusal;
    if (!devices) return give(NO_DEVICE);
    if (batch_answer) return give(batch_answer);
    if (!number || kinds != 1 || *first || *attributes != 1 || (uintptr_t)handle <= LEGACY)
        return give(INVALID_VALUE);
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    int error = stream ? answer(stream->device, SUCCESS) : INVALID_HANDLE;
    count.copy_batches += !error;
    for (size_t i = number; i-- > 0 && !error;) {
        struct operation *op = calloc(1, sizeof *op);
        *op = (struct operation){
            .to_pitch = sizes[i], .from_pitch = sizes[i], .width = sizes[i], .height = 1};
        error = sizes[i] ? copy_locked(op, to[i], from[i], BY_ADDRESS, stream, &count.batched_copies)
                         : INVALID_VALUE;
        if (error) free(op);
        if (error && runtime_version < CUDA_13) *(size_t *)failed = i;
    }
    return unlock_and_give(error);
}

/* --- kernels ----------------------------------------------------------------------------------- */

/* Run a kernel behind what the stream has; device memory among its arguments stays until then. */
int simcuda_launch(kernel *function, const struct launch *launch, void *handle) {
    int refusal = refused(__func__);
    if (refusal) return refusal;
    if (!devices) return give(NO_DEVICE);
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    int error = stream ? answer(stream->device, SUCCESS) : INVALID_HANDLE;
    if (error) return unlock_and_give(error);
    struct operation *op = calloc(1, sizeof *op);
    *op = (struct operation){.kernel = function, .launch = *launch};
    for (int i = 0; i < MOST_ARGUMENTS; i++) {
        op->memory[i] = allocation_at((const void *)(uintptr_t)launch->arguments[i]);
        if (op->memory[i]) op->memory[i]->users++;
    }
    count.launches++;
    submit(stream, op, (struct mark){0});
    return unlock_and_give(SUCCESS);
}

/* --- devices and errors ------------------------------------------------------------------------ */

int cudaGetDeviceCount(int *number) {
    if (!number) return give(INVALID_VALUE);
    *number = devices;
    return give(devices ? SUCCESS : NO_DEVICE);
}

int cudaSetDevice(int device) {
    if (!devices) return give(NO_DEVICE);
    if (device < 0 || device >= devices) return give(INVALID_DEVICE);
    current = device;
    return refused(__func__);
}

int cudaGetDevice(int *device) {
    if (!device) return give(INVALID_VALUE);
    *device = current;
    return give(devices ? SUCCESS : NO_DEVICE);
}

int cudaThreadExchangeStreamCaptureMode(int *mode) {
    if (!mode || *mode < 0 || *mode > 2) return give(INVALID_VALUE);
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return SUCCESS;
}

int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    if (!text || length < 13) return give(INVALID_VALUE);
    if (device < 0 || device >= devices) return give(INVALID_DEVICE);
    snprintf(text, (size_t)length, "0000:%02X:00.0", 0x10 + (unsigned char)device);
    return SUCCESS;
}

int cudaDriverGetVersion(int *version) {
    if (!version) return give(INVALID_VALUE);
    *version = driver_version;
    return SUCCESS;
}

int cudaRuntimeGetVersion(int *version) {
    if (!version) return give(INVALID_VALUE);
    *version = runtime_version;
    return SUCCESS;
}

static size_t error_index(int code) {
    size_t known = sizeof ERRORS / sizeof *ERRORS;
    for (size_t i = 0; i < known; i++)
        if (ERRORS[i].code == code) return i;
    return known - 1;
}

const char *cudaGetErrorName(int code) { return ERRORS[error_index(code)].name; }

const char *cudaGetErrorString(int code) { return ERRORS[error_index(code)].text; }

int cudaGetLastError(void) {
    int error = last_error;
    last_error = SUCCESS;
    return error;
}

/* --- control ----------------------------------------------------------------------------------- */

static int set_held(void *handle, bool held) {
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    if (stream) stream->held = held;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return stream ? SUCCESS : INVALID_HANDLE;
}

/* Nothing new starts on this stream until it is released; handle 0 is the default stream. */
int simcuda_hold(void *stream) { return set_held(stream, true); }

int simcuda_release(void *stream) { return set_held(stream, false); }

/* The same for every stream that there is or will be; let go, it frees those held by name too. */
void simcuda_hold_all(int held) {
    pthread_mutex_lock(&lock);
    all_held = held;
    for (struct stream *s = streams; s && !held; s = s->next) s->held = false;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* Wait until a counter has reached this: 0, or ETIMEDOUT. */
int simcuda_wait_counter(int index, int64_t least, int64_t timeout_ms) {
    return wait_until((const int64_t *)&count + index, least, timeout_ms, &lock, &changed);
}

void simcuda_set_copy_delay_us(int64_t delay_us) {
    pthread_mutex_lock(&lock);
    copy_delay_us = delay_us;
    pthread_mutex_unlock(&lock);
}

/* Let calls of this function fail, `times` of them (less than 0: for ever) after the next `skip`. */
int simcuda_refuse(const char *function, int error, int64_t skip, int64_t times) {
    pthread_mutex_lock(&lock);
    bool room = refusal_count < sizeof refusals / sizeof *refusals &&
                strlen(function) < sizeof refusals->function;
    if (room) {
        strcpy(refusals[refusal_count].function, function);
        refusals[refusal_count].error = error;
        refusals[refusal_count].skip = skip;
        refusals[refusal_count++].left = times;
    }
    pthread_mutex_unlock(&lock);
    return room ? SUCCESS : INVALID_VALUE;
}

/* Some thread captures a graph, in the mode that torch does it in. */
void simcuda_capture(int whether) {
    pthread_mutex_lock(&lock);
    capturing = whether;
    pthread_mutex_unlock(&lock);
}

void simcuda_set_strict_pinned(int strict) {
    pthread_mutex_lock(&lock);
    strict_pinned = strict;
    pthread_mutex_unlock(&lock);
}

/* Refuse nothing, and be as if no kernel had ever failed; with CUDA only a new process is. */
void simcuda_heal(void) {
    pthread_mutex_lock(&lock);
    refusal_count = 0;
    capturing = false;
    memset(failure, 0, sizeof failure);
    pthread_mutex_unlock(&lock);
}

/* Look into device memory now, past every stream. 0, or cuFile's error for the range. */
int simcuda_peek(void *to, const void *address, size_t nbytes) {
    struct simcuda_range range;
    int error = simcuda_use(address, nbytes, &range);
    if (error || !range.on_device) return error ? error : CUFILE_BAD_POINTER;
    memcpy(to, range.bytes, nbytes);
    simcuda_unuse(&range);
    return 0;
}

const char *simcuda_counter_name(int index) { return counter_names[index]; }

int64_t simcuda_counter(int index) {
    pthread_mutex_lock(&lock);
    int64_t value = ((const int64_t *)&count)[index];
    pthread_mutex_unlock(&lock);
    return value;
}
