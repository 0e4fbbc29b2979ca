// What a GPU does for blocks that are scattered over its memory: checksums and copies.
//
//   kvgds_copy    copies many pieces at once
//
// XXH3-128 (seed 0, default secret) is made by three kernels in a row.
//
//   kvgds_sums    adds up the stripes of every KiB, which is all the reading of payload there is
//   kvgds_chain   runs each block's eight lanes through its sums, one scramble a KiB
//   kvgds_digest  merges the eight lanes into 16 bytes, in xxhash's canonical order
//
// Within a KiB XXH3 only adds to its lanes, mod 2^64, so those sums need no order and no state. What
// follows the last whole KiB, the last stripe included, is only added as well: it makes one more
// row of sums, and the chain ends without a scramble after it.
//
// No kernel has a barrier, a shuffle or shared memory: threads of one kernel never see each other's
// writes. So a loop over the grid, in any order, runs the same code on a CPU; the tests do that. They
// check every load and store, so memory is touched through intrinsics alone; __stwb is a plain store.
//
// `table`, in 64-bit words: for each block [first fragment, fragments, bytes, first row of sums],
// then for each fragment [address - start, end], where start and end are its place in its block.
// Blocks are longer than 240 bytes. Fragments may have any address and length; where 16 bytes lie
// in one fragment on an address that 16 divides, they are one load, else sixteen.
//
// Cost (arithmetic, not measured; an H200: 132 SMs, 1.7 GHz, 4.8 TB/s). In a step of the chain four
// instructions wait for each other (ptxas for sm_90: shift, xor, wide multiply-add, add), 4 to 5
// cycles each: 18 cycles, 10.6 ns. 2 MiB are 2,047 steps: 22 us. Of 64 blocks each has a warp of its
// own, on an SM of its own, so 64 of 2 MiB take 22 us as well, where the sums take 128 MiB /
// 4.8 TB/s = 28 us at best. One block of 64 MiB is 65,535 steps: 0.7 ms, 97 GB/s; only more blocks
// at once make that more. Copies and launches add some microseconds each.
// A chain reads 64 bytes a step, 10 to 32 steps (180 to 580 cycles) before it needs them, where a
// hit of the L2 takes some 270: up to a third more time if they are late. A miss takes longer, so
// payload is read as evict-first: the sums, a 16th of it, are to stay.

typedef unsigned long long u64;
typedef unsigned int u32;

#define KIB 1024
#define STRIPE 64
#define STRIPES 16
#define AHEAD 32
#define HEADER 4
#define COPY_THREADS 128
#define COPY_LOADS 8
#define SECRET_BYTES 192

#define P32_1 0x9E3779B1u
#define P32_2 0x85EBCA77u
#define P32_3 0xC2B2AE3Du
#define P64_1 0x9E3779B185EBCA87ull
#define P64_2 0xC2B2AE3D27D4EB4Full
#define P64_3 0x165667B19E3779F9ull
#define P64_4 0x85EBCA77C2B2AE63ull
#define P64_5 0x27D4EB2F165667C5ull

static __device__ const u64 SECRET[SECRET_BYTES / 8] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

static __device__ const u64 START[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

// The secret's eight bytes at an offset that 8 need not divide.
static __device__ __forceinline__ u64 secret_at(u32 offset) {
    u32 word = offset / 8, bits = offset % 8 * 8;
    u64 low = __ldg(&SECRET[word]);
    return bits ? low >> bits | __ldg(&SECRET[word + 1]) << (64 - bits) : low;
}

// A place in a block's payload that moves forward through its fragments.
struct Cursor {
    const u64* next;  // the fragment after this one
    u64 base, end;
};

static __device__ __forceinline__ void step(Cursor& at) {
    at.base = __ldg(at.next);
    at.end = __ldg(at.next + 1);
    at.next += 2;
}

static __device__ __forceinline__ Cursor seek(const u64* fragments, u64 count, u64 offset) {
    u64 low = 0, high = count - 1;  // the first fragment that ends behind the offset
    while (low < high) {
        u64 middle = (low + high) / 2;
        if (__ldg(fragments + 2 * middle + 1) > offset) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Cursor at = {fragments + 2 * low, 0, 0};
    step(at);
    return at;
}

static __device__ __forceinline__ ulonglong2 pair_at(Cursor& at, u64 offset) {
    while (at.end <= offset) step(at);
    u64 address = at.base + offset;
    if (offset + 16 <= at.end && address % 16 == 0) {
        return __ldcs(reinterpret_cast<const ulonglong2*>(address));
    }
    u64 words[2] = {0, 0};
    for (u32 i = 0; i < 16; i++) {
        while (at.end <= offset + i) step(at);
        u64 byte = __ldg(reinterpret_cast<const unsigned char*>(at.base + offset + i));
        if (i < 8) {
            words[0] |= byte << (8 * i);
        } else {
            words[1] |= byte << (8 * (i - 8));
        }
    }
    ulonglong2 pair;
    pair.x = words[0];
    pair.y = words[1];
    return pair;
}

// A data word is added to its lane's neighbour, so two lanes that share 16 bytes need no others.
static __device__ __forceinline__ void accumulate(ulonglong2& sum, ulonglong2 data, u64 key0,
                                                  u64 key1) {
    u64 mixed0 = data.x ^ key0, mixed1 = data.y ^ key1;
    sum.x += data.y + (mixed0 & 0xFFFFFFFFu) * (mixed0 >> 32);
    sum.y += data.x + (mixed1 & 0xFFFFFFFFu) * (mixed1 >> 32);
}

// Four threads a KiB, two lanes each; blockIdx.y is the block. Four neighbours read one stripe, a
// warp one stripe of each of eight KiB, and each thread has all its sixteen loads in flight.
extern "C" __global__ void __launch_bounds__(64, 8)
    kvgds_sums(const u64* table, u32 blocks, ulonglong2* sums) {
    const u64* block = table + HEADER * blockIdx.y;
    u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 row = thread / 4, nbytes = __ldg(block + 2), last = (nbytes - 1) / KIB;
    if (row > last) return;
    u32 pair = thread % 4;
    const u64* fragments = table + HEADER * (u64)blocks + 2 * __ldg(block);
    u64 count = __ldg(block + 1), offset = row * KIB + pair * 16;
    Cursor at = seek(fragments, count, offset);
    u64 here = at.base + offset;
    ulonglong2 sum;
    sum.x = sum.y = 0;
    if (row < last && offset + (STRIPES - 1) * STRIPE + 16 <= at.end && here % 16 == 0) {
        const ulonglong2* data = reinterpret_cast<const ulonglong2*>(here);
        ulonglong2 loaded[STRIPES];
#pragma unroll
        for (u32 i = 0; i < STRIPES; i++) loaded[i] = __ldcs(data + i * (STRIPE / 16));
        u64 key = __ldg(&SECRET[2 * pair]);
#pragma unroll
        for (u32 i = 0; i < STRIPES; i++) {
            u64 following = __ldg(&SECRET[2 * pair + i + 1]);
            accumulate(sum, loaded[i], key, following);
            key = following;
        }
    } else {
        u32 stripes = row < last ? STRIPES : (u32)((nbytes - 1 - row * KIB) / STRIPE);
        for (u32 i = 0; i < stripes; i++) {
            ulonglong2 data = pair_at(at, offset + i * STRIPE);
            accumulate(sum, data, __ldg(&SECRET[2 * pair + i]), __ldg(&SECRET[2 * pair + i + 1]));
        }
    }
    if (row == last) {  // the last 64 bytes, wherever they begin, have keys of their own
        u64 tail = nbytes - STRIPE + pair * 16;
        u32 key = SECRET_BYTES - STRIPE - 7 + pair * 16;
        Cursor end = seek(fragments, count, tail);
        accumulate(sum, pair_at(end, tail), secret_at(key), secret_at(key + 8));
    }
    __stwb(sums + (__ldg(block + 3) + row) * 4 + pair, sum);
}

static __device__ __forceinline__ u64 scramble(u64 lane, u64 key, u64 sum) {
    return (lane ^ lane >> 47 ^ key) * P32_1 + sum;
}

// Eight threads a block, one for each lane. AHEAD rows are read while the AHEAD before them are
// used; past a block's last row that reads what is not used, so `sums` ends with 2 * AHEAD spare
// rows. The loads bypass the L1 and keep their order, so that they start as early as they stand.
extern "C" __global__ void __launch_bounds__(8, 1)
    kvgds_chain(const u64* table, const u64* sums, u64* lanes) {
    const u64* block = table + HEADER * (u64)blockIdx.x;
    u32 lane = threadIdx.x, left = (u32)((__ldg(block + 2) - 1) / KIB);  // rows after the first
    const u64* row = sums + __ldg(block + 3) * 8 + lane;
    u64 key = __ldg(&SECRET[(SECRET_BYTES - STRIPE) / 8 + lane]);
    u64 state = __ldg(&START[lane]) + __ldg(row);
    u64 now[AHEAD], next[AHEAD];
    row += 8;
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) now[i] = __ldcg(row + 8 * i);
    for (; left >= AHEAD; left -= AHEAD) {
        row += 8 * AHEAD;
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) next[i] = __ldcg(row + 8 * i);
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) state = scramble(state, key, now[i]);
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) now[i] = next[i];
    }
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) {
        if (i < left) state = scramble(state, key, now[i]);
    }
    __stwb(lanes + blockIdx.x * 8 + lane, state);
}

// The upper half of a 128-bit product xored with its lower half, in steps of 32 bits.
static __device__ __forceinline__ u64 fold(u64 a, u64 b) {
    u64 a0 = a & 0xFFFFFFFFu, a1 = a >> 32, b0 = b & 0xFFFFFFFFu, b1 = b >> 32;
    u64 middle = (a0 * b0 >> 32) + a1 * b0;
    u64 carried = (middle & 0xFFFFFFFFu) + a0 * b1;
    return a * b ^ ((middle >> 32) + (carried >> 32) + a1 * b1);
}

static __device__ __forceinline__ u64 merge(const u64* lanes, u32 offset, u64 start) {
    u64 hash = start;
    for (u32 i = 0; i < 8; i += 2) {
        hash += fold(__ldg(lanes + i) ^ secret_at(offset + 8 * i),
                     __ldg(lanes + i + 1) ^ secret_at(offset + 8 * i + 8));
    }
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9ull;
    return hash ^ hash >> 32;
}

// One thread a block. The canonical form is big-endian, the upper half first.
extern "C" __global__ void __launch_bounds__(32)
    kvgds_digest(const u64* table, u32 blocks, const u64* lanes, unsigned char* digests) {
    u32 block = blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= blocks) return;
    u64 nbytes = __ldg(table + HEADER * (u64)block + 2);
    const u64* state = lanes + 8 * (u64)block;
    u64 low = merge(state, 11, nbytes * P64_1);
    u64 high = merge(state, SECRET_BYTES - STRIPE - 11, ~(nbytes * P64_2));
    unsigned char* mine = digests + 16 * (u64)block;
    for (u32 i = 0; i < 8; i++) {
        __stwb(mine + i, (unsigned char)(high >> (56 - 8 * i)));
        __stwb(mine + 8 + i, (unsigned char)(low >> (56 - 8 * i)));
    }
}

// `table`, in 64-bit words: for each copy [to, from, bytes], all multiples of 16. blockIdx.y is the
// copy, counted from `first`; blockIdx.x which 16 KiB of it. All loads of a thread are in flight at
// once. Each byte is read once, so it need not stay in the caches.
extern "C" __global__ void __launch_bounds__(COPY_THREADS)
    kvgds_copy(const u64* table, u32 first) {
    const u64* copy = table + 3 * ((u64)first + blockIdx.y);
    u64 nbytes = __ldg(copy + 2);
    u64 start = ((u64)blockIdx.x * COPY_LOADS * COPY_THREADS + threadIdx.x) * 16;
    u64 to = __ldg(copy) + start, from = __ldg(copy + 1) + start;
    ulonglong2 loaded[COPY_LOADS];
#pragma unroll
    for (u32 i = 0; i < COPY_LOADS; i++) {
        u32 at = i * COPY_THREADS * 16;
        if (start + at < nbytes) loaded[i] = __ldcs(reinterpret_cast<const ulonglong2*>(from + at));
    }
#pragma unroll
    for (u32 i = 0; i < COPY_LOADS; i++) {
        u32 at = i * COPY_THREADS * 16;
        if (start + at < nbytes) __stwb(reinterpret_cast<ulonglong2*>(to + at), loaded[i]);
    }
}
