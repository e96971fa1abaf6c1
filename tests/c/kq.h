/*
 * What the programs in this folder share.  They run on NetBSD; compiled with
 * -DRUMP and NetBSD's headers behind the host's they call a rump kernel, under
 * the same names.
 */

#include <sys/types.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifdef RUMP
/* From NetBSD's own sys/cdefs.h, sys/inttypes.h and sys/ioctl.h. */
#define	___RENAME(name)	__asm(#name)
#define	__RENAME(name)	___RENAME(name)
#define	__CAST(type, value)	((type)(value))
#define	_SYS_INTTYPES_H_
#undef _IO
#undef _IOR
#undef _IOW
#undef _IOWR
#include <sys/ioccom.h>
#include <sys/event.h>
#include <sys/filio.h>
#include <sys/syscall.h>
#include <rump/rump.h>
#include <rump/rump_syscalls.h>

int	rump_pub_lwproc_newlwp(pid_t);
void	rump_pub_lwproc_releaselwp(void);

#define	kqueue()	rump_sys_kqueue()
#define	kevent(...)	rump_sys_kevent(__VA_ARGS__)
#define	ioctl(...)	rump_sys_ioctl(__VA_ARGS__)
#define	pipe(fds)	rump_sys_pipe2(fds, 0)
#define	read(...)	rump_sys_read(__VA_ARGS__)
#define	write(...)	rump_sys_write(__VA_ARGS__)
#define	close(fd)	rump_sys_close(fd)
#define	fcntl(...)	rump_sys_fcntl(__VA_ARGS__)
#define	dup(fd)		rump_sys_dup(fd)
#define	poll(...)	rump_sys_poll(__VA_ARGS__)
#define	socketpair(...)	rump_sys_socketpair(__VA_ARGS__)
#define	getppid()	rump_sys_getppid()
#define	NONBLOCK	0x0004		/* NetBSD's O_NONBLOCK */
#define	RESTART		(-3)		/* its ERESTART, left to the caller */
#else
/* The headers' own under another name: they may be older than the kernel. */
#define	kevent	header_kevent
#include <sys/event.h>
#undef kevent
#include <sys/filio.h>
#include <sys/param.h>
#include <sys/sysctl.h>
#include <lwp.h>
#define	NONBLOCK	O_NONBLOCK
#define	RESTART		EBADF		/* made again, a call finds no kqueue */
#endif

/* A userland may be older than the kernel, and has no patch. */
#ifndef KQUEUE_TICKLE
#define	KQUEUE_TICKLE	_IO('k', 2)
#endif
#ifndef EVFILT_USER
#define	EVFILT_USER	8U
#define	NOTE_TRIGGER	0x01000000U
#endif

static const struct timespec poll_only;

#ifdef RUMP
static inline const char *
abi(void)
{
	return sizeof(struct kevent) > 40 ? "__kevent100" : "__kevent50";
}
#else
/*
 * Kernels from 10.99.7 on make __kevent100 out of each __kevent50, which would
 * be measured, too: so the programs call the newest that the kernel has.
 */
struct kevent {
	uintptr_t	ident;
	uint32_t	filter, flags, fflags;
	int64_t		data;
	void		*udata;
	uint64_t	ext[4];
};
#undef EV_SET
#define	EV_SET(event, i, f, fl, ff, d, u)				\
	(*(event) = (struct kevent){ .ident = (i), .filter = (f),	\
	    .flags = (fl), .fflags = (ff), .data = (d), .udata = (u) })
#define	KEVENT100	501	/* sys/kern/syscalls.master */
#define	OLD_LISTS	32	/* changes or events in a call, at most */

static bool has_kevent100;	/* kernel_start() asks */

/* As libc would do it: syscall(2) takes longer. */
static inline int
kevent100(int kq, const struct kevent *changes, size_t nchanges,
    struct kevent *events, size_t nevents, const struct timespec *ts)
{
#ifdef __x86_64__
	register size_t r10 __asm("r10") = (size_t)events;
	register size_t r8 __asm("r8") = nevents;
	register size_t r9 __asm("r9") = (size_t)ts;
	size_t rdx = nchanges;
	long result = KEVENT100;
	bool failed;

	/* The carry flag says that it failed; rdx is a second result. */
	__asm volatile("syscall" : "+a" (result), "=@ccc" (failed), "+d" (rdx)
	    : "D" ((long)kq), "S" (changes), "r" (r10), "r" (r8), "r" (r9)
	    : "rcx", "r11", "memory");
	if (failed)
		errno = (int)result;
	return failed ? -1 : (int)result;
#else
	return syscall(KEVENT100, kq, changes, nchanges, events, nevents, ts);
#endif
}

static inline int
some_kevent_of(int kq, const struct kevent *changes, size_t nchanges,
    struct kevent *events, size_t nevents, const struct timespec *ts)
{
	struct header_kevent in[OLD_LISTS], out[OLD_LISTS];
	int i, n;

	if (has_kevent100)
		return kevent100(kq, changes, nchanges, events, nevents, ts);
	if (nchanges > OLD_LISTS || nevents > OLD_LISTS)
		errx(1, "kevent: more than %d changes or events", OLD_LISTS);
	memset(in, 0, sizeof(in));
	for (i = 0; i < (int)nchanges; i++) {
		in[i].ident = changes[i].ident;
		in[i].filter = changes[i].filter;
		in[i].flags = changes[i].flags;
		in[i].fflags = changes[i].fflags;
		in[i].data = changes[i].data;
	}
	n = header_kevent(kq, in, nchanges, out, nevents, ts);
	for (i = 0; i < n; i++)
		EV_SET(&events[i], out[i].ident, out[i].filter, out[i].flags,
		    out[i].fflags, out[i].data, NULL);
	return n;
}
#define	kevent(...)	some_kevent_of(__VA_ARGS__)

static inline const char *
abi(void)
{
	return has_kevent100 ? "__kevent100" : "that of the headers";
}
#endif

/* Nanoseconds on a clock that only goes forward. */
static inline int64_t
now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}

static inline struct timespec
in_ns(int64_t ns)
{
	struct timespec ts;

	ts.tv_sec = ns / 1000000000;
	ts.tv_nsec = ns % 1000000000;
	return ts;
}

/* xorshift64*: the same numbers everywhere, for a run that can be repeated. */
static inline uint32_t
roll(uint64_t *state, uint32_t limit)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return (uint32_t)((*state * UINT64_C(2685821657736338717)) >> 33) %
	    limit;
}

/* A state for roll() from a seed and what it is for; never 0. */
static inline uint64_t
seeded(uint64_t seed, uint64_t use)
{
	return (seed + 1) * UINT64_C(0x9e3779b97f4a7c15) ^
	    (use + 1) * UINT64_C(0xbf58476d1ce4e5b9);
}

/* Start the kernel, if it is a library, else see what it has. */
static inline void
kernel_start(void)
{
#ifdef RUMP
	int out = (dup)(1), null = open("/dev/null", O_WRONLY);

	dup2(null, 1);		/* its console is stdout */
	if (rump_init() != 0)
		errx(1, "rump_init failed");
	fflush(stdout);
	dup2(out, 1);
	(close)(out);
	(close)(null);
#else
	signal(SIGSYS, SIG_IGN);
	has_kevent100 = kevent100(-1, NULL, 0, NULL, 0, NULL) == -1 &&
	    errno == EBADF;
	signal(SIGSYS, SIG_DFL);
#endif
}

/* For a thread of many system calls: a rump kernel is faster if it knows it. */
static inline void
thread_start(void)
{
#ifdef RUMP
	if (rump_pub_lwproc_newlwp(1) != 0)
		errx(1, "no thread of the rump kernel is left");
#endif
}

static inline void
thread_end(void)
{
#ifdef RUMP
	rump_pub_lwproc_releaselwp();
#endif
}

static inline bool
has_tickle(void)
{
	int kq = kqueue();
	bool has;

	if (kq == -1)
		err(1, "kqueue");
	has = ioctl(kq, KQUEUE_TICKLE) == 0;
	if (!has && errno != ENOTTY)
		err(1, "KQUEUE_TICKLE");
	close(kq);
	return has;
}

/* The number by which the system knows the calling thread. */
static inline long
thread_id(void)
{
#ifdef RUMP
	return syscall(SYS_gettid);
#else
	return _lwp_self();
#endif
}

/*
 * Whether a thread of this process sleeps in kevent.  NetBSD says what it
 * sleeps on.  With a rump kernel that is a lock of the host's: it has to have
 * slept through a millisecond.
 */
static inline bool
sleeps_in_kevent(long id)
{
#ifdef RUMP
	char name[64], line[128];
	long switches[2] = { -1, -2 };
	bool sleeps[2] = { false, false };
	FILE *status;
	int i;

	snprintf(name, sizeof(name), "/proc/self/task/%ld/status", id);
	for (i = 0; i < 2; i++) {
		if ((status = fopen(name, "r")) == NULL)
			return false;
		while (fgets(line, sizeof(line), status) != NULL) {
			if (strncmp(line, "State:\tS", 8) == 0)
				sleeps[i] = true;
			sscanf(line, "voluntary_ctxt_switches:\t%ld",
			    &switches[i]);
		}
		fclose(status);
		if (i == 0)
			usleep(1000);
	}
	return sleeps[0] && sleeps[1] && switches[0] == switches[1];
#else
	struct kinfo_lwp lwps[64];
	size_t size = sizeof(lwps), i;
	int mib[] = { CTL_KERN, KERN_LWP, getpid(), sizeof(lwps[0]), 64 };

	if (sysctl(mib, 5, lwps, &size, NULL, 0) == -1)
		err(1, "sysctl kern.lwp");
	for (i = 0; i < size / sizeof(lwps[0]); i++)
		if (lwps[i].l_lid == (int)id)
			return strcmp(lwps[i].l_wmesg, "kqueue") == 0;
	return false;
#endif
}

#ifndef RUMP
/* struct pool_sysctl (sys/pool.h): a name and 26 numbers. */
struct pool_numbers {
	char		name[16];
	uint64_t	numbers[26];
};
#define	POOLS		2000	/* at most */
#define	POOL_OUT	5	/* objects handed out, to caches as well */
#define	POOL_REQUESTS	24	/* answered by a cache; one more: not by it */

/* All pools; returns how many there are, 0 when the kernel does not say. */
static inline size_t
pools(struct pool_numbers all[POOLS])
{
	size_t size = POOLS * sizeof(*all);

	if (sysctlbyname("kern.pool", all, &size, NULL, 0) == -1)
		return 0;
	return size / sizeof(*all);
}
#endif
