/* Stands between a process and one folder of files, as the disk and the clock of a machine would. For tests only.
 *
 * Every operation that changes the folder is counted and written to a journal with what it replaced, so that a test can
 * take back what was never synced, as a power cut does (powercut.py). A control block that the test maps too says when to
 * end the process with SIGKILL, which operations fail, how much space is left, and how far the clock is off.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, SYNC, SYNC_FAILED, RENAME, UNLINK, LINK, MKDIR, RMDIR };

struct control {
  int64_t operations;  /* counted so far, over all processes of the machine */
  int64_t kill_at;     /* the operation before which the process ends; 0 for never */
  int64_t fail_kinds;  /* bit mask of the kinds that fail */
  int64_t fail_after;  /* so many of them succeed first */
  int64_t fail_times;  /* then so many fail; -1 for all */
  int64_t fail_errno;
  int64_t space_bytes; /* bytes that may still be appended; -1 for no limit */
  int64_t clock_ns;    /* added to the wall clock */
};

struct record {
  uint32_t kind, is_folder;
  uint64_t inode, offset, length, old_size;
  uint32_t name_bytes, to_bytes, shadow_bytes, data_bytes;
};

#define FILES 65536
static struct control *control;
static int journal = -1;
static char root[PATH_MAX], shadows[PATH_MAX];
static size_t root_length;
static uint64_t tracked[FILES]; /* inode by descriptor */
static uint64_t shadow_count;

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

void faults_arm(const char *control_path, const char *journal_path, const char *folder, const char *shadow_folder) {
  int descriptor = syscall(SYS_openat, AT_FDCWD, control_path, O_RDWR | O_CLOEXEC, 0);
  void *block = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  syscall(SYS_close, descriptor);
  if (block == MAP_FAILED) abort();
  journal = syscall(SYS_openat, AT_FDCWD, journal_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  if (journal < 0) abort();
  snprintf(shadows, sizeof shadows, "%s", shadow_folder);
  root_length = snprintf(root, sizeof root, "%s", folder);
  control = block;
}

/* The absolute path of a name, if it lies in the folder. */
static int inside(int at, const char *name, char *path) {
  if (!control || !name) return 0;
  if (name[0] == '/') {
    snprintf(path, PATH_MAX, "%s", name);
  } else {
    char link[64], folder[PATH_MAX];
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, folder, sizeof folder - 1);
    if (length < 0) return 0;
    folder[length] = 0;
    if (snprintf(path, PATH_MAX, "%s/%s", folder, name) >= PATH_MAX) return 0;
  }
  return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void say(struct record head, const char *name, const char *to, const char *shadow, const void *data) {
  head.name_bytes = strlen(name), head.to_bytes = strlen(to), head.shadow_bytes = strlen(shadow);
  struct iovec parts[] = {{&head, sizeof head}, {(void *)name, head.name_bytes}, {(void *)to, head.to_bytes},
                          {(void *)shadow, head.shadow_bytes}, {(void *)data, head.data_bytes}};
  if (syscall(SYS_writev, journal, parts, 5) < 0) abort();
}

/* Counts an operation; ends the process or returns an error number if the control block wants it. */
static int step(int kind) {
  if (__atomic_add_fetch(&control->operations, 1, __ATOMIC_SEQ_CST) == control->kill_at) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
  }
  if (!(control->fail_kinds >> kind & 1)) return 0;
  if (__atomic_sub_fetch(&control->fail_after, 1, __ATOMIC_SEQ_CST) >= 0) return 0;
  if (control->fail_times >= 0 && __atomic_sub_fetch(&control->fail_times, 1, __ATOMIC_SEQ_CST) < 0) {
    control->fail_times = 0;
    return 0;
  }
  return control->fail_errno;
}

static int refused(int error) { return errno = error, -1; }

static int opened(int descriptor, const char *path, int existed) {
  struct stat found;
  if (descriptor < 0 || descriptor >= FILES || fstat(descriptor, &found)) return descriptor;
  tracked[descriptor] = found.st_ino;
  if (!existed) say((struct record){CREATE, 0, found.st_ino}, path, "", "", "");
  return descriptor;
}

static int open_any(int at, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  if (!inside(at, name, path)) {
    int descriptor = syscall(SYS_openat, at, name, flags, mode);
    if (descriptor >= 0 && descriptor < FILES) tracked[descriptor] = 0;
    return descriptor;
  }
  int existed = !faccessat(at, name, F_OK, 0), error = 0;
  if (!existed && (flags & O_CREAT) && (error = step(CREATE))) return refused(error);
  if (existed && (flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY) {
    int descriptor = syscall(SYS_openat, at, name, flags & ~(O_TRUNC | O_CREAT | O_EXCL), mode);
    if (descriptor < 0) return descriptor;
    opened(descriptor, path, 1);
    if (ftruncate(descriptor, 0)) {
      error = errno;
      close(descriptor);
      return refused(error);
    }
    return descriptor;
  }
  return opened(syscall(SYS_openat, at, name, flags, mode), path, existed);
}

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    return open_any(AT_FDCWD, path, flags, mode); }
#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    return open_any(at, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

/* Whether a descriptor is a file of the folder; descriptors that libc closed by itself may be others by now. */
static int ours(int descriptor, struct stat *found) {
  if (!control || descriptor < 0 || descriptor >= FILES || !tracked[descriptor]) return 0;
  return !fstat(descriptor, found) && found->st_ino == tracked[descriptor];
}

static const char *name_of(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

/* What a file holds, also if the descriptor cannot read; returns how much was read. */
static uint64_t peek(int descriptor, char *old, uint64_t length, uint64_t offset) {
  char link[64];
  if (!old || !length) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  int reader = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
  if (reader < 0) return 0;
  ssize_t count = syscall(SYS_pread64, reader, old, length, offset);
  syscall(SYS_close, reader);
  return count < 0 ? 0 : count;
}

/* Remembers what a write replaces; returns how many bytes of it may happen, or -1 with errno. */
static ssize_t before_write(int descriptor, struct stat *found, uint64_t offset, size_t length) {
  uint64_t size = found->st_size, replaced = offset < size ? (size - offset < length ? size - offset : length) : 0;
  char path[PATH_MAX], *old = malloc(replaced + 1);
  replaced = peek(descriptor, old, replaced, offset);
  struct record head = {WRITE, 0, found->st_ino, offset, length, size, 0, 0, 0, replaced};
  say(head, name_of(descriptor, path), "", "", old ? old : "");
  free(old);
  int error = step(WRITE);
  if (error) return refused(error);
  int64_t grown = (int64_t)(offset + length) - (int64_t)size;
  if (control->space_bytes < 0 || grown <= 0) return length;
  int64_t left = __atomic_sub_fetch(&control->space_bytes, grown, __ATOMIC_SEQ_CST);
  if (left >= 0) return length;
  control->space_bytes = 0;
  int64_t fits = (int64_t)length + left;
  return fits > 0 ? fits : refused(ENOSPC);
}

ssize_t write(int descriptor, const void *data, size_t length) {
  struct stat found;
  if (length && ours(descriptor, &found)) {
    int append = fcntl(descriptor, F_GETFL) & O_APPEND;
    off_t offset = append ? found.st_size : lseek(descriptor, 0, SEEK_CUR);
    ssize_t most = before_write(descriptor, &found, offset, length);
    if (most < 0) return -1;
    length = most;
  }
  return syscall(SYS_write, descriptor, data, length);
}

ssize_t pwrite(int descriptor, const void *data, size_t length, off_t offset) {
  struct stat found;
  if (length && ours(descriptor, &found)) {
    ssize_t most = before_write(descriptor, &found, offset, length);
    if (most < 0) return -1;
    length = most;
  }
  return syscall(SYS_pwrite64, descriptor, data, length, offset);
}
ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t offset) {
  return pwrite(descriptor, data, length, offset);
}

/* In pieces, through `write`: a short count is a legal answer. */
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  struct stat found;
  if (!ours(descriptor, &found)) return syscall(SYS_writev, descriptor, parts, count);
  ssize_t sum = 0;
  for (int index = 0; index < count; index++) {
    ssize_t done = write(descriptor, parts[index].iov_base, parts[index].iov_len);
    if (done < 0) return sum ? sum : done;
    sum += done;
    if ((size_t)done < parts[index].iov_len) break;
  }
  return sum;
}

/* Makes callers fall back to reading and writing. */
ssize_t sendfile(int out, int in, off_t *offset, size_t length) {
  struct stat found;
  return ours(out, &found) ? refused(EINVAL) : syscall(SYS_sendfile, out, in, offset, length);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t length) { return sendfile(out, in, offset, length); }
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t length, unsigned flags) {
  struct stat found;
  if (ours(out, &found)) return refused(EXDEV);
  return syscall(SYS_copy_file_range, in, in_at, out, out_at, length, flags);
}

int ftruncate(int descriptor, off_t size) {
  struct stat found;
  if (ours(descriptor, &found)) {
    uint64_t lost = size < found.st_size ? found.st_size - size : 0;
    char path[PATH_MAX], *old = malloc(lost + 1);
    lost = peek(descriptor, old, lost, size);
    struct record head = {TRUNCATE, 0, found.st_ino, size, 0, found.st_size, 0, 0, 0, lost};
    say(head, name_of(descriptor, path), "", "", old ? old : "");
    free(old);
    int error = step(TRUNCATE);
    if (error) return refused(error);
  }
  return syscall(SYS_ftruncate, descriptor, size);
}
int ftruncate64(int descriptor, off64_t size) { return ftruncate(descriptor, size); }

static int sync_any(int descriptor, long call) {
  struct stat found;
  if (!ours(descriptor, &found)) return syscall(call, descriptor);
  int error = step(SYNC), folder = S_ISDIR(found.st_mode);
  char path[PATH_MAX];
  say((struct record){error ? SYNC_FAILED : SYNC, folder, found.st_ino}, name_of(descriptor, path), "", "", "");
  return error ? refused(error) : 0;
}
int fsync(int descriptor) { return sync_any(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return sync_any(descriptor, SYS_fdatasync); }

/* Keeps what is about to lose its name under another one. */
static const char *shadow_of(const char *path, char *shadow) {
  uint64_t number = __atomic_add_fetch(&shadow_count, 1, __ATOMIC_SEQ_CST);
  snprintf(shadow, PATH_MAX + 64, "%s/%ld-%lu", shadows, (long)syscall(SYS_getpid), (unsigned long)number);
  return syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, shadow, 0) ? "" : shadow;
}

int renameat(int from_at, const char *from, int to_at, const char *to) {
  char path[PATH_MAX], target[PATH_MAX], shadow[PATH_MAX + 64];
  if (inside(from_at, from, path) && inside(to_at, to, target)) {
    int error = step(RENAME);
    if (error) return refused(error);
    say((struct record){RENAME}, path, target, shadow_of(target, shadow), "");
  }
  return syscall(SYS_renameat2, from_at, from, to_at, to, 0);
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int at, const char *name, int flags) {
  char path[PATH_MAX], shadow[PATH_MAX + 64];
  if (inside(at, name, path) && !faccessat(at, name, F_OK, AT_SYMLINK_NOFOLLOW)) {
    int kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK, error = step(kind);
    if (error) return refused(error);
    say((struct record){kind}, path, "", kind == UNLINK ? shadow_of(path, shadow) : "", "");
  }
  return syscall(SYS_unlinkat, at, name, flags);
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

static int made(int kind, int at, const char *name) {
  char path[PATH_MAX];
  if (!inside(at, name, path) || !faccessat(at, name, F_OK, AT_SYMLINK_NOFOLLOW)) return 0;
  int error = step(kind);
  if (!error) say((struct record){kind}, path, "", "", "");
  return error;
}

int mkdirat(int at, const char *name, mode_t mode) {
  int error = made(MKDIR, at, name);
  return error ? refused(error) : syscall(SYS_mkdirat, at, name, mode);
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
  int error = made(LINK, to_at, to);
  return error ? refused(error) : syscall(SYS_linkat, from_at, from, to_at, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int symlinkat(const char *content, int at, const char *name) {
  int error = made(LINK, at, name);
  return error ? refused(error) : syscall(SYS_symlinkat, content, at, name);
}
int symlink(const char *content, const char *name) { return symlinkat(content, AT_FDCWD, name); }

static void shift(struct timespec *now) {
  int64_t sum = now->tv_sec * 1000000000LL + now->tv_nsec + (control ? control->clock_ns : 0);
  now->tv_sec = sum / 1000000000LL, now->tv_nsec = sum % 1000000000LL;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  int result = real(clock, now);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) shift(now);
  return result;
}
int gettimeofday(struct timeval *now, void *zone) {
  struct timespec found;
  clock_gettime(CLOCK_REALTIME, &found);
  now->tv_sec = found.tv_sec, now->tv_usec = found.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *out) {
  struct timespec found;
  clock_gettime(CLOCK_REALTIME, &found);
  if (out) *out = found.tv_sec;
  return found.tv_sec;
}
