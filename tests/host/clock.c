/*
 * LD_PRELOAD this, and the clock on the wall jumps three times a second: a
 * month back, a year ahead, and to what it should be.  Other clocks are left.
 */
#define _GNU_SOURCE
#include <sys/time.h>
#include <dlfcn.h>
#include <time.h>

static time_t
jump(void)
{
	static const time_t days[] = { 0, -30, 365 };
	struct timespec now;
	int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");

	real(CLOCK_MONOTONIC, &now);
	return days[(now.tv_sec * 3 + now.tv_nsec / 333333334) % 3] * 86400;
}

int
clock_gettime(clockid_t clock, struct timespec *ts)
{
	int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
	int error = real(clock, ts);

	if (error == 0 && clock == CLOCK_REALTIME)
		ts->tv_sec += jump();
	return error;
}

int
gettimeofday(struct timeval *tv, void *zone)
{
	struct timespec now;
	int error = clock_gettime(CLOCK_REALTIME, &now);

	if (error == 0) {
		tv->tv_sec = now.tv_sec;
		tv->tv_usec = now.tv_nsec / 1000;
	}
	return error;
}

time_t
time(time_t *result)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (result != NULL)
		*result = now.tv_sec;
	return now.tv_sec;
}
