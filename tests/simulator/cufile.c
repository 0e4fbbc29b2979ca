/* A libcufile.so.0 for machines without a GPU: pread and pwrite on what stands for device memory.
 *
 * Everything that can go wrong can be made to: see `struct rule`, and `settings`. What would be
 * undefined with the real one (memory or a handle that goes while an operation uses it) is counted.
 *
 * `lock` guards everything; `changed` tells of every change. The I/O itself runs without it, and a
 * file is freed by its last user.
 */

#define _GNU_SOURCE
#include "simulator.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    NO_DRIVER = 5001,
    CONTEXT_MISMATCH = 5015,
    INVALID_FILE_TYPE = 5018,
    INVALID_VALUE = 5022,
    MEMORY_ALREADY_REGISTERED = 5023,
    MEMORY_NOT_REGISTERED = 5024,
    HANDLE_NOT_REGISTERED = 5027,
    HANDLE_ALREADY_REGISTERED = 5028,
    GETNEWFD_FAILED = 5031,
    SUBMIT_FAILED = 5035,
    PINNING_FAILED = 5036,
    BATCH_FULL = 5037,
    ERRORS_FROM = 5000, /* below it, an error is an errno */
};

enum { CANCELED = 8, COMPLETE = 16, FAILED = 64 };
enum { READ, WRITE, OPERATIONS };
enum { OPAQUE_FD = 1, MAX_BATCH = 128, PAGE = 4096, VERSION = 1014, RULES = 16, HANG = -1 };
enum { NVME = 1 << 4, NVME_P2P = 1 << 11, ALLOW_COMPAT = 1 << 1 };

/* The layouts of CUDA 12's cufile.h. */
struct error {
    int code, cuda;
};
struct description {
    int type;
    union {
        int fd;
        void *handle;
    };
    const void *operations;
};
struct properties {
    struct {
        unsigned major, minor;
        size_t poll_threshold, max_direct_io;
        unsigned status_flags, control_flags;
    } nvfs;
    unsigned features, max_device_cache, per_buffer_cache, max_pinned, max_batch, batch_timeout_ms;
};
struct request {
    int mode;
    void *address;
    off_t file_offset, memory_offset;
    size_t nbytes;
    void *file;
    int operation;
    void *cookie;
};
struct outcome {
    void *cookie;
    int status;
    size_t result;
};

struct file {
    struct file *next;
    int fd, unaligned_fd, flags;
    dev_t device;
    ino_t inode;
    unsigned users;
    bool gone;
};

struct buffer {
    struct buffer *next;
    char *address;
    size_t nbytes;
    bool on_device;
    unsigned users;
};

struct entry {
    struct request request;
    struct outcome outcome;
    bool reported;
};

struct batch {
    struct batch *next;
    struct entry *entries;
    unsigned size, submitted, started, done, reported;
    bool closing, working, cancelled;
};

/* What happens to operations of a kind: the oldest rule that applies decides. */
struct rule {
    enum { NONE, SHORT, ERROR, DELAY, HOLD } what;
    int operation;
    int64_t value; /* bytes fewer; errno or cuFile error; microseconds */
    int64_t skip, left; /* left < 0: no end */
};

static const char *const WHAT[] = {"none", "short", "error", "delay", "hold"};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static struct file *files;
static struct buffer *buffers;
static struct batch *batches;
static struct rule rules[RULES];
static unsigned rule_count;
static uint64_t released; /* how often what was held was let go */
static int64_t release_error;
static long use_count;

static struct {
    int driver_open, handle_register, buffer_register; /* error to answer with; 0: none */
    size_t buffer_bytes; /* no more of it in one registration; 0: no limit */
    size_t bar_bytes; /* more device memory than this can't be registered at a time; 0: no limit */
    enum { NVFS, P2PDMA, COMPAT } path;
} settings;

#define COUNTERS(C) \
    C(driver_opens) C(driver_closes) C(live_handles) C(live_buffers) C(registered_bytes) \
    C(reads) C(writes) C(bytes_read) C(bytes_written) C(batches) C(bounced) C(unaligned) \
    C(faults) C(held) C(in_flight) C(most_in_flight) C(deregistered_in_use) \
    C(freed_while_registered) C(closed_while_registered) C(opens_waiting)
#define FIELD(name) int64_t name;
#define NAME(name) #name,
static struct { COUNTERS(FIELD) } count;
static const char *const counter_names[] = {COUNTERS(NAME) NULL};

static struct error give(int code) { return (struct error){code, 0}; }

static struct error unlock_and_give(int code) {
    pthread_mutex_unlock(&lock);
    return give(code);
}

/* --- faults ------------------------------------------------------------------------------------ */

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 0) : otherwise;
}

static bool is(const char *name, const char *value) {
    const char *text = getenv(name);
    return text && !strcasecmp(text, value);
}

static int what_of(const char *name) {
    for (int what = SHORT; what <= HOLD; what++)
        if (!strcmp(name, WHAT[what])) return what;
    return NONE;
}

static int add_rule(struct rule rule) {
    if (rule_count == RULES || rule.what == NONE) return EINVAL;
    rules[rule_count++] = rule;
    return 0;
}

/* "what:value:skip:count", several of them with commas; all but the first word may be left out. */
static void read_rules(const char *name, int operation) {
    char *text = getenv(name) ? strdup(getenv(name)) : NULL, *outer = NULL;
    for (char *part = text ? strtok_r(text, ",", &outer) : NULL; part;
         part = strtok_r(NULL, ",", &outer)) {
        char word[8] = "";
        long value = 0, skip = 0, left = -1;
        sscanf(part, "%7[a-z]:%ld:%ld:%ld", word, &value, &skip, &left);
        if (add_rule((struct rule){what_of(word), operation, value, skip, left})) {
            fprintf(stderr, "simulated libcufile: %s=%s is no fault\n", name, part);
            abort();
        }
    }
    free(text);
}

__attribute__((constructor)) static void start(void) {
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &clock);
    settings.driver_open =
        is("SIMCUDA_DRIVER_OPEN", "hang") ? HANG : (int)setting("SIMCUDA_DRIVER_OPEN", 0);
    settings.handle_register = (int)setting("SIMCUDA_HANDLE_REGISTER", 0);
    settings.buffer_register = (int)setting("SIMCUDA_BUFFER_REGISTER", 0);
    settings.bar_bytes = (size_t)setting("SIMCUDA_BAR_BYTES", 0);
    settings.buffer_bytes = (size_t)setting("SIMCUDA_BUFFER_BYTES", 0);
    settings.path = is("SIMCUDA_PATH", "compat") ? COMPAT
                    : is("SIMCUDA_PATH", "p2pdma") ? P2PDMA
                                                   : NVFS;
    read_rules("SIMCUDA_READ", READ);
    read_rules("SIMCUDA_WRITE", WRITE);
}

static struct rule take_rule(int operation) {
    for (unsigned i = 0; i < rule_count; i++) {
        struct rule *rule = &rules[i];
        if (rule->operation != operation || !rule->left) continue;
        if (rule->skip > 0) {
            rule->skip--;
            continue;
        }
        if (rule->left > 0) rule->left--;
        count.faults++;
        return *rule;
    }
    return (struct rule){0};
}

/* Do what the rules say before the I/O; returns an error, and how many bytes not to move. */
static int64_t suffer(int operation, size_t *fewer) {
    int64_t error = 0;
    pthread_mutex_lock(&lock);
    struct rule rule = take_rule(operation);
    if (rule.what == HOLD) {
        uint64_t turn = released;
        count.held++;
        pthread_cond_broadcast(&changed);
        while (turn == released) pthread_cond_wait(&changed, &lock);
        count.held--;
        error = release_error;
    }
    pthread_mutex_unlock(&lock);
    if (rule.what == DELAY) {
        struct timespec delay = {rule.value / 1000000, rule.value % 1000000 * 1000};
        nanosleep(&delay, NULL);
    }
    if (rule.what == SHORT) *fewer = (size_t)rule.value;
    return rule.what == ERROR ? rule.value : error;
}

/* --- the driver -------------------------------------------------------------------------------- */

/* As the environment had it when the driver was opened. */
static bool compat_forced, compat_refused;

static int path(void) { return compat_forced ? COMPAT : settings.path; }

static bool compat_allowed(void) { return !compat_refused; }

static int open_driver(void) {
    if (!use_count) {
        compat_forced = is("CUFILE_FORCE_COMPAT_MODE", "true");
        compat_refused = is("CUFILE_ALLOW_COMPAT_MODE", "false");
    }
    count.opens_waiting++;
    pthread_cond_broadcast(&changed);
    while (settings.driver_open == HANG) pthread_cond_wait(&changed, &lock);
    count.opens_waiting--;
    if (settings.driver_open) return settings.driver_open;
    if (path() == COMPAT && !compat_allowed()) return NO_DRIVER;
    use_count++;
    count.driver_opens++;
    return SUCCESS;
}

struct error cuFileDriverOpen(void) {
    pthread_mutex_lock(&lock);
    return unlock_and_give(open_driver());
}

static void drop_file(struct file *file);
static void drop_buffer(struct buffer *buffer);

struct error cuFileDriverClose_v2(void) {
    pthread_mutex_lock(&lock);
    if (!use_count) return unlock_and_give(NO_DRIVER);
    count.driver_closes++;
    if (!--use_count) {
        while (files) drop_file(files);
        while (buffers) drop_buffer(buffers);
    }
    return unlock_and_give(SUCCESS);
}

struct error cuFileDriverClose(void) { return cuFileDriverClose_v2(); }

long cuFileUseCount(void) {
    pthread_mutex_lock(&lock);
    long number = use_count;
    pthread_mutex_unlock(&lock);
    return number;
}

struct error cuFileGetVersion(int *version) {
    if (!version) return give(INVALID_VALUE);
    *version = VERSION;
    return give(SUCCESS);
}

struct error cuFileDriverGetProperties(struct properties *properties) {
    if (!properties) return give(INVALID_VALUE);
    pthread_mutex_lock(&lock);
    if (!use_count) return unlock_and_give(NO_DRIVER);
    memset(properties, 0, sizeof *properties);
    if (path() == NVFS) {
        properties->nvfs.major = 2;
        properties->nvfs.minor = 25;
        properties->nvfs.status_flags = NVME;
    }
    if (path() == P2PDMA) properties->nvfs.status_flags = NVME_P2P;
    if (compat_allowed()) properties->nvfs.control_flags = ALLOW_COMPAT;
    properties->nvfs.poll_threshold = 4;
    properties->nvfs.max_direct_io = 16384;
    properties->max_device_cache = 131072;
    properties->per_buffer_cache = 1024;
    properties->max_pinned =
        settings.bar_bytes ? (unsigned)(settings.bar_bytes / 1024) : 33554432;
    properties->max_batch = MAX_BATCH;
    return unlock_and_give(SUCCESS);
}

/* --- registrations ----------------------------------------------------------------------------- */

static struct file *file_of(const void *handle) {
    for (struct file *file = files; file; file = file->next)
        if (file == handle) return file;
    return NULL;
}

static void unuse_file(struct file *file) {
    if (--file->users || !file->gone) return;
    if (file->unaligned_fd >= 0) close(file->unaligned_fd);
    free(file);
}

static void drop_file(struct file *file) {
    struct file **link = &files;
    while (*link != file) link = &(*link)->next;
    *link = file->next;
    file->gone = true;
    count.live_handles--;
    struct stat now;
    if (fstat(file->fd, &now) || now.st_dev != file->device || now.st_ino != file->inode)
        count.closed_while_registered++;
    if (file->users > 1) count.deregistered_in_use++;
    unuse_file(file);
}

static int check_descriptor(const struct description *description, int *flags,
                            struct stat *status) {
    if (!description || description->type != OPAQUE_FD) return INVALID_VALUE;
    *flags = fcntl(description->fd, F_GETFL);
    if (*flags < 0 || fstat(description->fd, status)) return INVALID_VALUE;
    if (!S_ISREG(status->st_mode) && !S_ISBLK(status->st_mode)) return INVALID_FILE_TYPE;
    for (struct file *file = files; file; file = file->next)
        if (file->fd == description->fd) return HANDLE_ALREADY_REGISTERED;
    return SUCCESS;
}

/* A descriptor for what O_DIRECT does not take; the real one bounces that as well. */
static int reopen(int fd, int flags) {
    char name[32];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    return open(name, (flags & O_ACCMODE) | O_CLOEXEC);
}

struct error cuFileHandleRegister(void **handle, const struct description *description) {
    int flags = 0;
    struct stat status;
    if (!handle) return give(INVALID_VALUE);
    pthread_mutex_lock(&lock);
    int error = use_count ? SUCCESS : open_driver();
    if (!error) error = settings.handle_register;
    if (!error) error = check_descriptor(description, &flags, &status);
    if (error) return unlock_and_give(error);
    int unaligned = flags & O_DIRECT ? reopen(description->fd, flags) : -1;
    if (flags & O_DIRECT && unaligned < 0) return unlock_and_give(GETNEWFD_FAILED);
    struct file *file = calloc(1, sizeof *file);
    *file = (struct file){files,         description->fd, unaligned, flags,
                          status.st_dev, status.st_ino,   1,         false};
    *handle = files = file;
    count.live_handles++;
    return unlock_and_give(SUCCESS);
}

void cuFileHandleDeregister(void *handle) {
    pthread_mutex_lock(&lock);
    struct file *file = file_of(handle);
    if (file) drop_file(file);
    pthread_mutex_unlock(&lock);
}

static void drop_buffer(struct buffer *buffer) {
    struct buffer **link = &buffers;
    while (*link != buffer) link = &(*link)->next;
    *link = buffer->next;
    count.live_buffers--;
    if (buffer->on_device) count.registered_bytes -= (int64_t)buffer->nbytes;
    if (buffer->users) count.deregistered_in_use++;
    buffer->address = NULL;
    if (!buffer->users) free(buffer);
}

static int check_buffer(const void *address, size_t nbytes, bool *on_device) {
    struct simcuda_range range;
    if (!address || !nbytes) return INVALID_VALUE;
    int error = simcuda_use(address, nbytes, &range);
    if (error) return error;
    *on_device = range.on_device;
    if (!range.on_device) return SUCCESS;
    simcuda_unuse(&range);
    if (range.device != simcuda_current()) return CONTEXT_MISMATCH;
    size_t taken = (size_t)count.registered_bytes;
    if (settings.buffer_bytes && nbytes > settings.buffer_bytes) return PINNING_FAILED;
    if (settings.bar_bytes && nbytes + taken > settings.bar_bytes) return PINNING_FAILED;
    return SUCCESS;
}

struct error cuFileBufRegister(const void *address, size_t nbytes, int flags) {
    bool on_device = false;
    (void)flags;
    pthread_mutex_lock(&lock);
    int error = use_count ? SUCCESS : open_driver();
    if (!error) error = settings.buffer_register;
    if (!error) error = check_buffer(address, nbytes, &on_device);
    for (struct buffer *b = buffers; b && !error; b = b->next)
        if (b->address == address) error = MEMORY_ALREADY_REGISTERED;
    if (error) return unlock_and_give(error);
    struct buffer *buffer = calloc(1, sizeof *buffer);
    *buffer = (struct buffer){buffers, (char *)address, nbytes, on_device, 0};
    buffers = buffer;
    count.live_buffers++;
    if (on_device) count.registered_bytes += (int64_t)nbytes;
    return unlock_and_give(SUCCESS);
}

struct error cuFileBufDeregister(const void *address) {
    pthread_mutex_lock(&lock);
    struct buffer *buffer = buffers;
    while (buffer && buffer->address != address) buffer = buffer->next;
    if (!buffer) return unlock_and_give(MEMORY_NOT_REGISTERED);
    struct simcuda_range range;
    if (simcuda_use(buffer->address, buffer->nbytes, &range)) count.freed_while_registered++;
    if (range.on_device) simcuda_unuse(&range);
    drop_buffer(buffer);
    return unlock_and_give(SUCCESS);
}

/* --- reading and writing ----------------------------------------------------------------------- */

/* Everything that one operation holds on to while it runs. */
struct passage {
    struct file *file;
    struct buffer *buffer;
    struct simcuda_range range;
};

static int enter(struct passage *passage, int operation, void *handle, char *address,
                 size_t nbytes, off_t offset) {
    int error = simcuda_use(address, nbytes, &passage->range);
    if (error) return error;
    pthread_mutex_lock(&lock);
    passage->file = file_of(handle);
    if (!passage->file) {
        pthread_mutex_unlock(&lock);
        if (passage->range.on_device) simcuda_unuse(&passage->range);
        return HANDLE_NOT_REGISTERED;
    }
    passage->file->users++;
    struct buffer *b = buffers;
    while (b && !(address >= b->address && nbytes <= b->nbytes &&
                  (size_t)(address - b->address) <= b->nbytes - nbytes))
        b = b->next;
    passage->buffer = b;
    if (b) b->users++;
    if (!b && passage->range.on_device) count.bounced++;
    if ((nbytes | (size_t)offset | (uintptr_t)address) % PAGE) count.unaligned++;
    *(operation == READ ? &count.reads : &count.writes) += 1;
    if (++count.in_flight > count.most_in_flight) count.most_in_flight = count.in_flight;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

static void leave(struct passage *passage, int operation, ssize_t moved) {
    pthread_mutex_lock(&lock);
    if (moved > 0) *(operation == READ ? &count.bytes_read : &count.bytes_written) += moved;
    count.in_flight--;
    unuse_file(passage->file);
    if (passage->buffer && !--passage->buffer->users && !passage->buffer->address)
        free(passage->buffer);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    if (passage->range.on_device) simcuda_unuse(&passage->range);
}

/* All of it, or as much as there is; minus errno. */
static ssize_t move(const struct file *file, int operation, char *bytes, size_t nbytes,
                    off_t offset) {
    size_t moved = 0;
    bool aligned = !((nbytes | (size_t)offset | (uintptr_t)bytes) % PAGE);
    int fd = aligned || file->unaligned_fd < 0 ? file->fd : file->unaligned_fd;
    while (moved < nbytes) {
        ssize_t got = operation == READ
                          ? pread(fd, bytes + moved, nbytes - moved, offset + (off_t)moved)
                          : pwrite(fd, bytes + moved, nbytes - moved, offset + (off_t)moved);
        if (got < 0 && errno == EINTR) continue;
        /* An odd end of file leaves a position that O_DIRECT refuses: that is the end. */
        if (got < 0 && !(errno == EINVAL && moved)) return -errno;
        if (got <= 0) break;
        moved += (size_t)got;
    }
    return (ssize_t)moved;
}

/* Bytes moved, or minus an errno or cuFile error. */
static int64_t transfer(int operation, void *handle, char *address, size_t nbytes, off_t offset) {
    struct passage passage = {0};
    size_t fewer = 0;
    int64_t result = -enter(&passage, operation, handle, address, nbytes, offset);
    if (result) return result;
    result = -suffer(operation, &fewer);
    if (!result && fewer < nbytes)
        result = move(passage.file, operation, passage.range.bytes, nbytes - fewer, offset);
    leave(&passage, operation, result);
    return result;
}

/* As cuFileRead answers: a cuFile error as it is, an errno as -1. */
static ssize_t answer(int64_t result) {
    if (result >= 0 || result < -ERRORS_FROM) return result;
    errno = (int)-result;
    return -1;
}

ssize_t cuFileRead(void *file, void *address, size_t nbytes, off_t offset, off_t memory_offset) {
    return answer(transfer(READ, file, (char *)address + memory_offset, nbytes, offset));
}

ssize_t cuFileWrite(void *file, const void *address, size_t nbytes, off_t offset,
                    off_t memory_offset) {
    return answer(transfer(WRITE, file, (char *)address + memory_offset, nbytes, offset));
}

/* --- batches ----------------------------------------------------------------------------------- */

static void settle(struct batch *batch, struct entry *entry, int status, int64_t result) {
    entry->outcome = (struct outcome){entry->request.cookie, status, (size_t)result};
    batch->done++;
    pthread_cond_broadcast(&changed);
}

static void *work(void *argument) {
    struct batch *batch = argument;
    pthread_mutex_lock(&lock);
    while (batch->started < batch->submitted) {
        struct entry *entry = &batch->entries[batch->started++];
        struct request *r = &entry->request;
        char *address = (char *)r->address + r->memory_offset;
        pthread_mutex_unlock(&lock);
        int64_t result = transfer(r->operation, r->file, address, r->nbytes, r->file_offset);
        pthread_mutex_lock(&lock);
        settle(batch, entry, result < 0 ? FAILED : COMPLETE, result);
    }
    batch->working = false;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static struct batch *batch_of(const void *handle) {
    for (struct batch *batch = batches; batch; batch = batch->next)
        if (batch == handle && !batch->closing) return batch;
    return NULL;
}

struct error cuFileBatchIOSetUp(void **handle, unsigned size) {
    if (!handle || !size || size > MAX_BATCH) return give(INVALID_VALUE);
    pthread_mutex_lock(&lock);
    if (!use_count) return unlock_and_give(NO_DRIVER);
    struct batch *batch = calloc(1, sizeof *batch);
    *batch = (struct batch){
        .next = batches, .entries = calloc(size, sizeof(struct entry)), .size = size};
    *handle = batches = batch;
    return unlock_and_give(SUCCESS);
}

static int check_request(const struct request *r) {
    struct simcuda_range range;
    struct file *file = file_of(r->file);
    if (!file) return HANDLE_NOT_REGISTERED;
    if (r->operation != READ && r->operation != WRITE) return INVALID_VALUE;
    int unwanted = r->operation == READ ? O_WRONLY : O_RDONLY;
    if ((file->flags & O_ACCMODE) == unwanted) return SUBMIT_FAILED;
    int error = simcuda_use((char *)r->address + r->memory_offset, r->nbytes, &range);
    if (!error && range.on_device) simcuda_unuse(&range);
    return error;
}

static int begin(struct batch *batch, const struct request *requests, unsigned number) {
    if (batch->done == batch->submitted &&
        (batch->reported == batch->submitted || batch->cancelled)) {
        batch->submitted = batch->started = batch->done = batch->reported = 0;
        batch->cancelled = false;
    }
    if (number > batch->size - batch->submitted) return BATCH_FULL;
    for (unsigned i = 0; i < number; i++) {
        int error = check_request(&requests[i]);
        if (error) return error;
    }
    for (unsigned i = 0; i < number; i++)
        batch->entries[batch->submitted++] = (struct entry){.request = requests[i]};
    count.batches++;
    pthread_t thread;
    if (batch->working) return SUCCESS;
    if (pthread_create(&thread, NULL, work, batch)) return SUBMIT_FAILED;
    pthread_detach(thread);
    batch->working = true;
    return SUCCESS;
}

struct error cuFileBatchIOSubmit(void *handle, unsigned number, struct request *requests,
                                 unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    struct batch *batch = batch_of(handle);
    return unlock_and_give(batch && number && requests ? begin(batch, requests, number)
                                                       : INVALID_VALUE);
}

static unsigned report(struct batch *batch, struct outcome *outcomes, unsigned most) {
    unsigned number = 0;
    for (unsigned i = 0; i < batch->submitted && number < most; i++) {
        struct entry *entry = &batch->entries[i];
        if (entry->reported || !entry->outcome.status) continue;
        entry->reported = true;
        batch->reported++;
        outcomes[number++] = entry->outcome;
    }
    return number;
}

struct error cuFileBatchIOGetStatus(void *handle, unsigned least, unsigned *number,
                                    struct outcome *outcomes, struct timespec *timeout) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    if (timeout) {
        until.tv_sec += timeout->tv_sec + (until.tv_nsec + timeout->tv_nsec) / 1000000000;
        until.tv_nsec = (until.tv_nsec + timeout->tv_nsec) % 1000000000;
    }
    pthread_mutex_lock(&lock);
    struct batch *batch = batch_of(handle);
    if (!batch || !number || !outcomes) return unlock_and_give(INVALID_VALUE);
    int error = 0;
    while (!error && batch->done < batch->submitted && batch->done - batch->reported < least)
        error = timeout ? pthread_cond_timedwait(&changed, &lock, &until)
                        : pthread_cond_wait(&changed, &lock);
    *number = report(batch, outcomes, *number);
    return unlock_and_give(SUCCESS);
}

static void cancel(struct batch *batch) {
    while (batch->started < batch->submitted)
        settle(batch, &batch->entries[batch->started++], CANCELED, -ECANCELED);
}

struct error cuFileBatchIOCancel(void *handle) {
    pthread_mutex_lock(&lock);
    struct batch *batch = batch_of(handle);
    if (batch) cancel(batch); /* what has started runs to its end */
    if (batch) batch->cancelled = true;
    return unlock_and_give(batch ? SUCCESS : INVALID_VALUE);
}

void cuFileBatchIODestroy(void *handle) {
    pthread_mutex_lock(&lock);
    struct batch *batch = batch_of(handle), **link = &batches;
    if (batch) {
        batch->closing = true;
        cancel(batch);
        while (batch->working) pthread_cond_wait(&changed, &lock);
        while (*link != batch) link = &(*link)->next;
        *link = batch->next;
        free(batch->entries);
        free(batch);
    }
    pthread_mutex_unlock(&lock);
}

/* --- control ----------------------------------------------------------------------------------- */

/* Error codes to answer with, 0 for none; a driver that opens with -1 hangs until that changes. */
void simcufile_set(int driver_open, int handle_register, int buffer_register,
                   size_t buffer_bytes, size_t bar_bytes) {
    pthread_mutex_lock(&lock);
    settings.driver_open = driver_open;
    settings.handle_register = handle_register;
    settings.buffer_register = buffer_register;
    settings.buffer_bytes = buffer_bytes;
    settings.bar_bytes = bar_bytes;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

int simcufile_fault(int operation, const char *what, int64_t value, int64_t skip, int64_t times) {
    pthread_mutex_lock(&lock);
    int error = operation < READ || operation >= OPERATIONS
                    ? EINVAL
                    : add_rule((struct rule){what_of(what), operation, value, skip, times});
    pthread_mutex_unlock(&lock);
    return error;
}

/* Let go of what is held, to run or to fail with this error, and hold nothing more. */
void simcufile_release(int64_t error) {
    pthread_mutex_lock(&lock);
    unsigned kept = 0;
    for (unsigned i = 0; i < rule_count; i++)
        if (rules[i].what != HOLD) rules[kept++] = rules[i];
    rule_count = kept;
    release_error = error;
    released++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* No rules any more, nothing held. */
void simcufile_clear(void) {
    simcufile_release(0);
    pthread_mutex_lock(&lock);
    rule_count = 0;
    pthread_mutex_unlock(&lock);
}

/* Wait until a counter has reached this: 0, or ETIMEDOUT. */
int simcufile_wait_counter(int index, int64_t least, int64_t timeout_ms) {
    return wait_until((const int64_t *)&count + index, least, timeout_ms, &lock, &changed);
}

const char *simcufile_counter_name(int index) { return counter_names[index]; }

int64_t simcufile_counter(int index) {
    pthread_mutex_lock(&lock);
    int64_t value = ((const int64_t *)&count)[index];
    pthread_mutex_unlock(&lock);
    return value;
}
