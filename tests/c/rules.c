/*
 * The rules of KQUEUE_TICKLE, T1 to T10, without Python: TAP on standard
 * output, exit status 1 when a rule is broken.
 *
 *	rules stock|patched
 *
 * On a stock kernel the same tests see what it does instead: the ioctl answers
 * ENOTTY, and a wait goes on to its timeout or its event.
 */

#include "kq.h"

#define	SHORT_NS	INT64_C(200000000)	/* a timeout that is to pass */
#define	LONG_NS		INT64_C(30000000000)	/* one that is not */

static bool patched;
static const char *self;	/* this program */
static const char *doing;	/* the rule being tested */
static const char *not_tested;	/* why the kernel cannot be asked */
static char broken[200];	/* how, if it is */

#define	EXPECT(what)	expect((what), #what, __LINE__)

static void
expect(bool right, const char *what, int line)
{
	if (!right && broken[0] == '\0')
		snprintf(broken, sizeof(broken), "rules.c:%d: %s (errno %d)",
		    line, what, errno);
}

/* One call of kevent in a thread of its own. */
struct waiter {
	pthread_t	thread;
	int		kq;
	int64_t		timeout;	/* ns */
	long volatile	id;
	bool volatile	over;
	int		result, error;
	int64_t		took;
	struct kevent	event;
};

static void *
wait_once(void *cookie)
{
	struct waiter *w = cookie;
	struct timespec ts = in_ns(w->timeout);
	int64_t began = now();

	w->id = thread_id();
	w->result = kevent(w->kq, NULL, 0, &w->event, 1, &ts);
	w->error = w->result == -1 ? errno : 0;
	w->took = now() - began;
	w->over = true;
	return NULL;
}

static void
start(struct waiter *w, int kq, int64_t timeout)
{
	memset(w, 0, sizeof(*w));
	w->kq = kq;
	w->timeout = timeout;
	if (pthread_create(&w->thread, NULL, wait_once, w) != 0)
		err(1, "pthread_create");
}

/* Return when it sleeps in kevent. */
static void
fall_asleep(struct waiter *w)
{
	while (w->id == 0 || !sleeps_in_kevent(w->id)) {
		if (w->over) {
			EXPECT(!"the thread did not sleep");
			return;
		}
		sched_yield();
	}
}

static void
end(struct waiter *w)
{
	pthread_join(w->thread, NULL);
}

static void
tickle(int kq)
{
	int result = ioctl(kq, KQUEUE_TICKLE);

	EXPECT(patched ? result == 0 : result == -1 && errno == ENOTTY);
}

/* A wait that is tickled: how long it may take, and what has to come of it. */
static int64_t
patience(void)
{
	return patched ? LONG_NS : SHORT_NS;
}

static void
interrupted(const struct waiter *w)
{
	if (patched)
		EXPECT(w->result == -1 && w->error == EINTR &&
		    w->took < LONG_NS);
	else
		EXPECT(w->result == 0 && w->took >= SHORT_NS / 2);
}

/* Wait here and now, and be interrupted. */
static void
wait_interrupted(int kq)
{
	struct waiter w = { .kq = kq, .timeout = patience() };

	wait_once(&w);
	interrupted(&w);
}

/* Wait here and now, and nothing happens. */
static void
wait_in_peace(int kq)
{
	struct waiter w = { .kq = kq, .timeout = SHORT_NS };

	wait_once(&w);
	EXPECT(w.result == 0);
}

static int
new_kqueue(void)
{
	int kq = kqueue();

	if (kq == -1)
		err(1, "kqueue");
	return kq;
}

/* A pipe whose reader the kqueue watches. */
static void
watch_pipe(int kq, int fds[2])
{
	struct kevent change;

	if (pipe(fds) == -1)
		err(1, "pipe");
	EV_SET(&change, fds[0], EVFILT_READ, EV_ADD, 0, 0, 0);
	EXPECT(kevent(kq, &change, 1, NULL, 0, NULL) == 0);
}

static void
t1(int kq)
{
	struct waiter w;

	start(&w, kq, patience());
	fall_asleep(&w);
	tickle(kq);
	end(&w);
	interrupted(&w);
}

static void
t2(int kq)
{
	struct waiter w = { .kq = kq, .timeout = LONG_NS };
	char byte = 0;
	int fds[2];

	watch_pipe(kq, fds);
	EXPECT(write(fds[1], &byte, 1) == 1);
	tickle(kq);
	wait_once(&w);
	EXPECT(w.result == 1 && w.event.ident == (uintptr_t)fds[0]);
	EXPECT(read(fds[0], &byte, 1) == 1);
	wait_in_peace(kq);
	close(fds[0]);
	close(fds[1]);
}

/* Mostly the thread has not run before the tickle comes, and finds both. */
static void
t2_asleep(int kq)
{
	struct waiter w;
	char byte = 0;
	int i, fds[2];

	watch_pipe(kq, fds);
	for (i = 0; i < 20; i++) {
		start(&w, kq, LONG_NS);
		fall_asleep(&w);
		EXPECT(write(fds[1], &byte, 1) == 1);
		tickle(kq);
		end(&w);
		EXPECT(w.result == 1 && w.event.ident == (uintptr_t)fds[0]);
		EXPECT(read(fds[0], &byte, 1) == 1);
		/* In case that the tickle came later: */
		kevent(kq, NULL, 0, &w.event, 1, &poll_only);
	}
	close(fds[0]);
	close(fds[1]);
}

static void
t3(int kq)
{
	tickle(kq);
	wait_interrupted(kq);
	wait_in_peace(kq);
}

static void
t4(int kq)
{
	int i;

	for (i = 0; i < 100; i++)
		tickle(kq);
	wait_interrupted(kq);
	wait_in_peace(kq);
}

static void
t5(int kq)
{
	struct kevent event;

	tickle(kq);
	EXPECT(kevent(kq, NULL, 0, &event, 1, &poll_only) == 0);
	wait_in_peace(kq);
}

static void
t6(int kq)
{
	struct kevent change;
	int fds[2];

	tickle(kq);
	watch_pipe(kq, fds);
	EV_SET(&change, fds[0], EVFILT_READ, EV_DELETE, 0, 0, 0);
	EXPECT(kevent(kq, &change, 1, NULL, 0, NULL) == 0);
	EXPECT(kevent(kq, &change, 1, NULL, 0, NULL) == -1 && errno == ENOENT);
	wait_interrupted(kq);
	close(fds[0]);
	close(fds[1]);
}

static void
t7(int kq)
{
	struct waiter waiters[4];
	int i, left, back;

	for (i = 0; i < 4; i++)
		start(&waiters[i], kq, patched ? LONG_NS : 10 * SHORT_NS);
	for (left = 4; left > 0; left -= back) {
		for (i = 0; i < 4; i++)
			if (!waiters[i].over)
				fall_asleep(&waiters[i]);
		tickle(kq);
		if (!patched)
			break;
		do {
			sched_yield();
			for (i = back = 0; i < 4; i++)
				back += waiters[i].over;
			back -= 4 - left;
		} while (back == 0);
	}
	for (i = 0; i < 4; i++) {
		end(&waiters[i]);
		if (patched)
			EXPECT(waiters[i].result == -1 &&
			    waiters[i].error == EINTR);
		else
			EXPECT(waiters[i].result == 0 &&
			    waiters[i].took >= 9 * SHORT_NS);
	}
}

static void
t8(int kq)
{
	struct kevent change;
	int outer = new_kqueue();
	struct pollfd fd = { .fd = kq, .events = POLLIN };

	EV_SET(&change, kq, EVFILT_READ, EV_ADD, 0, 0, 0);
	EXPECT(kevent(outer, &change, 1, NULL, 0, NULL) == 0);
	tickle(kq);
	wait_in_peace(outer);
	EXPECT(poll(&fd, 1, 0) == 0);
	wait_interrupted(kq);
	close(outer);
}

#ifndef RUMP
/* How often kmem(9) was asked. */
static uint64_t
allocations(void)
{
	static struct pool_numbers all[POOLS];
	size_t count = pools(all), i;
	uint64_t total = 0;

	for (i = 0; i < count; i++)
		if (strncmp(all[i].name, "kmem-", 5) == 0)
			total += all[i].numbers[POOL_REQUESTS] +
			    all[i].numbers[POOL_REQUESTS + 1];
	return total;
}

static void
unknown(int kq)
{
	EXPECT(ioctl(kq, _IO('k', 99)) == -1 && errno == ENOTTY);
}

/* For 100 calls; the rest of the system allocates, too, but not each time. */
static uint64_t
fewest_allocations(void (*call)(int), int kq)
{
	uint64_t before, took, fewest = UINT64_MAX;
	int batch, i;

	for (batch = 0; batch < 10; batch++) {
		before = allocations();
		for (i = 0; i < 100; i++)
			call(kq);
		took = allocations() - before;
		if (took < fewest)
			fewest = took;
	}
	return fewest;
}

static void
t9(int kq)
{
	uint64_t tickles;

	if (fewest_allocations(unknown, kq) < 100) {
		not_tested = "this kernel does not count its caches' work";
		return;
	}
	tickles = fewest_allocations(tickle, kq);
	EXPECT(patched ? tickles < 50 : tickles >= 100);
}

static void
t10_fork(int kq)
{
	int status;
	pid_t child;

	tickle(kq);
	if ((child = fork()) == 0)
		_exit(ioctl(kq, KQUEUE_TICKLE) == -1 && errno == EBADF ? 0 : 1);
	EXPECT(child != -1 && waitpid(child, &status, 0) == child &&
	    status == 0);
	wait_interrupted(kq);
}

/* In the new program: what the kqueue from before is like. */
static int
after_exec(const char *kept, const char *closed)
{
	int kq = atoi(kept);

	EXPECT(ioctl(atoi(closed), KQUEUE_TICKLE) == -1 && errno == EBADF);
	wait_interrupted(kq);
	tickle(kq);
	wait_interrupted(kq);
	if (broken[0])
		printf("# after exec: %s\n", broken);
	return broken[0] != '\0';
}

/*
 * A kqueue that is not close-on-exec is there after exec, and so is its tickle;
 * one that is has gone.
 */
static void
t10_exec(int kq)
{
	char kept[16], closed[16];
	int status, own, other;
	pid_t child;

	fflush(stdout);
	if ((child = fork()) == 0) {
		own = new_kqueue();
		other = new_kqueue();
		if (fcntl(own, F_SETFD, 0) == -1 ||
		    fcntl(other, F_SETFD, FD_CLOEXEC) == -1)
			err(1, "fcntl");
		tickle(own);
		tickle(other);
		snprintf(kept, sizeof(kept), "%d", own);
		snprintf(closed, sizeof(closed), "%d", other);
		execl(self, self, patched ? "patched" : "stock", kept, closed,
		    (char *)NULL);
		err(1, "%s", self);
	}
	EXPECT(child != -1 && waitpid(child, &status, 0) == child &&
	    status == 0);
	wait_in_peace(kq);
}
#endif

static void
t10_close(int kq)
{
	struct waiter waiters[3];
	int i, other = new_kqueue();

	for (i = 0; i < 3; i++)
		start(&waiters[i], other, 10 * SHORT_NS);
	for (i = 0; i < 3; i++)
		fall_asleep(&waiters[i]);
	close(other);
	for (i = 0; i < 3; i++) {
		end(&waiters[i]);
		EXPECT(waiters[i].result == 0 || waiters[i].error == EBADF ||
		    waiters[i].error == RESTART);
	}
	EXPECT(ioctl(other, KQUEUE_TICKLE) == -1 && errno == EBADF);
	wait_in_peace(kq);
}

static void
t10_ioctls(int kq)
{
	struct kfilter_mapping mapping;
	char name[32];
	int fds[2];

	mapping.name = name;
	mapping.len = sizeof(name);
	mapping.filter = EVFILT_READ;
	EXPECT(ioctl(kq, KFILTER_BYFILTER, &mapping) == 0 &&
	    strcmp(name, "EVFILT_READ") == 0);
	EXPECT(ioctl(kq, _IO('k', 99)) == -1 && errno == ENOTTY);
	watch_pipe(kq, fds);
	EXPECT(ioctl(fds[0], KQUEUE_TICKLE) == -1);
	close(fds[0]);
	close(fds[1]);
}

static const struct {
	const char *name, *stock;
	void (*test)(int);
} rules[] = {
	{ "T1 a thread asleep returns EINTR",
	    "ENOTTY, and it sleeps until its timeout", t1 },
	{ "T2 pending events win and consume the tickle",
	    "ENOTTY, and the event is returned", t2 },
	{ "T2 an event and a tickle wake a thread: it gets the event",
	    "ENOTTY, and the event is returned", t2_asleep },
	{ "T3 a tickle waits for the next wait",
	    "ENOTTY, and the wait lasts until its timeout", t3 },
	{ "T4 any number of tickles is one",
	    "ENOTTY each time", t4 },
	{ "T5 a poll returns 0 and consumes the tickle",
	    "ENOTTY, and the poll returns 0", t5 },
	{ "T6 changes neither see nor consume a tickle",
	    "ENOTTY", t6 },
	{ "T7 a tickle brings one of several threads back",
	    "ENOTTY, and all sleep until their timeout", t7 },
	{ "T8 a tickle makes nothing readable",
	    "ENOTTY", t8 },
#ifndef RUMP
	{ "T9 a tickle allocates nothing",
	    "ENOTTY, after an allocation", t9 },
	{ "T10 the child of a fork has no kqueue",
	    "the same", t10_fork },
	{ "T10 exec keeps a kqueue and its tickle, or closes both",
	    "ENOTTY, and the same", t10_exec },
#endif
	{ "T10 a kqueue is closed while threads wait",
	    "the same", t10_close },
	{ "T10 the other ioctls work as before",
	    "the same", t10_ioctls },
};

static void
hangs(int signo)
{
	char line[200];

	(void)signo;
	snprintf(line, sizeof(line), "not ok - %s: a call does not return\n",
	    doing);
	if (fwrite(line, strlen(line), 1, stdout) == 1)
		fflush(stdout);
	_exit(1);
}

int
main(int argc, char **argv)
{
	const size_t count = sizeof(rules) / sizeof(rules[0]);
	int failed = 0;
	size_t i;

	if ((argc != 2 && argc != 4) ||
	    (strcmp(argv[1], "patched") != 0 && strcmp(argv[1], "stock") != 0))
		errx(2, "usage: rules stock|patched");
	patched = strcmp(argv[1], "patched") == 0;
	setvbuf(stdout, NULL, _IOLBF, 0);
	self = argv[0];
	kernel_start();
#ifndef RUMP
	if (argc == 4)
		return after_exec(argv[2], argv[3]);
#endif
	printf("# %s\n", abi());
	if (has_tickle() != patched)
		errx(2, "this is not a %s kernel", argv[1]);
	signal(SIGALRM, hangs);
	printf("1..%zu\n", count);
	for (i = 0; i < count; i++) {
		int kq = new_kqueue();

		doing = rules[i].name;
		broken[0] = '\0';
		not_tested = NULL;
		alarm(60);
		rules[i].test(kq);
		alarm(0);
		printf("%s %zu - %s", broken[0] ? "not ok" : "ok", i + 1,
		    doing);
		if (!patched)
			printf(" (stock: %s)", rules[i].stock);
		if (not_tested != NULL)
			printf(" # SKIP not counted: %s", not_tested);
		printf("\n");
		if (broken[0])
			printf("# %s\n", broken);
		failed |= broken[0] != '\0';
		close(kq);
	}
	return failed;
}
