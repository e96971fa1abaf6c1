/*
 * What it costs to wake a thread that waits in kevent: a tickle and its
 * rivals, in one run, one after the other in each round; each round begins with
 * another one, and a round before the first is not counted.
 *
 *	rivals [-r rounds] [-n wake-ups in a round]
 *
 * prints JSON; all times are nanoseconds, a round's costs are medians of its
 * sends.
 */

#include "kq.h"
#include <stdatomic.h>

#define	CALLS		2000	/* sends in a round */
#define	BATCH		50	/* of them between two looks at the clock */
#define	FLOOD_NS	INT64_C(50000000)	/* of sending, in a round */
#define	STREAM		32	/* descriptors with events that never end */
#define	STREAM_EVENTS	16	/* taken by one kevent */
#define	RESCUE_NS	INT64_C(20000000)	/* then: was it too early? */
#define	SLEEPS		100	/* sends to a thread asleep, in a round */
#define	BUSY_SENDS	1000	/* sends to one that never sleeps */
#define	BUSY_NS		20000	/* at most, between them */

/* A kqueue that a thread waits on, and what its wakers need. */
struct target {
	int		kq;
	int		fds[2];		/* reader and writer */
	pthread_t	thread;		/* that waits */
	atomic_long	id;
};

/* What each round measures: a number, or a distribution. */
enum { AWAKE, PENDING, ASLEEP, COSTS };
static const char *const costs[COSTS] = {
	"awake_ns", "pending_ns", "asleep_ns"
};
enum { LATENCY, ROUND_TRIP, NOTE, OWN_EVENT, TIMES };
static const char *const times[TIMES] = {
	"latency_ns", "round_trip_ns", "behind_note_ns", "behind_event_ns"
};
#define	FLOODS	4	/* with 1, 2, 4 and 8 senders */
#define	CROWDS	4	/* of 2, 4 and 8 sleepers, and of one beside a poller */

struct way {
	const char	*name;
	bool		(*open)(struct target *);	/* false: not there */
	bool		(*send)(struct target *);	/* false: no room */
	bool		(*woke)(struct target *, int, const struct kevent *);
	int		descriptors;	/* that it needs, besides the kqueue */
	int		calls;		/* of a wake-up, besides kevent */
	bool		there;
	struct target	targets[2];
	double		*cost[COSTS], *per_second[FLOODS], *received[FLOODS];
	int64_t		*time[TIMES];
	long		lost;		/* that only a timeout made good */
};

static int rounds = 5, wake_ups = 2000;

static void
must(int result, const char *what)
{
	if (result == -1 && errno != EINTR)
		err(1, "%s", what);
}

/* KQUEUE_TICKLE */

static bool
tickle_open(struct target *t)
{
	(void)t;
	return has_tickle();
}

static bool
tickle_send(struct target *t)
{
	must(ioctl(t->kq, KQUEUE_TICKLE), "KQUEUE_TICKLE");
	return true;
}

static bool
tickle_woke(struct target *t, int n, const struct kevent *events)
{
	(void)t, (void)events;
	return n == -1;
}

/* EVFILT_USER */

static bool
user_open(struct target *t)
{
	struct kevent change;

	EV_SET(&change, 1, EVFILT_USER, EV_ADD | EV_CLEAR, 0, 0, 0);
	return kevent(t->kq, &change, 1, NULL, 0, NULL) == 0;
}

static bool
user_send(struct target *t)
{
	struct kevent change;

	EV_SET(&change, 1, EVFILT_USER, 0, NOTE_TRIGGER, 0, 0);
	must(kevent(t->kq, &change, 1, NULL, 0, NULL), "NOTE_TRIGGER");
	return true;
}

static bool
user_woke(struct target *t, int n, const struct kevent *events)
{
	int i;

	(void)t;
	for (i = 0; i < n; i++)
		if (events[i].filter == EVFILT_USER)
			return true;
	return false;
}

/* A byte through a pipe or a pair of sockets. */

static void
watch(struct target *t)
{
	struct kevent change;

	must(fcntl(t->fds[0], F_SETFL, NONBLOCK), "fcntl");
	must(fcntl(t->fds[1], F_SETFL, NONBLOCK), "fcntl");
	EV_SET(&change, t->fds[0], EVFILT_READ, EV_ADD, 0, 0, 0);
	must(kevent(t->kq, &change, 1, NULL, 0, NULL), "kevent");
}

static bool
pipe_open(struct target *t)
{
	must(pipe(t->fds), "pipe");
	watch(t);
	return true;
}

static bool
sockets_open(struct target *t)
{
	if (socketpair(1 /* PF_LOCAL */, 1 /* SOCK_STREAM */, 0, t->fds) == -1)
		return false;
	watch(t);
	return true;
}

/* A full pipe has woken its reader: that is no send. */
static bool
byte_send(struct target *t)
{
	return write(t->fds[1], "", 1) == 1;
}

static bool
byte_woke(struct target *t, int n, const struct kevent *events)
{
	static char bytes[65536];
	int i;

	for (i = 0; i < n; i++)
		if (events[i].ident == (uintptr_t)t->fds[0] &&
		    events[i].filter == EVFILT_READ) {
			must(read(t->fds[0], bytes, sizeof(bytes)), "read");
			return true;
		}
	return false;
}

/* pthread_kill: the handler counts, as between two waits it ends none. */

static __thread volatile unsigned long handled;

static void
handle(int signo)
{
	(void)signo;
	handled++;
}

static bool
kill_open(struct target *t)
{
	(void)t;
#ifdef RUMP
	(void)handle;
	return false;	/* a signal does not end its waits */
#else
	signal(SIGUSR1, handle);
	return true;
#endif
}

static bool
kill_woke(struct target *t, int n, const struct kevent *events)
{
	bool came = handled != 0;

	(void)t, (void)n, (void)events;
	handled = 0;
	return came;
}

static bool
kill_send(struct target *t)
{
	int error = pthread_kill(t->thread, SIGUSR1);

	if (error != 0 && error != ESRCH)	/* it may be over by now */
		errx(1, "pthread_kill: %s", strerror(error));
	return error == 0;
}

static struct way ways[] = {
	{ "KQUEUE_TICKLE", tickle_open, tickle_send, tickle_woke, 0, 1 },
	{ "EVFILT_USER", user_open, user_send, user_woke, 0, 1 },
	{ "pipe", pipe_open, byte_send, byte_woke, 2, 2 },
	{ "socket pair", sockets_open, byte_send, byte_woke, 2, 2 },
	{ "pthread_kill", kill_open, kill_send, kill_woke, 0, 1 },
};
#define	WAYS	(sizeof(ways) / sizeof(ways[0]))

/* Wait until woken. */
static void
wait_for(struct way *way, struct target *t)
{
	struct timespec rescue = in_ns(RESCUE_NS);
	struct kevent events[STREAM_EVENTS];
	bool signals = way->woke == kill_woke;
	int n;

	for (;;) {
		if (signals && kill_woke(t, 0, NULL))
			return;
		/* A signal that comes now is lost. */
		n = kevent(t->kq, NULL, 0, events, STREAM_EVENTS,
		    signals ? &rescue : NULL);
		if (way->woke(t, n, events)) {
			way->lost += n == 0;
			return;
		}
	}
}

/* After sends that nobody waited for. */
static void
clean(struct way *way, struct target *t)
{
	struct kevent events[STREAM_EVENTS];
	int n = kevent(t->kq, NULL, 0, events, STREAM_EVENTS, &poll_only);

	way->woke(t, n, events);
}

/* The other thread, which does one of these for a target. */
struct part {
	struct way	*way;
	struct target	*target, *back;
	int		count;
	int64_t volatile sent;
	int64_t		*latency, *event;
	long		received;
	atomic_int	ready, done;
	atomic_bool	stop, noted;
	pthread_mutex_t	lock;		/* for what follows */
	pthread_cond_t	changed;
	int		seen;		/* notes, and events where there are */
};

static void *
echo(void *cookie)
{
	struct part *p = cookie;
	int i;

	thread_start();
	p->target->id = thread_id();
	p->ready = 1;
	for (i = 0; i < p->count; i++) {
		wait_for(p->way, p->target);
		if (p->latency != NULL)
			p->latency[i] = now() - p->sent;
		p->done = i + 1;
		if (p->back != NULL)
			p->way->send(p->back);
	}
	thread_end();
	return NULL;
}

/* Does something else; for signals, blocks them when p->count is not 0. */
static void *
run_busily(void *cookie)
{
	struct part *p = cookie;
#ifndef RUMP
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	if (p->count != 0)
		pthread_sigmask(SIG_BLOCK, &set, NULL);
#endif
	p->ready = 1;
	while (!p->stop) {
		if (handled != 0) {
			handled = 0;
			p->done++;
		}
		sched_yield();
	}
	return NULL;
}

static void
begin(struct part *p, void *(*body)(void *))
{
	p->ready = p->done = 0;
	p->stop = false;
	p->target->id = 0;
	if (pthread_create(&p->target->thread, NULL, body, p) != 0)
		err(1, "pthread_create");
	while (!p->ready)
		sched_yield();
}

static int
by_size(const void *left, const void *right)
{
	int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;

	return (a > b) - (a < b);
}

/* The smallest that so many of a thousand are not greater than. */
static int64_t
quantile(const int64_t *sorted, int count, int per_mille)
{
	int rank = (int)(((int64_t)count * per_mille + 999) / 1000);

	return sorted[rank > 0 ? rank - 1 : 0];
}

static int64_t
median(int64_t *numbers, int count)
{
	qsort(numbers, count, sizeof(*numbers), by_size);
	return quantile(numbers, count, 500);
}

/* One of many calls in a row. */
static double
cost_of(bool (*call)(struct target *), struct target *t)
{
	int64_t took[CALLS / BATCH], began;
	int i, j;

	for (i = 0; i < CALLS / BATCH; i++) {
		began = now();
		for (j = 0; j < BATCH; j++)
			call(t);
		took[i] = now() - began;
	}
	return (double)median(took, CALLS / BATCH) / BATCH;
}

static bool
fioclex(struct target *t)
{
	must(ioctl(t->kq, FIOCLEX), "FIOCLEX");
	return true;
}

static bool
parent(struct target *t)
{
	(void)t;
	(void)getppid();
	return true;
}

static bool
look_at_clock(struct target *t)
{
	(void)t;
	return now() != 0;
}

/* The least that an ioctl can do, measured as if it were a way to wake. */
static bool
never_woke(struct target *t, int n, const struct kevent *events)
{
	(void)t, (void)n, (void)events;
	return false;
}
static struct way fioclex_as_a_way = { "FIOCLEX", NULL, fioclex, never_woke };

/* A send while the thread does something else, and nothing is pending. */
static double
cost_awake(struct way *way, int64_t clock)
{
	struct part p = { .way = way, .target = &way->targets[1] };
	bool signals = way->woke == kill_woke;
	int64_t took[CALLS], began;
	int i, calls = signals ? SLEEPS : CALLS;	/* a handler takes long */

	if (signals)
		begin(&p, run_busily);
	for (i = 0; i < calls; i++) {
		began = now();
		way->send(p.target);
		took[i] = now() - began - clock;
		if (!signals)
			clean(way, p.target);
		else
			while (p.done <= i)
				sched_yield();
	}
	if (signals) {
		p.stop = true;
		pthread_join(p.target->thread, NULL);
	}
	return median(took, calls);
}

/* A send while one is pending. */
static double
cost_pending(struct way *way)
{
	struct part p = { .way = way, .target = &way->targets[1], .count = 1 };
	bool signals = way->woke == kill_woke;
	double cost;

	if (signals)
		begin(&p, run_busily);
	way->send(p.target);
	cost = cost_of(way->send, p.target);
	if (signals) {
		p.stop = true;
		pthread_join(p.target->thread, NULL);
	} else
		clean(way, p.target);
	return cost;
}

/* A send while the thread sleeps in kevent: it has to be made to run. */
static double
cost_asleep(struct way *way, int64_t clock)
{
	struct part p = { .way = way, .target = &way->targets[1],
	    .count = SLEEPS };
	int64_t took[SLEEPS], began;
	int i;

	begin(&p, echo);
	for (i = 0; i < SLEEPS; i++) {
		while (!sleeps_in_kevent(p.target->id))
			continue;
		began = now();
		way->send(p.target);
		took[i] = now() - began - clock;
		while (p.done <= i)
			sched_yield();
	}
	pthread_join(p.target->thread, NULL);
	return median(took, SLEEPS);
}

/* There and back: each thread wakes the other the same way. */
static void
ping_pong(struct way *way, int64_t *latency, int64_t *round_trip)
{
	struct target *mine = &way->targets[0];
	struct part p = { .way = way, .target = &way->targets[1], .back = mine,
	    .count = wake_ups, .latency = latency };
	int i;

	mine->thread = pthread_self();
	begin(&p, echo);
	for (i = 0; i < wake_ups; i++) {
		p.sent = now();
		way->send(p.target);
		wait_for(way, mine);
		round_trip[i] = now() - p.sent;
	}
	pthread_join(p.target->thread, NULL);
}

struct sender {
	struct part	*part;
	pthread_t	thread;
	long		sent;
};

static void *
send_until_stopped(void *cookie)
{
	struct sender *s = cookie;

	thread_start();
	while (!s->part->stop) {
		s->sent += s->part->way->send(s->part->target);
	}
	thread_end();
	return NULL;
}

static void *
wait_until_stopped(void *cookie)
{
	struct part *p = cookie;

	thread_start();
	p->ready = 1;
	while (!p->stop) {
		wait_for(p->way, p->target);
		p->received++;
	}
	p->done = 1;
	thread_end();
	return NULL;
}

/* Sends in a second, by several threads to one, and what it received. */
static void
flood(struct way *way, int senders, double *per_second, double *received)
{
	struct part p = { .way = way, .target = &way->targets[1] };
	struct sender all[1 << (FLOODS - 1)];
	struct timespec ts = in_ns(FLOOD_NS);
	int64_t began, took;
	long sent = 0;
	int i;

	begin(&p, wait_until_stopped);
	memset(all, 0, sizeof(all));
	began = now();
	for (i = 0; i < senders; i++) {
		all[i].part = &p;
		if (pthread_create(&all[i].thread, NULL, send_until_stopped,
		    &all[i]) != 0)
			err(1, "pthread_create");
	}
	nanosleep(&ts, NULL);
	p.stop = true;
	for (i = 0; i < senders; i++) {
		pthread_join(all[i].thread, NULL);
		sent += all[i].sent;
	}
	took = now() - began;
	while (!p.done) {
		way->send(p.target);
		sched_yield();
	}
	pthread_join(p.target->thread, NULL);
	clean(way, p.target);
	*per_second = sent * 1e9 / took;
	*received = p.received * 1e9 / took;
}

/*
 * A server that is never out of events.  Whatever the way, its sender leaves a
 * note after the send, and the server looks for it after each kevent, as one
 * that is tickled has to: events win over a tickle.  A rival's own event has
 * its turn, too; a tickle has none.
 */
static void *
serve(void *cookie)
{
	struct part *p = cookie;
	struct kevent events[STREAM_EVENTS];
	bool has_event = p->way->woke != tickle_woke;
	bool noted = false, came = false, woke;
	int64_t at;
	int i = 0, n;

	thread_start();
	p->ready = 1;
	while (!p->stop) {
		n = kevent(p->target->kq, NULL, 0, events, STREAM_EVENTS, NULL);
		woke = p->way->woke(p->target, n, events);
		if (!p->noted && !woke)
			continue;
		at = now() - p->sent;
		if (p->noted && !noted) {
			p->latency[i] = at;
			noted = true;
		}
		if (woke && has_event && !came) {
			p->event[i] = at;
			came = true;
		}
		if (!noted || (has_event && !came))
			continue;
		i++;
		p->noted = false;
		noted = came = false;
		pthread_mutex_lock(&p->lock);
		p->seen = i;
		pthread_cond_signal(&p->changed);
		pthread_mutex_unlock(&p->lock);
		sched_yield();	/* the sender may have no other processor */
	}
	thread_end();
	return NULL;
}

static int stream[STREAM][2];

static void
stream_changes(int kq, int action)
{
	struct kevent change;
	int i;

	for (i = 0; i < STREAM; i++) {
		EV_SET(&change, stream[i][0], EVFILT_READ, action, 0, 0, 0);
		must(kevent(kq, &change, 1, NULL, 0, NULL), "kevent");
		EV_SET(&change, stream[i][1], EVFILT_WRITE, action, 0, 0, 0);
		must(kevent(kq, &change, 1, NULL, 0, NULL), "kevent");
	}
}

static void
behind_a_stream(struct way *way, int64_t *note, int64_t *event)
{
	struct part p = { .way = way, .target = &way->targets[1],
	    .latency = note, .event = event };
	uint64_t state = seeded(0, 0);
	int64_t until;
	int i;

	pthread_mutex_init(&p.lock, NULL);
	pthread_cond_init(&p.changed, NULL);
	stream_changes(p.target->kq, EV_ADD);
	begin(&p, serve);
	for (i = 0; i < BUSY_SENDS; i++) {
		until = now() + roll(&state, BUSY_NS);
		while (now() < until)
			continue;
		p.sent = now();
		way->send(p.target);
		p.noted = true;
		pthread_mutex_lock(&p.lock);
		while (p.seen <= i)
			pthread_cond_wait(&p.changed, &p.lock);
		pthread_mutex_unlock(&p.lock);
	}
	p.stop = true;
	pthread_join(p.target->thread, NULL);
	stream_changes(p.target->kq, EV_DELETE);
	clean(way, p.target);
}

/*
 * What the patch of 2007 does and a program has to know: how many of several
 * waiters one tickle brings back, and how many tickles a thread that polls the
 * same kqueue takes away from one that sleeps.
 */
struct crowd {
	int		kq;
	bool		polls;
	pthread_t	thread;
	atomic_long	id, returns;
};
static atomic_int crowd_left;
static atomic_bool crowd_stop;

static void *
wait_or_poll(void *cookie)
{
	struct crowd *c = cookie;
	struct kevent event;

	thread_start();
	c->id = thread_id();
	while (!crowd_stop) {
		kevent(c->kq, NULL, 0, &event, 1, c->polls ? &poll_only : NULL);
		c->returns++;
	}
	crowd_left--;
	thread_end();
	return NULL;
}

static long
returned(const struct crowd *all, int count)
{
	long returns = 0;

	while (count-- > 0)
		returns += all[count].returns;
	return returns;
}

static void
all_asleep(const struct crowd *all, int count)
{
	while (count-- > 0)
		while (all[count].id == 0 || !sleeps_in_kevent(all[count].id))
			sched_yield();
}

/* Returns for a tickle sent when all sleep, perhaps while a thread polls. */
static double
returns_of(int sleepers, bool poller)
{
	struct crowd all[9];
	int i, kq = kqueue(), threads = sleepers + poller;
	long before, returns;

	crowd_stop = false;
	crowd_left = threads;
	memset(all, 0, sizeof(all));
	for (i = 0; i < threads; i++) {
		all[i].kq = kq;
		all[i].polls = i == sleepers;
		if (pthread_create(&all[i].thread, NULL, wait_or_poll,
		    &all[i]) != 0)
			err(1, "pthread_create");
	}
	for (i = 0; i < SLEEPS; i++) {
		all_asleep(all, sleepers);
		before = returned(all, sleepers);
		must(ioctl(kq, KQUEUE_TICKLE), "KQUEUE_TICKLE");
		if (!poller)
			while (returned(all, sleepers) == before)
				sched_yield();
		else		/* after two polls it has been consumed */
			for (before = all[sleepers].returns;
			    all[sleepers].returns < before + 2;)
				sched_yield();
	}
	all_asleep(all, sleepers);
	returns = returned(all, sleepers);
	crowd_stop = true;
	while (crowd_left > 0) {
		must(ioctl(kq, KQUEUE_TICKLE), "KQUEUE_TICKLE");
		sched_yield();
	}
	for (i = 0; i < threads; i++)
		pthread_join(all[i].thread, NULL);
	close(kq);
	return (double)returns / SLEEPS;
}

static void
print_numbers(const char *name, const double *numbers)
{
	int i;

	printf(", \"%s\": [", name);
	for (i = 0; i < rounds; i++)
		printf("%s%.6g", i ? ", " : "", numbers[i]);
	printf("]");
}

/* Such a percentile means something from so many samples on: ten beyond it. */
static const struct {
	const char *name;
	int per_mille, samples;
} shown[] = { {"p50", 500, 20}, {"p99", 990, 1000}, {"p999", 999, 10000} };
#define	SHOWN	(sizeof(shown) / sizeof(shown[0]))

/* Each round's percentiles, then those of all rounds together. */
static void
print_times(const char *name, int64_t *all, int count)
{
	int i, total = rounds * count;
	size_t j;

	printf(",\n  \"%s\": {", name);
	for (i = 0; i < rounds; i++)
		qsort(all + i * count, count, sizeof(*all), by_size);
	for (j = 0; j < SHOWN; j++) {
		if (count < shown[j].samples)
			continue;
		printf("\"%s\": [", shown[j].name);
		for (i = 0; i < rounds; i++)
			printf("%s%" PRId64, i ? ", " : "",
			    quantile(all + i * count, count,
			    shown[j].per_mille));
		printf("], ");
	}
	qsort(all, total, sizeof(*all), by_size);
	printf("\"all\": {\"samples\": %d", total);
	for (j = 0; j < SHOWN; j++)
		if (total >= shown[j].samples)
			printf(", \"%s\": %" PRId64, shown[j].name,
			    quantile(all, total, shown[j].per_mille));
	printf(", \"percentiles\": [");
	for (i = 0; i < 100; i++)
		printf("%s%" PRId64, i ? ", " : "",
		    quantile(all, total, 10 * i));
	printf("]}}");
}

static void *
room(size_t count, size_t size)
{
	void *memory = calloc(count, size);

	if (memory == NULL)
		err(1, "calloc");
	return memory;
}

static int
samples(int which)
{
	return which == NOTE || which == OWN_EVENT ? BUSY_SENDS : wake_ups;
}

static double *clocks, *fioclexes[2], *parents, *crowds[CROWDS];

/* The ways there are, another first in each round. */
static struct way *
turn(int round, size_t number)
{
	struct way *way = &ways[(round + number) % WAYS];

	return way->there ? way : NULL;
}

static void
measure(int round)
{
	int64_t *time[TIMES], clock;
	struct way *way;
	size_t j;
	int i;

	clock = clocks[round] = cost_of(look_at_clock, NULL);
	fioclexes[0][round] = cost_of(fioclex, &ways[0].targets[1]);
	parents[round] = cost_of(parent, NULL);
	fioclex_as_a_way.targets[1] = ways[0].targets[1];
	fioclexes[1][round] = cost_awake(&fioclex_as_a_way, clock);
	for (j = 0; j < WAYS; j++)
		if ((way = turn(round, j)) != NULL)
			way->cost[AWAKE][round] = cost_awake(way, clock);
	for (j = 0; j < WAYS; j++)
		if ((way = turn(round, j)) != NULL)
			way->cost[PENDING][round] = cost_pending(way);
	for (j = 0; j < WAYS; j++)
		if ((way = turn(round, j)) != NULL)
			way->cost[ASLEEP][round] = cost_asleep(way, clock);
	for (j = 0; j < WAYS; j++) {
		if ((way = turn(round, j)) == NULL)
			continue;
		for (i = 0; i < TIMES; i++)
			time[i] = way->time[i] + round * samples(i);
		ping_pong(way, time[LATENCY], time[ROUND_TRIP]);
		behind_a_stream(way, time[NOTE], time[OWN_EVENT]);
	}
	for (i = 0; i < FLOODS; i++)
		for (j = 0; j < WAYS; j++)
			if ((way = turn(round, j)) != NULL)
				flood(way, 1 << i, &way->per_second[i][round],
				    &way->received[i][round]);
	for (i = 0; ways[0].there && i < CROWDS; i++)
		crowds[i][round] = i < 3 ?
		    returns_of(2 << i, false) : returns_of(1, true);
}

static void
print_way(const struct way *way)
{
	char name[32];
	int i;

	printf("\n \"%s\": {\"descriptors\": %d, \"calls\": %d, \"lost\": %ld",
	    way->name, way->descriptors, way->calls, way->lost);
	for (i = 0; i < COSTS; i++)
		print_numbers(costs[i], way->cost[i]);
	for (i = 0; i < FLOODS; i++) {
		snprintf(name, sizeof(name), "per_second_%d", 1 << i);
		print_numbers(name, way->per_second[i]);
		snprintf(name, sizeof(name), "received_%d", 1 << i);
		print_numbers(name, way->received[i]);
	}
	for (i = 0; i < TIMES; i++)
		if (i != OWN_EVENT || way->woke != tickle_woke)
			print_times(times[i], way->time[i], samples(i));
	printf("}");
}

int
main(int argc, char **argv)
{
	static const char *const crowd_names[CROWDS] = {
		"of_2", "of_4", "of_8", "of_1_beside_a_poller"
	};
	struct way *way;
	int option, i, round;
	bool first = true;

	while ((option = getopt(argc, argv, "r:n:")) != -1) {
		switch (option) {
		case 'r':
			rounds = atoi(optarg);
			break;
		case 'n':
			wake_ups = atoi(optarg);
			break;
		default:
			errx(2, "usage: rivals [-r rounds] [-n wake-ups]");
		}
	}
	kernel_start();
	thread_start();
	clocks = room(rounds, sizeof(double));
	parents = room(rounds, sizeof(double));
	for (i = 0; i < 2; i++)
		fioclexes[i] = room(rounds, sizeof(double));
	for (i = 0; i < CROWDS; i++)
		crowds[i] = room(rounds, sizeof(double));
	for (i = 0; i < STREAM; i++) {
		must(pipe(stream[i]), "pipe");
		must(write(stream[i][1], "", 1), "write");
	}
	for (way = ways; way < ways + WAYS; way++) {
		for (i = 0; i < 2; i++)
			must(way->targets[i].kq = kqueue(), "kqueue");
		way->there =
		    way->open(&way->targets[0]) && way->open(&way->targets[1]);
		for (i = 0; i < COSTS; i++)
			way->cost[i] = room(rounds, sizeof(double));
		for (i = 0; i < FLOODS; i++) {
			way->per_second[i] = room(rounds, sizeof(double));
			way->received[i] = room(rounds, sizeof(double));
		}
		for (i = 0; i < TIMES; i++)
			way->time[i] = room((size_t)rounds * samples(i),
			    sizeof(int64_t));
	}
	measure(0);		/* to warm up: the first round overwrites it */
	for (way = ways; way < ways + WAYS; way++)
		way->lost = 0;
	for (round = 0; round < rounds; round++)
		measure(round);
	printf("{\"abi\": \"%s\", \"rounds\": %d, \"wake_ups\": %d, "
	    "\"floor\": {\"calls\": %d", abi(), rounds, wake_ups, CALLS);
	print_numbers("clock_ns", clocks);
	print_numbers("fioclex_ns", fioclexes[0]);
	print_numbers("fioclex_awake_ns", fioclexes[1]);
	print_numbers("getppid_ns", parents);
	printf("},\n \"ways\": {");
	for (way = ways; way < ways + WAYS; way++) {
		if (!way->there)
			continue;
		printf("%s", first ? "" : ",");
		first = false;
		print_way(way);
	}
	printf("}, \"returns_for_a_tickle\": {\"tickles\": %d", SLEEPS);
	for (i = 0; i < CROWDS; i++)
		print_numbers(crowd_names[i], crowds[i]);
	printf("}}\n");
	return 0;
}
