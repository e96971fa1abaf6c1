/*
 * What it costs to wake a thread that waits in kevent: a tickle and its
 * rivals, in one run, one after the other in each round.
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
#define	SPINS		30	/* sends to one that never sleeps */

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
enum { LATENCY, ROUND_TRIP, BEHIND, TIMES };
static const char *const times[TIMES] = {
	"latency_ns", "round_trip_ns", "behind_ns"
};
#define	FLOODS	4	/* with 1, 2, 4 and 8 senders */

struct way {
	const char	*name;
	bool		(*open)(struct target *);	/* false: not there */
	void		(*send)(struct target *);
	bool		(*woke)(struct target *, int, const struct kevent *);
	int		descriptors;	/* that it needs, besides the kqueue */
	int		calls;		/* of a wake-up, besides kevent */
	bool		there;
	struct target	targets[2];
	double		*cost[COSTS], *per_second[FLOODS];
	int64_t		*time[TIMES];
	long		lost;		/* that only a timeout made good */
};

static int rounds = 10, wake_ups = 1000;

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

static void
tickle_send(struct target *t)
{
	must(ioctl(t->kq, KQUEUE_TICKLE), "KQUEUE_TICKLE");
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

static void
user_send(struct target *t)
{
	struct kevent change;

	EV_SET(&change, 1, EVFILT_USER, 0, NOTE_TRIGGER, 0, 0);
	must(kevent(t->kq, &change, 1, NULL, 0, NULL), "NOTE_TRIGGER");
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

/* A full pipe has woken its reader. */
static void
byte_send(struct target *t)
{
	(void)!write(t->fds[1], "", 1);
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

static void
kill_send(struct target *t)
{
	int error = pthread_kill(t->thread, SIGUSR1);

	if (error != 0 && error != ESRCH)	/* it may be over by now */
		errx(1, "pthread_kill: %s", strerror(error));
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
	int64_t		*latency;
	atomic_int	ready, done;
	atomic_bool	stop;
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

static int64_t
quantile(const int64_t *sorted, int count, double q)
{
	int index = (int)(q * count);

	return sorted[index < count ? index : count - 1];
}

static int64_t
median(int64_t *numbers, int count)
{
	qsort(numbers, count, sizeof(*numbers), by_size);
	return quantile(numbers, count, .5);
}

static int64_t
clock_cost(void)
{
	int64_t began = now();
	int i;

	for (i = 0; i < CALLS; i++)
		now();
	return (now() - began) / CALLS;
}

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

/* One of many calls in a row. */
static double
cost_of(void (*call)(struct target *), struct target *t)
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

static void
fioclex(struct target *t)
{
	must(ioctl(t->kq, FIOCLEX), "FIOCLEX");
}

static void
parent(struct target *t)
{
	(void)t;
	(void)getppid();
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
		s->part->way->send(s->part->target);
		s->sent++;
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
	while (!p->stop)
		wait_for(p->way, p->target);
	p->done = 1;
	thread_end();
	return NULL;
}

/* Sends in a second, by several threads to one. */
static double
flood(struct way *way, int senders)
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
	return sent * 1e9 / took;
}

/*
 * A server that is never out of events.  A tickle is seen at the next return,
 * by the note that its sender left, as events win over it; a rival when its
 * own event has its turn.
 */
static void *
serve(void *cookie)
{
	struct part *p = cookie;
	struct kevent events[STREAM_EVENTS];
	bool by_note = p->way->woke == tickle_woke;
	int n;

	thread_start();
	p->ready = 1;
	while (!p->stop) {
		n = kevent(p->target->kq, NULL, 0, events, STREAM_EVENTS, NULL);
		if (p->sent == 0 ||
		    !(by_note || p->way->woke(p->target, n, events)))
			continue;
		p->latency[p->done] = now() - p->sent;
		p->sent = 0;
		p->done++;
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
behind_a_stream(struct way *way, int64_t *behind)
{
	struct part p = { .way = way, .target = &way->targets[1],
	    .latency = behind };
	struct timespec pause = in_ns(100000);
	int i;

	stream_changes(p.target->kq, EV_ADD);
	begin(&p, serve);
	for (i = 0; i < SPINS; i++) {
		nanosleep(&pause, NULL);
		p.sent = now();
		way->send(p.target);
		while (p.done <= i)
			sched_yield();
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
	int tickles = poller ? SPINS : SLEEPS;
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
	for (i = 0; i < tickles; i++) {
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
	return (double)returns / tickles;
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

/* Each round's percentiles, then those of all rounds together. */
static void
print_times(const char *name, int64_t *all, int count)
{
	static const struct {
		const char *name;
		double q;
	} shown[] = { {"p50", .5}, {"p99", .99}, {"p999", .999} };
	size_t j;
	int i;

	printf(",\n  \"%s\": {", name);
	for (i = 0; i < rounds; i++)
		qsort(all + i * count, count, sizeof(*all), by_size);
	for (j = 0; j < sizeof(shown) / sizeof(shown[0]); j++) {
		printf("\"%s\": [", shown[j].name);
		for (i = 0; i < rounds; i++)
			printf("%s%" PRId64, i ? ", " : "",
			    quantile(all + i * count, count, shown[j].q));
		printf("], ");
	}
	qsort(all, (size_t)rounds * count, sizeof(*all), by_size);
	printf("\"all\": {\"samples\": %d", rounds * count);
	for (j = 0; j < sizeof(shown) / sizeof(shown[0]); j++)
		printf(", \"%s\": %" PRId64, shown[j].name,
		    quantile(all, rounds * count, shown[j].q));
	printf(", \"percentiles\": [");
	for (i = 0; i < 100; i++)
		printf("%s%" PRId64, i ? ", " : "",
		    quantile(all, rounds * count, i / 100.));
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

int
main(int argc, char **argv)
{
	double *clocks, *floors[2], *crowds[4];
	struct way *way;
	int option, i, j, round;

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
	clocks = room(rounds, sizeof(*clocks));
	for (i = 0; i < 2; i++)
		floors[i] = room(rounds, sizeof(double));
	for (i = 0; i < 4; i++)
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
		for (i = 0; i < FLOODS; i++)
			way->per_second[i] = room(rounds, sizeof(double));
		for (i = 0; i < TIMES; i++)
			way->time[i] = room(
			    (size_t)rounds * (i == BEHIND ? SPINS : wake_ups),
			    sizeof(int64_t));
	}
	for (round = 0; round < rounds; round++) {
		int64_t clock = clock_cost();

		clocks[round] = clock;
		floors[0][round] = cost_of(fioclex, &ways[0].targets[1]);
		floors[1][round] = cost_of(parent, NULL);
		for (way = ways; way < ways + WAYS; way++)
			if (way->there)
				way->cost[AWAKE][round] =
				    cost_awake(way, clock);
		for (way = ways; way < ways + WAYS; way++)
			if (way->there)
				way->cost[PENDING][round] = cost_pending(way);
		for (way = ways; way < ways + WAYS; way++)
			if (way->there)
				way->cost[ASLEEP][round] =
				    cost_asleep(way, clock);
		for (way = ways; way < ways + WAYS; way++)
			if (way->there)
				ping_pong(way,
				    way->time[LATENCY] + round * wake_ups,
				    way->time[ROUND_TRIP] + round * wake_ups);
		for (way = ways; way < ways + WAYS; way++)
			if (way->there)
				behind_a_stream(way,
				    way->time[BEHIND] + round * SPINS);
		for (i = 0; i < FLOODS; i++)
			for (way = ways; way < ways + WAYS; way++)
				if (way->there)
					way->per_second[i][round] =
					    flood(way, 1 << i);
		for (i = 0; ways[0].there && i < 4; i++)
			crowds[i][round] = i < 3 ?
			    returns_of(2 << i, false) : returns_of(1, true);
	}
	printf("{\"rounds\": %d, \"wake_ups\": %d, \"floor\": {\"calls\": %d",
	    rounds, wake_ups, CALLS);
	print_numbers("clock_ns", clocks);
	print_numbers("fioclex_ns", floors[0]);
	print_numbers("getppid_ns", floors[1]);
	printf("},\n \"ways\": {");
	for (way = ways, j = 0; way < ways + WAYS; way++) {
		if (!way->there)
			continue;
		printf("%s\n \"%s\": {\"descriptors\": %d, \"calls\": %d, "
		    "\"lost\": %ld", j++ ? "," : "", way->name,
		    way->descriptors,
		    way->calls,
		    way->lost);
		for (i = 0; i < COSTS; i++)
			print_numbers(costs[i], way->cost[i]);
		for (i = 0; i < FLOODS; i++) {
			char name[32];

			snprintf(name, sizeof(name), "per_second_%d", 1 << i);
			print_numbers(name, way->per_second[i]);
		}
		for (i = 0; i < TIMES; i++)
			print_times(times[i], way->time[i],
			    i == BEHIND ? SPINS : wake_ups);
		printf("}");
	}
	printf("}, \"returns_for_a_tickle\": {\"tickles\": %d", SLEEPS);
	for (i = 0; i < 4; i++) {
		static const char *const crowd_names[] = {
			"of_2", "of_4", "of_8", "of_1_beside_a_poller"
		};

		print_numbers(crowd_names[i], crowds[i]);
	}
	printf("}}\n");
	return 0;
}
