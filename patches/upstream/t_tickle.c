/*	@NetBSD@	*/

/*-
 * Copyright (c) 2026 the pykq authors
 * All rights reserved.
 *
 * Redistribution and use in source and binary forms, with or without
 * modification, are permitted provided that the following conditions
 * are met:
 * 1. Redistributions of source code must retain the above copyright
 *    notice, this list of conditions and the following disclaimer.
 * 2. Redistributions in binary form must reproduce the above copyright
 *    notice, this list of conditions and the following disclaimer in the
 *    documentation and/or other materials provided with the distribution.
 *
 * THIS SOFTWARE IS PROVIDED BY THE AUTHORS AND CONTRIBUTORS ``AS IS'' AND
 * ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
 * IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE
 * ARE DISCLAIMED.  IN NO EVENT SHALL THE AUTHORS OR CONTRIBUTORS BE LIABLE
 * FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
 * DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS
 * OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION)
 * HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT
 * LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY
 * OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF
 * SUCH DAMAGE.
 */

#include <sys/cdefs.h>
__RCSID("@NetBSD@");

#include <sys/types.h>
#include <sys/event.h>
#include <sys/ioctl.h>
#include <sys/sysctl.h>
#include <sys/time.h>

#include <errno.h>
#include <lwp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <atf-c.h>

#define	NTHREADS	4
#define	PATIENCE	60	/* seconds, for what a busy host delays */

static const struct timespec now;
static const struct timespec brief = { 0, 200000000 };	/* is to pass */
static const struct timespec ample = { 30, 0 };		/* is not to */

/* One call of kevent(2), in a thread of its own or in the caller's. */
struct call {
	int			kq;
	const struct timespec	*timeout;
	struct kevent		event;
	int			rv, error;
	pthread_t		thread;
	volatile lwpid_t	lid;
	volatile bool		over;
};

static void *
call_kevent(void *arg)
{
	struct call *c = arg;

	c->lid = _lwp_self();
	c->rv = kevent(c->kq, NULL, 0, &c->event, 1, c->timeout);
	c->error = c->rv == -1 ? errno : 0;
	c->over = true;
	return NULL;
}

/* Call kevent(2) here and now, and see what it returns. */
static void
check_kevent(int kq, const struct timespec *timeout, int rv, int error)
{
	struct call c = { .kq = kq, .timeout = timeout };

	call_kevent(&c);
	ATF_CHECK_EQ_MSG(rv, c.rv, "kevent returned %d, errno %d", c.rv,
	    c.error);
	ATF_CHECK_EQ(error, c.error);
}

static void
start(struct call *c, int kq, const struct timespec *timeout)
{

	memset(c, 0, sizeof(*c));
	c->kq = kq;
	c->timeout = timeout;
	ATF_REQUIRE_EQ(0, pthread_create(&c->thread, NULL, call_kevent, c));
}

static time_t
uptime(void)
{
	struct timespec ts;

	ATF_REQUIRE(clock_gettime(CLOCK_MONOTONIC, &ts) == 0);
	return ts.tv_sec;
}

/* Wait until the thread sleeps in kevent(2), or has returned from it. */
static bool
wait_asleep(struct call *c)
{
	struct kinfo_lwp kl[2 * NTHREADS];
	const int mib[] = { CTL_KERN, KERN_LWP, getpid(), sizeof(kl[0]),
	    __arraycount(kl) };
	const time_t deadline = uptime() + PATIENCE;
	size_t len, i;

	while (!c->over) {
		ATF_REQUIRE_MSG(uptime() < deadline,
		    "a thread neither sleeps in kevent nor returns");
		len = sizeof(kl);
		ATF_REQUIRE_EQ(0, sysctl(mib, __arraycount(mib), kl, &len,
		    NULL, 0));
		for (i = 0; i < len / sizeof(kl[0]); i++) {
			if (kl[i].l_lid == c->lid &&
			    strcmp(kl[i].l_wmesg, "kqueue") == 0)
				return true;
		}
		sched_yield();
	}
	return false;
}

static void
tickle(int kq)
{

	ATF_REQUIRE_MSG(ioctl(kq, KQUEUE_TICKLE) == 0, "KQUEUE_TICKLE: %s",
	    strerror(errno));
}

static int
new_kqueue(void)
{
	int kq;

	ATF_REQUIRE((kq = kqueue()) != -1);
	return kq;
}

/* Change one event of a queue, and look for none. */
static int
change(int kq, int fd, uint32_t flags)
{
	struct kevent event;

	EV_SET(&event, fd, EVFILT_READ, flags, 0, 0, 0);
	return kevent(kq, &event, 1, NULL, 0, NULL);
}

ATF_TC(asleep);
ATF_TC_HEAD(asleep, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "A thread asleep in kevent returns EINTR");
}

ATF_TC_BODY(asleep, tc)
{
	int kq = new_kqueue();
	struct call c;

	start(&c, kq, &ample);
	ATF_REQUIRE_MSG(wait_asleep(&c), "kevent returned %d, errno %d", c.rv,
	    c.error);
	tickle(kq);
	ATF_REQUIRE_EQ(0, pthread_join(c.thread, NULL));
	ATF_CHECK_EQ(-1, c.rv);
	ATF_CHECK_EQ(EINTR, c.error);
	check_kevent(kq, &brief, 0, 0);
}

ATF_TC(pending);
ATF_TC_HEAD(pending, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "Pending events win over a tickle and consume it");
}

ATF_TC_BODY(pending, tc)
{
	int kq = new_kqueue(), p[2];
	char c = 0;

	ATF_REQUIRE(pipe(p) == 0);
	ATF_REQUIRE(change(kq, p[0], EV_ADD) == 0);
	ATF_REQUIRE(write(p[1], &c, 1) == 1);
	tickle(kq);
	check_kevent(kq, &ample, 1, 0);
	ATF_REQUIRE(read(p[0], &c, 1) == 1);
	check_kevent(kq, &brief, 0, 0);
}

ATF_TC(kept);
ATF_TC_HEAD(kept, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "With nobody asleep a tickle is kept for the next wait");
}

ATF_TC_BODY(kept, tc)
{
	int kq = new_kqueue();

	tickle(kq);
	check_kevent(kq, &ample, -1, EINTR);
	check_kevent(kq, &brief, 0, 0);
}

ATF_TC(many);
ATF_TC_HEAD(many, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "Any number of tickles before a return are one");
}

ATF_TC_BODY(many, tc)
{
	int kq = new_kqueue(), i;

	for (i = 0; i < 100; i++)
		tickle(kq);
	check_kevent(kq, &ample, -1, EINTR);
	check_kevent(kq, &brief, 0, 0);
}

ATF_TC(poll);
ATF_TC_HEAD(poll, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "A call that would not sleep returns 0 and consumes a tickle");
}

ATF_TC_BODY(poll, tc)
{
	int kq = new_kqueue();

	tickle(kq);
	check_kevent(kq, &now, 0, 0);
	check_kevent(kq, &brief, 0, 0);
}

ATF_TC(changes);
ATF_TC_HEAD(changes, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "A call without room for events neither sees nor consumes a "
	    "tickle");
}

ATF_TC_BODY(changes, tc)
{
	int kq = new_kqueue(), p[2];

	ATF_REQUIRE(pipe(p) == 0);
	tickle(kq);
	ATF_CHECK(change(kq, p[0], EV_ADD) == 0);
	ATF_CHECK(change(kq, p[0], EV_DELETE) == 0);
	ATF_CHECK_ERRNO(ENOENT, change(kq, p[0], EV_DELETE) == -1);
	check_kevent(kq, &ample, -1, EINTR);
}

ATF_TC(threads);
ATF_TC_HEAD(threads, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "Of several threads asleep a tickle interrupts at least one, "
	    "and the others sleep on");
}

ATF_TC_BODY(threads, tc)
{
	int kq = new_kqueue(), asleep, i, over;
	struct call c[NTHREADS];
	time_t deadline;

	for (i = 0; i < NTHREADS; i++)
		start(&c[i], kq, &ample);
	for (;;) {
		for (i = asleep = 0; i < NTHREADS; i++)
			asleep += wait_asleep(&c[i]);
		if (asleep == 0)
			break;
		tickle(kq);
		deadline = uptime() + PATIENCE;
		do {
			ATF_REQUIRE_MSG(uptime() < deadline,
			    "no thread returned");
			sched_yield();
			for (i = over = 0; i < NTHREADS; i++)
				over += c[i].over;
		} while (over + asleep == NTHREADS);
	}
	for (i = 0; i < NTHREADS; i++) {
		ATF_REQUIRE_EQ(0, pthread_join(c[i].thread, NULL));
		ATF_CHECK_EQ(-1, c[i].rv);
		ATF_CHECK_EQ(EINTR, c[i].error);
	}
	check_kevent(kq, &brief, 0, 0);
}

ATF_TC(notevent);
ATF_TC_HEAD(notevent, tc)
{

	atf_tc_set_md_var(tc, "descr",
	    "A tickle does not make the queue readable");
}

ATF_TC_BODY(notevent, tc)
{
	int kq = new_kqueue(), outer = new_kqueue();
	struct pollfd pfd = { .fd = kq, .events = POLLIN };

	ATF_REQUIRE(change(outer, kq, EV_ADD) == 0);
	tickle(kq);
	check_kevent(outer, &brief, 0, 0);
	ATF_CHECK_EQ(0, poll(&pfd, 1, 0));
	check_kevent(kq, &ample, -1, EINTR);
}

ATF_TP_ADD_TCS(tp)
{

	ATF_TP_ADD_TC(tp, asleep);
	ATF_TP_ADD_TC(tp, pending);
	ATF_TP_ADD_TC(tp, kept);
	ATF_TP_ADD_TC(tp, many);
	ATF_TP_ADD_TC(tp, poll);
	ATF_TP_ADD_TC(tp, changes);
	ATF_TP_ADD_TC(tp, threads);
	ATF_TP_ADD_TC(tp, notevent);

	return atf_no_error();
}
