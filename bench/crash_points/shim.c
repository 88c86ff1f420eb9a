/* Preloaded into a process (LD_PRELOAD): counts the calls that change files below a folder, and at a chosen one
 * kills the process, lets the call fail, or waits. Inactive until crash_start is called. Linux. */
#define _GNU_SOURCE
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
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum mode { OFF, TRACE, KILL, TEAR, FAIL, SLOW };
enum { PROCEED = 0, HALF = -1 };

static int mode = OFF;
static long chosen;          /* KILL, TEAR, FAIL: the call's number, from 1; SLOW: wait at every one of so many */
static int failure;          /* FAIL: the error number from the chosen call on */
static int trace = -1;       /* TRACE: a descriptor that receives a line for each call */
static char folder[PATH_MAX];
static size_t folder_length;
static atomic_long count;

/* Starts counting. Returns the number of calls counted so far. */
long crash_start(int new_mode, long number, int error, const char *below, int trace_descriptor) {
  chosen = number;
  failure = error;
  trace = trace_descriptor;
  snprintf(folder, sizeof folder, "%s", below);
  folder_length = strlen(folder);
  mode = new_mode;
  return atomic_load(&count);
}

static int is_below(const char *path) {
  return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || !path[folder_length]);
}

static int read_link(const char *link, char *path, size_t size) {
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return 1;
}

/* The absolute path of a name in a folder's descriptor. */
static void resolve(int at, const char *name, char path[PATH_MAX]) {
  char base[PATH_MAX], link[64];
  path[0] = 0;
  if (!name) return;
  if (name[0] == '/') {
    snprintf(path, PATH_MAX, "%s", name);
    return;
  }
  if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  if (read_link(link, base, sizeof base) && snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) path[0] = 0;
}

/* A full disk refuses new data and names; a read-only one every change; a broken one data and syncs. */
static int fails(const char *call) {
  int is_removal = !strcmp(call, "unlink") || !strcmp(call, "rmdir");
  int is_name = !strcmp(call, "rename") || !strcmp(call, "link");
  if (failure == EROFS) return strcmp(call, "fsync") != 0 && strcmp(call, "close") != 0;
  if (failure == EIO) return !strcmp(call, "write") || !strcmp(call, "fsync") || !strcmp(call, "close");
  return !is_removal && !is_name && strcmp(call, "truncate") != 0 && strcmp(call, "close") != 0;
}

static void wait_milliseconds(long milliseconds) {
  struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
  syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &time, NULL);
}

/* Counts a call. Returns PROCEED, HALF (write one half, then call die) or the error number to fail with. */
static int point(const char *call, const char *path, size_t size) {
  if (mode == OFF || !is_below(path)) return PROCEED;
  int saved = errno;
  long number = atomic_fetch_add(&count, 1) + 1;
  int result = PROCEED;
  if (mode == TRACE) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%zu\t%s\n", number, call, size, path);
    if (length > 0) syscall(SYS_write, trace, line, (size_t)length);
  } else if ((mode == KILL || mode == TEAR) && number == chosen) {
    if (mode == TEAR && size > 1) result = HALF;
    else syscall(SYS_kill, 0, SIGKILL); /* the whole process group */
  } else if (mode == FAIL && number >= chosen && fails(call)) {
    result = failure;
  } else if (mode == SLOW && number % chosen == 0) {
    wait_milliseconds(5);
  }
  errno = saved;
  return result;
}

static int point_at(const char *call, int at, const char *name) {
  if (mode == OFF) return PROCEED;
  char path[PATH_MAX];
  resolve(at, name, path);
  return point(call, path, 0);
}

static int point_of(const char *call, int descriptor, size_t size) {
  if (mode == OFF || descriptor < 0) return PROCEED;
  char link[64], path[PATH_MAX];
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  int found = read_link(link, path, sizeof path);
  errno = saved;
  return found ? point(call, path, size) : PROCEED;
}

static void die(void) { syscall(SYS_kill, 0, SIGKILL); }

#define FAIL_WITH(error) do { errno = (error); return -1; } while (0)

/* -- data ------------------------------------------------------------------------------------------------- */

ssize_t write(int fd, const void *data, size_t size) {
  int p = point_of("write", fd, size);
  if (p > 0) FAIL_WITH(p);
  if (p == HALF) { syscall(SYS_write, fd, data, size / 2); die(); }
  return syscall(SYS_write, fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
  int p = point_of("write", fd, size);
  if (p > 0) FAIL_WITH(p);
  if (p == HALF) { syscall(SYS_pwrite64, fd, data, size / 2, offset); die(); }
  return syscall(SYS_pwrite64, fd, data, size, offset);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int number) {
  size_t size = 0;
  for (int i = 0; i < number; i++) size += parts[i].iov_len;
  int p = point_of("write", fd, size);
  if (p > 0) FAIL_WITH(p);
  if (p == HALF) { syscall(SYS_write, fd, parts[0].iov_base, parts[0].iov_len / 2); die(); }
  return syscall(SYS_writev, fd, parts, number);
}

size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
  static size_t (*next)(const void *, size_t, size_t, FILE *);
  if (!next) next = dlsym(RTLD_NEXT, "fwrite");
  int p = point_of("write", fileno(file), size * number);
  if (p > 0) { errno = p; return 0; }
  if (p == HALF) { next(data, 1, size * number / 2, file); fflush(file); die(); }
  return next(data, size, number, file);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
  int p = point_of("write", to, size);
  if (p > 0) FAIL_WITH(p);
  if (p == HALF) { syscall(SYS_sendfile, to, from, offset, size / 2); die(); }
  return syscall(SYS_sendfile, to, from, offset, size);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) { return sendfile64(to, from, offset, size); }

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *into, size_t size, unsigned flags) {
  int p = point_of("write", to, size);
  if (p > 0) FAIL_WITH(p);
  if (p == HALF) { syscall(SYS_copy_file_range, from, at, to, into, size / 2, flags); die(); }
  return syscall(SYS_copy_file_range, from, at, to, into, size, flags);
}

int ftruncate64(int fd, off64_t size) {
  int p = point_of("truncate", fd, 0);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_ftruncate, fd, size);
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fsync(int fd) {
  int p = point_of("fsync", fd, 0);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_fsync, fd);
}

int fdatasync(int fd) {
  int p = point_of("fsync", fd, 0);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_fdatasync, fd);
}

int close(int fd) {
  int flags = mode == OFF ? -1 : fcntl(fd, F_GETFL);
  int p = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY ? point_of("close", fd, 0) : PROCEED;
  int result = (int)syscall(SYS_close, fd);
  if (p > 0) FAIL_WITH(p);
  return result;
}

/* -- names ------------------------------------------------------------------------------------------------ */

static int open_at(int at, const char *name, int flags, mode_t permissions) {
  if (flags & (O_CREAT | O_TRUNC)) {
    int p = point_at("create", at, name);
    if (p > 0) FAIL_WITH(p);
  }
  return (int)syscall(SYS_openat, at, name, flags, permissions);
}

#define PERMISSIONS(flags)                                \
  mode_t permissions = 0;                                 \
  if ((flags) & (O_CREAT | __O_TMPFILE)) {                \
    va_list arguments;                                    \
    va_start(arguments, flags);                           \
    permissions = va_arg(arguments, mode_t);              \
    va_end(arguments);                                    \
  }

int open(const char *name, int flags, ...) { PERMISSIONS(flags) return open_at(AT_FDCWD, name, flags, permissions); }
int open64(const char *name, int flags, ...) { PERMISSIONS(flags) return open_at(AT_FDCWD, name, flags, permissions); }
int openat(int at, const char *name, int flags, ...) { PERMISSIONS(flags) return open_at(at, name, flags, permissions); }
int openat64(int at, const char *name, int flags, ...) { PERMISSIONS(flags) return open_at(at, name, flags, permissions); }
int creat(const char *name, mode_t permissions) { return open_at(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, permissions); }

int mkdirat(int at, const char *name, mode_t permissions) {
  int p = point_at("mkdir", at, name);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_mkdirat, at, name, permissions);
}

int mkdir(const char *name, mode_t permissions) { return mkdirat(AT_FDCWD, name, permissions); }

int unlinkat(int at, const char *name, int flags) {
  int p = point_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, name);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_unlinkat, at, name, flags);
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int renameat2(int from, const char *name, int to, const char *new_name, unsigned flags) {
  int p = point_at("rename", to, new_name);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_renameat2, from, name, to, new_name, flags);
}

int renameat(int from, const char *name, int to, const char *new_name) { return renameat2(from, name, to, new_name, 0); }
int rename(const char *name, const char *new_name) { return renameat2(AT_FDCWD, name, AT_FDCWD, new_name, 0); }

int linkat(int from, const char *name, int to, const char *new_name, int flags) {
  int p = point_at("link", to, new_name);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_linkat, from, name, to, new_name, flags);
}

int link(const char *name, const char *new_name) { return linkat(AT_FDCWD, name, AT_FDCWD, new_name, 0); }

int symlinkat(const char *target, int at, const char *name) {
  int p = point_at("link", at, name);
  if (p > 0) FAIL_WITH(p);
  return (int)syscall(SYS_symlinkat, target, at, name);
}

int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }
