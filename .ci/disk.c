/* Stands between a program and its disk (LD_PRELOAD): records what is done to one database, and lets it go wrong.

   CSP_DISK_FILE: the database's absolute path. CSP_DISK_LOG: each write, sync, truncation, creation and deletion of it,
   its -wal and its -journal, and each sync of its directory, is appended there when it is done. CSP_DISK_AT: the number of the operation, counted over
   all of these and openings, at which the process is killed, or, with CSP_DISK_ERRNO, that fails with this errno, once,
   or with CSP_DISK_LASTS for good; at the end their number is written to CSP_DISK_COUNT. See disk.py, which builds and
   uses this. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 'W', SYNC = 'S', TRUNCATE = 'T', CREATE = 'C', UNLINK = 'U' };
struct record { uint8_t kind, file, unused[2]; uint32_t length; uint64_t offset; };

#define FILES 4
static const char *const ENDS[FILES] = { "", "-wal", "-journal", "-shm" };
static const int SHM = 3, DIRECTORY = 4;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static signed char file_of[65536];  /* by descriptor: 1 + the index of its end, 0 for other files */
static long operations;

static int find_file(const char *path) {
    static const char *base;
    if (!base && !(base = getenv("CSP_DISK_FILE"))) return -1;
    size_t length = strlen(base);
    if (!path || strncmp(path, base, length)) return -1;
    for (int file = 0; file < FILES; file++) if (!strcmp(path + length, ENDS[file])) return file;
    return -1;
}

static int is_directory(const char *path) {
    const char *base = getenv("CSP_DISK_FILE");
    size_t length = path ? strlen(path) : 0;
    return base && length && !strncmp(path, base, length) && base[length] == '/' && !strchr(base + length + 1, '/');
}

static int file_at(int fd) { return fd >= 0 && fd < (int)sizeof file_of ? file_of[fd] - 1 : -1; }

/* Count an operation; die or return whether it has to fail (errno is set). */
static int goes_wrong(void) {
    const char *at = getenv("CSP_DISK_AT"), *number = getenv("CSP_DISK_ERRNO");
    pthread_mutex_lock(&lock);
    long current = ++operations;
    pthread_mutex_unlock(&lock);
    if (!at || current < atol(at) || (current > atol(at) && !getenv("CSP_DISK_LASTS"))) return 0;
    if (!number) kill(getpid(), SIGKILL);
    errno = number ? atoi(number) : 0;
    return 1;
}

__attribute__((destructor)) static void count(void) {
    const char *path = getenv("CSP_DISK_COUNT");
    FILE *stream = path ? fopen(path, "w") : NULL;
    if (stream) { fprintf(stream, "%ld", operations); fclose(stream); }
}

static void note(int kind, int file, const void *data, size_t length, uint64_t offset) {
    static int log = -1;
    const char *path = getenv("CSP_DISK_LOG");
    if (!path || file < 0 || file == SHM) return;
    int before = errno;
    pthread_mutex_lock(&lock);
    if (log < 0) log = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    struct record record = { kind, file, { 0, 0 }, data ? length : 0, kind == TRUNCATE ? length : offset };
    struct iovec parts[2] = { { &record, sizeof record }, { (void *)data, data ? length : 0 } };
    if (writev(log, parts, data ? 2 : 1) < 0) abort();
    pthread_mutex_unlock(&lock);
    errno = before;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)

static int opened(int fd, const char *path, int file, int is_new) {
    if (is_directory(path)) file = DIRECTORY;
    if (fd >= 0 && fd < (int)sizeof file_of) file_of[fd] = file + 1;
    if (fd >= 0 && is_new) note(CREATE, file, NULL, 0, 0);
    return fd;
}

#define OPEN(symbol)                                                                                                   \
    int symbol(const char *path, int flags, ...) {                                                                     \
        REAL(int, #symbol, const char *, int, ...);                                                                    \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;                                   \
        va_end(arguments);                                                                                             \
        int file = find_file(path);                                                                                    \
        if (file >= 0 && goes_wrong()) return -1;                                                                      \
        int is_new = file >= 0 && access(path, F_OK) != 0;                                                             \
        return opened(real(path, flags, mode), path, file, is_new);                                                    \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(symbol)                                                                                                 \
    int symbol(int at, const char *path, int flags, ...) {                                                             \
        REAL(int, #symbol, int, const char *, int, ...);                                                               \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;                                   \
        va_end(arguments);                                                                                             \
        int file = find_file(path);                                                                                    \
        if (file >= 0 && goes_wrong()) return -1;                                                                      \
        int is_new = file >= 0 && access(path, F_OK) != 0;                                                             \
        return opened(real(at, path, flags, mode), path, file, is_new);                                                \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < (int)sizeof file_of) file_of[fd] = 0;
    return real(fd);
}

#define PWRITE(symbol, type)                                                                                           \
    ssize_t symbol(int fd, const void *data, size_t length, type offset) {                                             \
        REAL(ssize_t, #symbol, int, const void *, size_t, type);                                                       \
        int file = file_at(fd);                                                                                        \
        if (file >= 0 && file != SHM && goes_wrong()) return -1;                                                       \
        ssize_t written = real(fd, data, length, offset);                                                              \
        if (written > 0) note(WRITE, file, data, written, offset);                                                     \
        return written;                                                                                                \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define PREAD(symbol, type)                                                                                            \
    ssize_t symbol(int fd, void *data, size_t length, type offset) {                                                   \
        REAL(ssize_t, #symbol, int, void *, size_t, type);                                                             \
        if (getenv("CSP_DISK_READS") && file_at(fd) >= 0 && file_at(fd) != SHM && goes_wrong()) return -1;             \
        return real(fd, data, length, offset);                                                                         \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

#define TRUNCATION(symbol, type)                                                                                       \
    int symbol(int fd, type length) {                                                                                  \
        REAL(int, #symbol, int, type);                                                                                 \
        int file = file_at(fd);                                                                                        \
        if (file >= 0 && file != SHM && goes_wrong()) return -1;                                                       \
        int result = real(fd, length);                                                                                 \
        if (!result) note(TRUNCATE, file, NULL, length, 0);                                                            \
        return result;                                                                                                 \
    }
TRUNCATION(ftruncate, off_t)
TRUNCATION(ftruncate64, off64_t)

#define SYNCHRONIZE(symbol)                                                                                            \
    int symbol(int fd) {                                                                                               \
        REAL(int, #symbol, int);                                                                                       \
        int file = file_at(fd);                                                                                        \
        if (file >= 0 && goes_wrong()) return -1;                                                                      \
        int result = real(fd);                                                                                         \
        if (!result) note(SYNC, file, NULL, 0, 0);                                                                     \
        return result;                                                                                                 \
    }
SYNCHRONIZE(fsync)
SYNCHRONIZE(fdatasync)

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    int file = find_file(path);
    if (file >= 0 && goes_wrong()) return -1;
    int result = real(path);
    if (!result) note(UNLINK, file, NULL, 0, 0);
    return result;
}
