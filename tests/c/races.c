/*
 * Tickles against waiters while everything else happens, too; none is lost.
 *
 *	races [-n rounds] [-s seed] [-e episode] [-w what,...] [-d every]
 *
 * An episode is a kqueue, 1 to 8 threads that wait in it, and a thousand
 * rounds, or ten thousand when nothing disturbs them.  In a round a tickle is
 * sent after a random delay, sometimes a burst of them, sometimes with
 * something else going on, and there is no next round before it is answered by
 * a return that may have consumed it.
 *
 * A round is accounted for, and -n counts those, when its only tickle was
 * answered by an EINTR that nothing but this tickle can have caused: no signal
 * came to the thread, and before the round no tickle was set and none on its
 * way out.  For that, all threads meet outside of kevent, and what is left is
 * cleared away, after each round that was not so: where events, an empty poll
 * or a signal ended the wait, or a burst, or an event or change was in play.
 * Only then a wait that ends by its timeout answers, as before NetBSD 10 it
 * may have met an event that was gone when it was looked at.  Nothing else comes to the
 * rescue of a tickle that is lost: it is named after ten seconds, with the
 * seed and the episode that make the same choices again.
 *
 * -w makes all episodes of one kind, as "timeouts,events", or "nothing".  With
 * -d each so many'th round sends no tickle, and it has to be named.
 */

#include "kq.h"
#include <stdatomic.h>

#define	ROUNDS		1000			/* in an episode */
#define	UNDISTURBED	10000			/* these cost less */
#define	BURST		16			/* tickles in a round, at most, */
#define	STORM		500			/* or rarely */
#define	WAITERS		8			/* at most */
#define	TICK_NS		INT64_C(10000000)	/* hz is 100 */
#define	LOST_NS		INT64_C(10000000000)	/* then it is lost */
#define	DROPPED_NS	INT64_C(1000000000)	/* the same, with -d */
#define	LAST_NS		INT64_C(50000000)	/* a wait that close ends */

/* One chance in so many, for a round or a wait. */
#define	SENDS_A_BURST	32
#define	IS_A_STORM	16			/* of bursts */
#define	IS_DISTURBED	8
#define	AWAITS_TIMEOUT	256
#define	DOES_POLL	16
#define	HAS_CHANGE	32
#define	DOES_FORK	8

/* What may happen in an episode, apart from tickles. */
enum {
	TIMEOUTS = 1,	/* waits whose timeouts are about to expire */
	POLLS = 2,
	CHANGES = 4,	/* knotes that come and go */
	EVENTS = 8,
	SIGNALS = 16,
	FORKS = 32,
	CLOSE = 64,	/* the kqueue is closed under the waits at the end */
	ALL = 127,
	DISTURBS = CHANGES | EVENTS | SIGNALS | FORKS,
#ifdef RUMP
	NEVER = SIGNALS | FORKS
#else
	NEVER = 0
#endif
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
static int only = -1;		/* -w */
static unsigned long drop;	/* -d */
static int kq, fds[2];
static unsigned int what, nwaiters;
static unsigned long rounds, accounted, tickles, bursts, raced, forks;
static struct waiter waiters[WAITERS];
static atomic_ulong asked;	/* the round */
static atomic_ulong answered;	/* twice the round, and 1 when certainly */
static atomic_ulong disturb, disturbed;	/* rounds: to do, and done */
static atomic_bool unsettled;	/* an event or a change may be in play */
static atomic_bool meet, closing, stop;
static atomic_uint met;		/* waiters that are out of kevent for meet */
static atomic_llong edge;	/* when a clock tick last ended a wait */
static atomic_uint left;	/* waiters that still wait */
static atomic_ulong eintrs, events, polls, timeouts, failures, signals, closed;
static __thread volatile sig_atomic_t signalled;

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
note(int signo)
{
	(void)signo;
	signalled = 1;
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

/* What was asked for has been heard: certainly, or so it may be. */
static void
answer(bool certainly)
{
	unsigned long heard = atomic_load(&asked);
	unsigned long before = atomic_load(&answered);

	while (before / 2 < heard && !atomic_compare_exchange_weak(&answered,
	    &before, 2 * heard + certainly))
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

static void
take_byte(const struct kevent *event)
{
	char byte;

	if (event->filter == EVFILT_READ)
		read(fds[0], &byte, 1);
}

static void *
wait_again_and_again(void *cookie)
{
	struct waiter *w = cookie;
	struct kevent event, change;

	thread_start();
	while (!atomic_load(&stop)) {
		bool polls_now = (what & POLLS) &&
		    roll(&w->state, DOES_POLL) == 0;
		bool changes = (what & CHANGES) &&
		    roll(&w->state, HAS_CHANGE) == 0;
		bool timed = (what & TIMEOUTS) && roll(&w->state, 2) == 0;
		struct timespec ts = in_ns(polls_now ? 0 :
		    1 + roll(&w->state, 1000000));
		int n;

		if (atomic_load(&meet)) {
			met++;
			while (atomic_load(&meet))
				sched_yield();
			met--;
			continue;
		}
		if (closing) {		/* NetBSD's race of close: FINDINGS.md */
			timed = true;
			ts = in_ns(LAST_NS);
		}
		if (changes) {
			change = some_change(&w->state);
			unsettled = true;
		}
		signalled = 0;
		n = kevent(kq, &change, changes, &event, 1,
		    polls_now || timed ? &ts : NULL);
		if (n == -1 && errno == EINTR) {
			eintrs++;
			answer(!signalled);
		} else if (n == -1 && closing &&
		    (errno == EBADF || errno == RESTART)) {
			closed++;
			break;
		} else if (n == -1) {
			err(1, "kevent in episode %ld, seed %" PRIu64, episode,
			    seed);
		} else if (n == 0 && polls_now) {
			polls++;
			answer(false);
		} else if (n == 0) {
			timeouts++;
			edge = now();
			if (unsettled)
				answer(false);
		} else if (event.flags & EV_ERROR) {
			failures++;	/* T6: there was no scan */
		} else {
			events++;
			take_byte(&event);
			answer(false);
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
	struct kevent change;
	unsigned long round;
	unsigned int kind;

	thread_start();
	while (!atomic_load(&stop)) {
		if ((round = atomic_load(&disturb)) == disturbed) {
			sched_yield();
			continue;
		}
		do
			kind = 1U << roll(state, 6);
		while (!(what & DISTURBS & kind));
		if (kind & (CHANGES | EVENTS))
			unsettled = true;
		spin(delay(state));
		switch (kind) {
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
			if (roll(state, DOES_FORK) == 0) {
				pid_t child = fork();

				if (child == 0)
					_exit(0);
				while (waitpid(child, NULL, 0) == -1 &&
				    errno == EINTR)
					continue;
				forks++;
			}
			break;
#endif
		}
		disturbed = round;
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

/* Return about when waits are going to time out: that is when clocks tick. */
static bool
await_timeout(uint64_t *state)
{
	int64_t last = atomic_load(&edge), began = now(), until;

	if (last == 0)
		return false;
	until = last + (began - last + TICK_NS - 1) / TICK_NS * TICK_NS;
	spin(until - 60000 + roll(state, 80000) - began);
	return true;
}

/* Bring all out of kevent, and leave no tickle, event or change behind. */
static void
settle(void)
{
	struct kevent event, change;

	while (disturbed != disturb)
		sched_yield();
	meet = true;
	while (met < nwaiters) {
		tickle();
		sched_yield();
	}
	if (unsettled) {	/* what there is not, is not deleted */
		EV_SET(&change, 1, EVFILT_TIMER, EV_DELETE, 0, 0, 0);
		kevent(kq, &change, 1, NULL, 0, NULL);
		EV_SET(&change, fds[1], EVFILT_WRITE, EV_DELETE, 0, 0, 0);
		kevent(kq, &change, 1, NULL, 0, NULL);
	}
	while (kevent(kq, NULL, 0, &event, 1, &poll_only) == 1)
		take_byte(&event);
	unsettled = false;
	meet = false;
	while (met > 0)
		sched_yield();
}

static void
one_round(uint64_t *state)
{
	unsigned long number = atomic_load(&asked) + 1, before = 0;
	unsigned int looks = 0, more = 0;
	bool dropped, certainly, alone, awaited = false;
	int64_t deadline = 0;

	rounds++;
	dropped = drop != 0 && rounds % drop == 0;
	if (roll(state, SENDS_A_BURST) == 0)
		more = roll(state, roll(state, IS_A_STORM) == 0 ? STORM : BURST);
	if ((what & DISTURBS) && roll(state, IS_DISTURBED) == 0)
		atomic_store(&disturb, number);
	spin(delay(state));
	if ((what & TIMEOUTS) && roll(state, AWAITS_TIMEOUT) == 0) {
		before = timeouts;
		awaited = await_timeout(state);
	}
	alone = more == 0;
	bursts += !alone;
	for (; more > 0 && !dropped; more--)
		tickle();
	atomic_store(&asked, number);
	if (!dropped)
		tickle();
	while (atomic_load(&answered) / 2 < number) {
		/* At first without a system call: it is on its way to sleep. */
		if (++looks < 500)
			continue;
		sched_yield();
		if (looks % 1024 != 0)
			continue;
		if (deadline == 0)
			deadline = now() + (drop ? DROPPED_NS : LOST_NS);
		else if (now() > deadline) {
			describe("a tickle is lost");
			exit(1);
		}
	}
	raced += awaited && timeouts != before;
	certainly = answered % 2;
	if (dropped && certainly) {
		describe("a tickle was answered that had not been sent");
		exit(3);
	}
	if (certainly && alone)
		accounted++;
	if (!certainly || !alone || unsettled || disturbed != disturb)
		settle();
}

static void
run_episode(void)
{
	uint64_t state = seeded(seed, episode), disturbing = seeded(state, 100);
	struct kevent change;
	pthread_t disturber;
	unsigned int i, n;

	nwaiters = 1 + roll(&state, WAITERS);
	what = roll(&state, 4) == 0 ? 0 : roll(&state, ALL + 1);
	what = (only == -1 ? what : (unsigned int)only) & ~NEVER;
	stop = closing = unsettled = false;
	asked = answered = disturb = disturbed = 0;
	edge = 0;
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
	n = what & DISTURBS ? ROUNDS : UNDISTURBED;
	for (i = 0; i < n; i++)
		one_round(&state);
	closing = what & CLOSE;
	settle();	/* and be done with disturbing */
	if (closing) {
		spin(delay(&state));
		tickle();
		close(kq);
	}
	stop = true;
	pthread_join(disturber, NULL);
	while (left > 0) {
		if (!closing)
			tickle();
		sched_yield();
	}
	for (i = 0; i < nwaiters; i++)
		pthread_join(waiters[i].thread, NULL);
	if (!closing)
		close(kq);
	close(fds[0]);
	close(fds[1]);
}

/* Read what -w says. */
static int
kinds(const char *list)
{
	unsigned int i;
	int found = 0;

	for (i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (strstr(list, names[i]) != NULL)
			found |= 1 << i;
	if (found == 0 && strcmp(list, "nothing") != 0)
		errx(2, "-w %s: nothing, or timeouts, polls, changes, events, "
		    "signals, forks, close", list);
	return found;
}

int
main(int argc, char **argv)
{
	unsigned long wanted = 100000;
	int option;

	seed = (uint64_t)now() % 1000000000;
	while ((option = getopt(argc, argv, "n:s:e:w:d:")) != -1) {
		switch (option) {
		case 'n':
			wanted = strtoul(optarg, NULL, 10);
			break;
		case 's':
			seed = strtoull(optarg, NULL, 10);
			break;
		case 'e':
			episode = atol(optarg);
			break;
		case 'w':
			only = kinds(optarg);
			break;
		case 'd':
			drop = strtoul(optarg, NULL, 10);
			break;
		default:
			errx(2, "usage: races [-n rounds] [-s seed] "
			    "[-e episode] [-w what,...] [-d every]");
		}
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	kernel_start();
	thread_start();
	printf("seed %" PRIu64 ", %s\n", seed, abi());
	if (!has_tickle())
		errx(2, "this kernel has no KQUEUE_TICKLE");
	signal(SIGUSR1, note);
	signal(SIGALRM, hangs);
	for (; accounted < wanted; episode++) {
		alarm(120);
		run_episode();
	}
	printf("%lu rounds accounted for of %lu, %lu tickles, none lost; "
	    "%lu waits ended by EINTR, %lu by events, %lu by their timeouts, "
	    "%lu with an error in a change; %lu empty polls, %lu bursts, "
	    "%lu timeouts raced, %lu signals, %lu forks, "
	    "%lu waits closed\n",
	    accounted, rounds, tickles, atomic_load(&eintrs),
	    atomic_load(&events), atomic_load(&timeouts),
	    atomic_load(&failures), atomic_load(&polls), bursts, raced,
	    atomic_load(&signals), forks, atomic_load(&closed));
	return 0;
}
