/*
 * What fsx 0.3.2 cannot do, put between it and the C library with LD_PRELOAD.
 *
 * FSX_FILE is the file under test; nothing else is touched.
 * FSX_DIRECT=1 opens it with O_DIRECT.
 * FSX_ASK=PATH, FSX_EVERY=N: each Nth opening, for which fsx has closed the file, makes PATH and
 *   waits until it is gone. Who runs fsx unmounts and mounts in between, and fsx goes on with the
 *   contents that it remembers.
 * Every second punched hole becomes a zeroed range: the same bytes must be read afterwards.
 * Mappings that fsx forgets after reading are unmapped at the next one, or before a remount.
 *
 * When fsx ends, one line on standard error tells what was done. 64-bit Linux only.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8 && sizeof(long) == 8, "offsets fit system calls");

static unsigned long opens, direct, remounts, holes, zeroed;
/* The mapping of the file that fsx has not unmapped. */
static void *mapped;
static size_t mapped_bytes;

static void unmap(void)
{
    if (mapped)
        syscall(SYS_munmap, mapped, mapped_bytes);
    mapped = NULL;
}

static void ask_for_remount(const char *ask)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, ask, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0) {
        perror(ask);
        abort();
    }
    close(fd);
    while (access(ask, F_OK) == 0)
        usleep(1000);
    remounts++;
}

int open(const char *path, int flags, ...)
{
    const char *file = getenv("FSX_FILE"), *ask = getenv("FSX_ASK"), *every = getenv("FSX_EVERY");
    mode_t mode = 0;
    if (flags & (O_CREAT | __O_TMPFILE)) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    if (file && strcmp(path, file) == 0) {
        unmap();
        if (ask && every && opens > 0 && opens % strtoul(every, NULL, 10) == 0)
            ask_for_remount(ask);
        opens++;
        if (getenv("FSX_DIRECT")) {
            flags |= O_DIRECT;
            direct++;
        }
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) __attribute__((alias("open")));

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    void *got;
    if (!(flags & MAP_SHARED) || fd < 0)
        return (void *)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
    unmap();
    got = (void *)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
    if (got != MAP_FAILED) {
        mapped = got;
        mapped_bytes = bytes;
    }
    return got;
}

void *mmap64(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));

int munmap(void *at, size_t bytes)
{
    if (at == mapped)
        mapped = NULL;
    return (int)syscall(SYS_munmap, at, bytes);
}

int fallocate(int fd, int mode, off_t offset, off_t bytes)
{
    if (mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) && holes++ % 2 == 1) {
        mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
        zeroed++;
    }
    return (int)syscall(SYS_fallocate, fd, mode, offset, bytes);
}

int fallocate64(int fd, int mode, off_t offset, off_t bytes) __attribute__((alias("fallocate")));

__attribute__((destructor)) static void tell(void)
{
    if (opens > 0)
        fprintf(stderr, "preload: opens=%lu direct=%lu remounts=%lu holes=%lu zeroed=%lu\n", opens,
                direct, remounts, holes - zeroed, zeroed);
}
