/* Loaded before the C library: the wall clock is as many seconds off as the file CLOCK_STEP says; other clocks are left alone.
   Neither allocates nor locks: allocators ask for the time too. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    long failed = syscall(SYS_clock_gettime, clock, now);
    if (failed != 0 || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE))
        return (int)failed;
    const char *path = getenv("CLOCK_STEP");
    int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY) : -1;
    if (file >= 0) {
        char text[16];
        long size = syscall(SYS_read, file, text, sizeof text);
        syscall(SYS_close, file);
        long seconds = 0, sign = 1;
        for (long i = 0; i < size; i++) {
            if (text[i] == '-')
                sign = -1;
            else if (text[i] >= '0' && text[i] <= '9')
                seconds = 10 * seconds + (text[i] - '0');
        }
        now->tv_sec += sign * seconds;
    }
    return 0;
}
