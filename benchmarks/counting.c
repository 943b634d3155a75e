/* Counts what is allocated and copied in large pieces, in the process that it is preloaded into (glibc).

   The counters lie in the file that EDGE_COUNTERS names, as in `struct counters`, so that others read them while the
   process runs. An allocation is large from 1 MiB on, a copy from 4 KiB on. What a compiler made of memcpy without a
   call, and what the kernel copies, is not seen. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LARGE = 1 << 20, WORTH_COUNTING = 4096 };

struct counters {
    uint64_t is_counting;
    uint64_t allocations, allocated_bytes;
    uint64_t maps, mapped_bytes;
    uint64_t copies, copied_bytes;
};

static struct counters nowhere;
static struct counters *counters = &nowhere;

static void count(uint64_t *times, uint64_t *bytes, size_t size) {
    __atomic_fetch_add(times, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(bytes, size, __ATOMIC_RELAXED);
}

static void count_allocation(size_t size) {
    if (size >= LARGE) count(&counters->allocations, &counters->allocated_bytes, size);
}

/* glibc's own, which need no looking up and so no memory. */
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

void *malloc(size_t size) {
    count_allocation(size);
    return __libc_malloc(size);
}

void *calloc(size_t items, size_t size) {
    size_t whole;
    if (!__builtin_mul_overflow(items, size, &whole)) count_allocation(whole);
    return __libc_calloc(items, size);
}

void *realloc(void *old, size_t size) {
    count_allocation(size);
    return __libc_realloc(old, size);
}

void *memalign(size_t alignment, size_t size) {
    count_allocation(size);
    return __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size) {
    count_allocation(size);
    return __libc_memalign(alignment, size);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
    if (alignment % sizeof(void *) || !alignment || (alignment & (alignment - 1))) return EINVAL;
    count_allocation(size);
    void *found = __libc_memalign(alignment, size);
    if (!found) return ENOMEM;
    *out = found;
    return 0;
}

void *mmap(void *near, size_t size, int protection, int flags, int file, off_t offset) {
    if ((flags & MAP_ANONYMOUS) && size >= LARGE) count(&counters->maps, &counters->mapped_bytes, size);
    return (void *)syscall(SYS_mmap, near, size, protection, flags, file, offset);
}

void *mmap64(void *near, size_t size, int protection, int flags, int file, off_t offset) {
    return mmap(near, size, protection, flags, file, offset);
}

typedef void *copier(void *, const void *, size_t);
static copier *real_memcpy, *real_memmove;

static void *by_bytes(void *to, const void *from, size_t size) {
    volatile unsigned char *out = to;
    const volatile unsigned char *in = from;
    if (out < in)
        for (size_t i = 0; i < size; i++) out[i] = in[i];
    else
        for (size_t i = size; i-- > 0;) out[i] = in[i];
    return to;
}

static void *copied(copier *real, void *to, const void *from, size_t size) {
    if (size >= WORTH_COUNTING) count(&counters->copies, &counters->copied_bytes, size);
    return (real ? real : by_bytes)(to, from, size);
}

void *memcpy(void *restrict to, const void *restrict from, size_t size) { return copied(real_memcpy, to, from, size); }

void *memmove(void *to, const void *from, size_t size) { return copied(real_memmove, to, from, size); }

void *__memcpy_chk(void *restrict to, const void *restrict from, size_t size, size_t room) {
    if (size > room) abort();
    return copied(real_memcpy, to, from, size);
}

void *__memmove_chk(void *to, const void *from, size_t size, size_t room) {
    if (size > room) abort();
    return copied(real_memmove, to, from, size);
}

__attribute__((constructor)) static void begin(void) {
    real_memcpy = (copier *)dlsym(RTLD_NEXT, "memcpy");
    real_memmove = (copier *)dlsym(RTLD_NEXT, "memmove");
    const char *path = getenv("EDGE_COUNTERS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *shared = (void *)syscall(SYS_mmap, NULL, sizeof nowhere, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (shared == MAP_FAILED) return;
    counters = shared;
    counters->is_counting = 1;
}
