/* Preloaded: a wall clock that is off by what stands in the file CHAOS_CLOCK (nanoseconds, 8 bytes, mapped).
 *
 * Only what tells or waits for wall time is taken over; a wait until a moment of it ends when this clock would
 * show that moment. Monotonic clocks, sleeps and the times of files are the kernel's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define WALL(clock) ((clock) == CLOCK_REALTIME || (clock) == CLOCK_REALTIME_COARSE)
/* A moment is one of the wall clock where it is later than 2001: monotonic ones count from the start of the machine. */
#define IS_WALL(moment) ((moment) && (moment)->tv_sec > SECOND)
#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)

static const volatile int64_t *offset;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) offset = page;
}

static int64_t off(void) { return offset ? *offset : 0; }

static struct timespec moved(struct timespec t, int64_t by) {
    int64_t nanos = t.tv_nsec + by % SECOND;
    t.tv_sec += by / SECOND + (nanos >= SECOND) - (nanos < 0);
    t.tv_nsec = nanos + (nanos < 0) * SECOND - (nanos >= SECOND) * SECOND;
    return t;
}

int clock_gettime(clockid_t clock, struct timespec *t) {
    REAL(clock_gettime);
    int failed = real(clock, t);
    if (!failed && WALL(clock)) *t = moved(*t, off());
    return failed;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    REAL(gettimeofday);
    int failed = real(t, zone);
    if (!failed && t) {
        struct timespec now = moved((struct timespec){t->tv_sec, t->tv_usec * 1000}, off());
        *t = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    }
    return failed;
}

time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(struct timespec *t, int base) {
    return base == TIME_UTC && !clock_gettime(CLOCK_REALTIME, t) ? base : 0;
}

/* What the kernel's clock shows at that moment of ours. */
#define KERNELS(t) \
    struct timespec kernels; \
    if (IS_WALL(t)) { kernels = moved(*(t), -off()); (t) = &kernels; }

int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *t) {
    REAL(pthread_cond_timedwait);
    KERNELS(t)
    return real(c, m, t);
}

int pthread_cond_clockwait(pthread_cond_t *c, pthread_mutex_t *m, clockid_t clock, const struct timespec *t) {
    REAL(pthread_cond_clockwait);
    KERNELS(t)
    return real(c, m, clock, t);
}

int pthread_mutex_timedlock(pthread_mutex_t *m, const struct timespec *t) {
    REAL(pthread_mutex_timedlock);
    KERNELS(t)
    return real(m, t);
}

int sem_timedwait(sem_t *s, const struct timespec *t) {
    REAL(sem_timedwait);
    KERNELS(t)
    return real(s, t);
}

int sem_clockwait(sem_t *s, clockid_t clock, const struct timespec *t) {
    REAL(sem_clockwait);
    KERNELS(t)
    return real(s, clock, t);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *t, struct timespec *left) {
    REAL(clock_nanosleep);
    if (!(flags & TIMER_ABSTIME)) return real(clock, flags, t, left);
    KERNELS(t)
    return real(clock, flags, t, left);
}

int timerfd_settime(int file, int flags, const struct itimerspec *t, struct itimerspec *old) {
    REAL(timerfd_settime);
    struct itimerspec kernels = *t;
    if ((flags & TFD_TIMER_ABSTIME) && IS_WALL(&t->it_value)) kernels.it_value = moved(t->it_value, -off());
    return real(file, flags, &kernels, old);
}

long syscall(long number, ...) {
    static long (*real)(long, ...);
    if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    const struct timespec *t = (const struct timespec *)a[3];
    if (number == SYS_futex && ((int)a[1] & FUTEX_CLOCK_REALTIME) && ((int)a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET) {
        KERNELS(t)
        return real(number, a[0], a[1], a[2], (long)t, a[4], a[5]);
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
