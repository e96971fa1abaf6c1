/*
 * Tickles against waiters while everything else happens, too; none is lost.
 *
 *	races [-n rounds] [-s seed] [-e episode]
 *
 * An episode is a kqueue, 1 to 8 threads that wait in it, and a thousand
 * rounds.  In a round a tickle is sent after a random delay, in some episodes a
 * burst of them, and the last one is answered by a return that could have
 * consumed it: EINTR, events, or an empty poll.  There is no next round before.
 * A wait that ends by its timeout answers nothing, unless events come and go:
 * a timeout that meets one returns 0 and, like every return from the scan,
 * consumes the tickle.  What disturbs a round is done once, so that nothing comes to the rescue of a tickle that was lost: it
 * is named after ten seconds, with the seed and the episode that make the same
 * choices again.
 */

#include "kq.h"
#include <stdatomic.h>

#define	ROUNDS		1000			/* in an episode */
#define	BURST		500			/* tickles in a round */
#define	WAITERS		8			/* at most */
#define	TICK_NS		INT64_C(10000000)	/* hz is 100 */
#define	LOST_NS		INT64_C(10000000000)	/* then it is lost */

/* What may happen in an episode, apart from tickles. */
enum {
	TIMEOUTS = 1,	/* waits whose timeouts are about to expire */
	POLLS = 2,
	CHANGES = 4,	/* knotes that come and go */
	EVENTS = 8,
	SIGNALS = 16,
	FORKS = 32,
	CLOSE = 64,	/* the kqueue is closed under the waits at the end */
	ALL = 127
};
static const char *const names[] = {
	"timeouts", "polls", "changes", "events", "signals", "forks", "close"
};

struct waiter {
	pthread_t	thread;
	uint64_t	state;
};

static uint64_t seed;
static long episode;
static int kq, fds[2];
static unsigned int what, nwaiters, burst;
static unsigned long tickles;
static struct waiter waiters[WAITERS];
static atomic_ulong asked, answered, disturb;
static atomic_bool stop;
static atomic_llong expires;	/* the timeout of the wait that began last */
static atomic_uint left;	/* waiters that still wait */
static atomic_ulong eintrs, events, polls, timeouts, failures, signals;

static void
describe(const char *problem)
{
	unsigned int i;

	printf("%s: round %lu of episode %ld, seed %" PRIu64 ", %u waiters",
	    problem, atomic_load(&asked), episode, seed, nwaiters);
	for (i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (what & 1U << i)
			printf(", %s", names[i]);
	printf(" (again: races -s %" PRIu64 " -e %ld)\n", seed, episode);
	fflush(stdout);
}

static void
hangs(int signo)
{
	(void)signo;
	describe("a call does not return");
	_exit(1);
}

static void
nothing(int signo)
{
	(void)signo;
}

static void
spin(int64_t ns)
{
	int64_t until = now() + ns;

	while (now() < until)
		continue;
}

/* From none to 100 us, the short ones more often. */
static int64_t
delay(uint64_t *state)
{
	static const uint32_t longest[] = { 1, 1, 1000, 3000, 10000, 100000 };

	return roll(state,
	    longest[roll(state, sizeof(longest) / sizeof(longest[0]))]);
}

/* All that was asked for before now has been heard. */
static void
answer(void)
{
	unsigned long heard = atomic_load(&asked);
	unsigned long before = atomic_load(&answered);

	while (before < heard &&
	    !atomic_compare_exchange_weak(&answered, &before, heard))
		continue;
}

static struct kevent
some_change(uint64_t *state)
{
	struct kevent change;

	switch (roll(state, 4)) {
	case 0:
		EV_SET(&change, 1, EVFILT_TIMER, EV_ADD | EV_ONESHOT, 0, 1, 0);
		break;
	case 1:
		EV_SET(&change, 1, EVFILT_TIMER, EV_DELETE, 0, 0, 0);
		break;
	case 2:
		EV_SET(&change, fds[1], EVFILT_WRITE, EV_ADD | EV_ONESHOT, 0, 0,
		    0);
		break;
	default:
		EV_SET(&change, fds[1], EVFILT_WRITE, EV_DELETE, 0, 0, 0);
		break;
	}
	return change;
}

static void *
wait_again_and_again(void *cookie)
{
	struct waiter *w = cookie;
	struct kevent event, change;
	char byte;

	thread_start();
	while (!atomic_load(&stop)) {
		bool polls_now = (what & POLLS) && roll(&w->state, 8) == 0;
		/* For NetBSD's race of close(2): FINDINGS.md. */
		bool timed = (what & CLOSE) ||
		    ((what & TIMEOUTS) && roll(&w->state, 2) == 0);
		bool changes = (what & CHANGES) && roll(&w->state, 8) == 0;
		uint32_t longest = what & TIMEOUTS ? 1000000 : 50000000;
		struct timespec ts = in_ns(polls_now ? 0 :
		    1 + roll(&w->state, longest));
		int n;

		if (changes)
			change = some_change(&w->state);
		if (timed)	/* rounded up to ticks, and one more */
			atomic_store(&expires, now() + 2 * TICK_NS);
		n = kevent(kq, &change, changes, &event, 1,
		    polls_now || timed ? &ts : NULL);
		if (n == -1 && errno == EINTR) {
			eintrs++;
			answer();
		} else if (n == -1 && atomic_load(&stop) &&
		    (errno == EBADF || errno == RESTART)) {
			break;
		} else if (n == -1) {
			err(1, "kevent in episode %ld, seed %" PRIu64, episode,
			    seed);
		} else if (n == 0 && polls_now) {
			polls++;
			answer();
		} else if (n == 0) {
			timeouts++;
			if (what & (EVENTS | CHANGES))
				answer();
		} else if (event.flags & EV_ERROR) {
			failures++;	/* T6: there was no scan */
		} else {
			events++;
			if (event.filter == EVFILT_READ)
				read(fds[0], &byte, 1);
			answer();
		}
	}
	left--;
	thread_end();
	return NULL;
}

/* Something else, once in a round that asks for it. */
static void *
disturb_it(void *cookie)
{
	uint64_t *state = cookie;
	unsigned long done = 0, round;
	struct kevent change;

	thread_start();
	while (!atomic_load(&stop)) {
		if ((round = atomic_load(&disturb)) == done) {
			sched_yield();
			continue;
		}
		done = round;
		spin(delay(state));
		switch (what & 1U << (2 + roll(state, 4))) {
		case CHANGES:
			change = some_change(state);
			kevent(kq, &change, 1, NULL, 0, NULL);
			break;
		case EVENTS:
			write(fds[1], "", 1);
			break;
#ifndef RUMP
		case SIGNALS:
			signals++;
			pthread_kill(waiters[roll(state, nwaiters)].thread,
			    SIGUSR1);
			break;
		case FORKS:
			if (roll(state, 100) == 0) {
				pid_t child = fork();

				if (child == 0)
					_exit(0);
				while (waitpid(child, NULL, 0) == -1 &&
				    errno == EINTR)
					continue;
			}
			break;
#endif
		}
	}
	thread_end();
	return NULL;
}

static void
tickle(void)
{
	if (ioctl(kq, KQUEUE_TICKLE) == -1)
		err(1, "KQUEUE_TICKLE in episode %ld, seed %" PRIu64, episode,
		    seed);
	tickles++;
}

/* Return when the wait that began last is about to time out, or just has. */
static void
await_timeout(uint64_t *state)
{
	int64_t until = atomic_load(&expires) - 5000 + roll(state, 50000);

	if (until < now() + 2 * TICK_NS + 100000)
		while (now() < until)
			continue;
}

static void
one_round(uint64_t *state)
{
	unsigned long number = atomic_load(&asked) + 1;
	unsigned int looks = 0, more = roll(state, burst);
	int64_t deadline = 0;

	if (roll(state, 2) == 0)
		atomic_store(&disturb, number);
	spin(delay(state));
	if ((what & TIMEOUTS) && roll(state, 64) == 0)
		await_timeout(state);
	while (more-- > 0)
		tickle();
	atomic_store(&asked, number);
	tickle();
	while (atomic_load(&answered) < number) {
		/* At first without a system call: it is on its way to sleep. */
		if (++looks < 500)
			continue;
		sched_yield();
		if (looks % 1024 != 0)
			continue;
		if (deadline == 0)
			deadline = now() + LOST_NS;
		else if (now() > deadline) {
			describe("a tickle is lost");
			exit(1);
		}
	}
}

static void
run_episode(void)
{
	uint64_t state = seeded(seed, episode), disturbing = seeded(state, 100);
	struct kevent change;
	pthread_t disturber;
	unsigned int i;

	nwaiters = 1 + roll(&state, WAITERS);
	burst = roll(&state, 2) == 0 ? 1 : 1 + roll(&state, BURST);
	what = roll(&state, 4) == 0 ? 0 : roll(&state, ALL + 1);
#ifdef RUMP
	what &= ~(SIGNALS | FORKS);
#endif
	stop = false;
	asked = answered = disturb = 0;
	left = nwaiters;
	if ((kq = kqueue()) == -1 || pipe(fds) == -1)
		err(1, "kqueue, pipe");
	fcntl(fds[0], F_SETFL, NONBLOCK);
	fcntl(fds[1], F_SETFL, NONBLOCK);
	EV_SET(&change, fds[0], EVFILT_READ, EV_ADD, 0, 0, 0);
	if (kevent(kq, &change, 1, NULL, 0, NULL) == -1)
		err(1, "kevent");
	for (i = 0; i < nwaiters; i++) {
		waiters[i].state = seeded(state, i);
		if (pthread_create(&waiters[i].thread, NULL,
		    wait_again_and_again, &waiters[i]) != 0)
			err(1, "pthread_create");
	}
	if (pthread_create(&disturber, NULL, disturb_it, &disturbing) != 0)
		err(1, "pthread_create");
	for (i = 0; i < ROUNDS; i++)
		one_round(&state);
	stop = true;
	pthread_join(disturber, NULL);
	if (what & CLOSE) {
		spin(delay(&state));
		tickle();
		close(kq);
	}
	while (left > 0) {
		if (!(what & CLOSE))
			tickle();
		sched_yield();
	}
	for (i = 0; i < nwaiters; i++)
		pthread_join(waiters[i].thread, NULL);
	if (!(what & CLOSE))
		close(kq);
	close(fds[0]);
	close(fds[1]);
}

int
main(int argc, char **argv)
{
	long rounds = 100000, done = 0;
	int option;

	seed = (uint64_t)now() % 1000000000;
	while ((option = getopt(argc, argv, "n:s:e:")) != -1) {
		switch (option) {
		case 'n':
			rounds = atol(optarg);
			break;
		case 's':
			seed = strtoull(optarg, NULL, 10);
			break;
		case 'e':
			episode = atol(optarg);
			break;
		default:
			errx(2, "usage: races [-n rounds] [-s seed] "
			    "[-e episode]");
		}
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("seed %" PRIu64 "\n", seed);
	kernel_start();
	thread_start();
	if (!has_tickle())
		errx(2, "this kernel has no KQUEUE_TICKLE");
	signal(SIGUSR1, nothing);
	signal(SIGALRM, hangs);
	for (; done < rounds; done += ROUNDS, episode++) {
		alarm(120);
		run_episode();
	}
	printf("%ld rounds, %lu tickles, none lost; %lu waits ended by EINTR, "
	    "%lu by events, %lu by their timeouts, "
	    "%lu with an error in a change; %lu empty polls, %lu signals\n",
	    done, tickles, atomic_load(&eintrs), atomic_load(&events),
	    atomic_load(&timeouts), atomic_load(&failures), atomic_load(&polls),
	    atomic_load(&signals));
	return 0;
}
