/* A file system that fails, for tests: loaded with LD_PRELOAD, it stands before the system calls that change files.
 *
 * Only paths that begin with a prefix are looked at; calls are counted by kind. The k-th one of a kind fails, is short,
 * or ends the process; or whole features are lacking, as they are on some mounts. Set by fault_set() and fault_lacks(),
 * or by the environment: FAULT_PREFIX, FAULT_CALL, FAULT_AT, FAULT_WHAT, FAULT_ERRNO, FAULT_LACKS.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum kind { OPEN, WRITE, PWRITE, FSYNC, RENAME, FTRUNCATE, FALLOCATE, CLOSE, MKDIR, UNLINK, RMDIR, FLOCK, KINDS };
static const char *const names[KINDS] = {"open", "write", "pwrite", "fsync", "rename", "ftruncate",
                                         "fallocate", "close", "mkdir", "unlink", "rmdir", "flock"};

static char prefix[PATH_MAX], what[16], lacks[256];
static int call = -1, error = EIO;
static long at;
static atomic_long counts[KINDS];
static atomic_int full;

void fault_lacks(const char *words) { snprintf(lacks, sizeof lacks, "%s", words); }

/* what: "fail", "late" (done, but said to have failed), "short", "full" (no room from here on) or "kill" */
void fault_set(const char *path, const char *kind, long number, const char *effect, int code) {
    snprintf(prefix, sizeof prefix, "%s", path);
    snprintf(what, sizeof what, "%s", effect);
    call = -1;
    for (int i = 0; i < KINDS; i++) {
        counts[i] = 0;
        if (strcmp(kind, names[i]) == 0) call = i;
    }
    at = number;
    error = code;
    full = 0;
}

long fault_count(const char *kind) {
    for (int i = 0; i < KINDS; i++)
        if (strcmp(kind, names[i]) == 0) return counts[i];
    return -1;
}

__attribute__((constructor)) static void from_environment(void) {
    const char *path = getenv("FAULT_PREFIX"), *kind = getenv("FAULT_CALL"), *number = getenv("FAULT_AT");
    const char *effect = getenv("FAULT_WHAT"), *code = getenv("FAULT_ERRNO"), *words = getenv("FAULT_LACKS");
    if (path)
        fault_set(path, kind ? kind : "", number ? atol(number) : 0, effect ? effect : "fail", code ? atoi(code) : EIO);
    if (words) fault_lacks(words);
}

#define REAL(result, name, ...)                                  \
    static result (*real)(__VA_ARGS__);                          \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int inside(const char *path) { return prefix[0] && path && strncmp(path, prefix, strlen(prefix)) == 0; }

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int inside_fd(int fd) {
    char path[PATH_MAX];
    int saved = errno, found = prefix[0] && path_of(fd, path) && inside(path);
    errno = saved;
    return found;
}

/* relative to a folder's descriptor, as shutil.rmtree works */
static int inside_at(int folder, const char *path) {
    return path[0] == '/' || folder == AT_FDCWD ? inside(path) : inside_fd(folder);
}

static int lacking(const char *word) { return prefix[0] && strstr(lacks, word) != NULL; }

/* Whether this call is the one; counts it. */
static int hit(int kind) {
    long number = atomic_fetch_add(&counts[kind], 1) + 1;
    if (kind != call || number != at) return 0;
    if (strcmp(what, "kill") == 0) kill(getpid(), SIGKILL);
    if (strcmp(what, "full") == 0) full = 1;
    return 1;
}

static int no_room(void) {
    if (!full) return 0;
    errno = ENOSPC;
    return 1;
}

static int fails(int hit_now, const char *effect) {
    if (!hit_now || strcmp(what, effect) != 0) return 0;
    errno = error;
    return 1;
}

static int is_open(const char *path) {
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    int found = 0;
    while (folder && (entry = readdir(folder))) {
        char other[PATH_MAX];
        if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(folder) && path_of(atoi(entry->d_name), other))
            found |= strcmp(other, path) == 0;
    }
    if (folder) closedir(folder);
    return found;
}

static ssize_t halved(int hit_now, size_t count) {
    if (hit_now && (strcmp(what, "short") == 0 || strcmp(what, "full") == 0) && count > 1) return count / 2;
    return count;
}

ssize_t write(int fd, const void *data, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!inside_fd(fd)) return real(fd, data, count);
    if (no_room()) return -1;
    int now = hit(WRITE);
    if (fails(now, "fail")) return -1;
    ssize_t done = real(fd, data, halved(now, count));
    return fails(now, "late") ? -1 : done;
}

static ssize_t any_pwrite(ssize_t (*real)(int, const void *, size_t, off_t), int fd, const void *data, size_t count,
                          off_t position) {
    if (!inside_fd(fd)) return real(fd, data, count, position);
    if (no_room()) return -1;
    int now = hit(PWRITE);
    if (fails(now, "fail")) return -1;
    ssize_t done = real(fd, data, halved(now, count), position);
    return fails(now, "late") ? -1 : done;
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t position) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    return any_pwrite(real, fd, data, count, position);
}

ssize_t pwrite64(int fd, const void *data, size_t count, off_t position) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    return any_pwrite(real, fd, data, count, position);
}

static int any_sync(int (*real)(int), int fd) {
    if (!inside_fd(fd)) return real(fd);
    struct stat status;
    int folder = fstat(fd, &status) == 0 && S_ISDIR(status.st_mode);
    if (lacking(folder ? "folder-sync" : "file-sync")) return errno = EINVAL, -1;
    int now = hit(FSYNC);
    if (fails(now, "fail")) return -1;
    int done = real(fd);
    return fails(now, "late") ? -1 : done;
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    return any_sync(real, fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return any_sync(real, fd);
}

int ftruncate(int fd, off_t size) {
    REAL(int, "ftruncate", int, off_t);
    if (!inside_fd(fd)) return real(fd, size);
    if (size && no_room()) return -1;
    int now = hit(FTRUNCATE);
    if (fails(now, "fail") || (size && no_room())) return -1;
    int done = real(fd, size);
    return fails(now, "late") ? -1 : done;
}

int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

int posix_fallocate(int fd, off_t start, off_t size) {
    REAL(int, "posix_fallocate", int, off_t, off_t);
    if (!inside_fd(fd)) return real(fd, start, size);
    if (lacking("fallocate")) return EOPNOTSUPP;
    if (no_room()) return ENOSPC;
    int now = hit(FALLOCATE);
    if (fails(now, "fail")) return error;
    if (no_room()) return ENOSPC;
    int done = real(fd, start, size);
    return fails(now, "late") ? error : done;
}

int posix_fallocate64(int fd, off_t start, off_t size) { return posix_fallocate(fd, start, size); }

int close(int fd) {
    REAL(int, "close", int);
    int flags = prefix[0] ? fcntl(fd, F_GETFL) : -1;
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY || !inside_fd(fd)) return real(fd);
    int now = hit(CLOSE), done = real(fd);
    return fails(now, "fail") || fails(now, "late") ? -1 : done;
}

int flock(int fd, int operation) {
    REAL(int, "flock", int, int);
    if (!inside_fd(fd)) return real(fd, operation);
    if (lacking("flock")) return errno = ENOSYS, -1;
    if (lacking("lockd")) return errno = ENOLCK, -1;
    int now = hit(FLOCK);
    return fails(now, "fail") ? -1 : real(fd, operation);
}

static int any_rename(int (*real)(const char *, const char *), const char *from, const char *to) {
    if (!inside(to)) return real(from, to);
    if (lacking("open-rename") && (is_open(from) || is_open(to))) return errno = EBUSY, -1;
    int now = hit(RENAME);
    if (fails(now, "fail")) return -1;
    int done = real(from, to);
    return fails(now, "late") ? -1 : done;
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return any_rename(real, from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    if (!inside(path)) return real(path, mode);
    if (no_room()) return -1;
    int now = hit(MKDIR);
    if (fails(now, "fail") || no_room()) return -1;
    int done = real(path, mode);
    return fails(now, "late") ? -1 : done;
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (!inside(path)) return real(path);
    if (lacking("open-rename") && is_open(path)) return errno = EBUSY, -1;
    int now = hit(UNLINK);
    if (fails(now, "fail")) return -1;
    int done = real(path);
    return fails(now, "late") ? -1 : done;
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    if (!inside(path)) return real(path);
    int now = hit(RMDIR);
    if (fails(now, "fail")) return -1;
    int done = real(path);
    return fails(now, "late") ? -1 : done;
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    if (!inside_at(folder, path)) return real(folder, path, flags);
    int now = hit(flags & AT_REMOVEDIR ? RMDIR : UNLINK);
    if (fails(now, "fail")) return -1;
    int done = real(folder, path, flags);
    return fails(now, "late") ? -1 : done;
}

static int creating(const char *path, int flags) {
    if (!(flags & O_CREAT) || !inside(path)) return 1;
    if (no_room()) return 0;
    int now = hit(OPEN);
    return !(fails(now, "fail") || no_room());
}

#define MODE                                                       \
    mode_t mode = 0;                                               \
    if (flags & (O_CREAT | __O_TMPFILE)) {                         \
        va_list list;                                              \
        va_start(list, flags);                                     \
        mode = va_arg(list, mode_t);                               \
        va_end(list);                                              \
    }
#ifndef __O_TMPFILE
#define __O_TMPFILE 0
#endif

int open(const char *path, int flags, ...) {
    REAL(int, "open", const char *, int, ...);
    MODE
    return creating(path, flags) ? real(path, flags, mode) : -1;
}

int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    MODE
    return creating(path, flags) ? real(path, flags, mode) : -1;
}
