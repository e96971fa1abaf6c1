/*
 * Calls on kqueues from several threads, as bytes say: any order, any ioctl,
 * any kevent, any close.
 *
 *	fuzz [-t seconds] [-s seed]
 *
 * makes the bytes up, and says what the kernel's pools had handed out after the
 * first inputs and at the end: for files, for kqueues, and for all that have
 * handed out more.  Compiled with -DLIBFUZZER,
 * against a rump kernel, it is a target of libFuzzer instead.
 */

#include "kq.h"
#include <stdatomic.h>

#define	THREADS	3
#define	SLOTS	4	/* kqueues */
#define	LISTS	4	/* changes or events in a call, at most */
#define	WARM_UP	500	/* inputs, after which the kernel's caches are full */

static atomic_int slots[SLOTS], outer, fds[2];

struct input {
	pthread_t	thread;
	const uint8_t	*data, *end;
};

/* The next byte, 0 when there is none. */
static uint8_t
byte(struct input *in)
{
	return in->data < in->end ? *in->data++ : 0;
}

static uint32_t
word(struct input *in)
{
	uint32_t value = byte(in);

	value = value << 8 | byte(in);
	value = value << 8 | byte(in);
	return value << 8 | byte(in);
}

/* No kqueue watches one that watches it: FINDINGS.md. */
static uintptr_t
some_ident(struct input *in, uint32_t filter)
{
	uint8_t choice = byte(in);

	if (filter == EVFILT_READ || filter == EVFILT_WRITE ||
	    filter == EVFILT_VNODE)
		return fds[choice % 2];
	return choice < 250 ? choice % 64U : word(in);
}

static int
some_fd(struct input *in)
{
	return slots[byte(in) % SLOTS];
}

static void
some_kevent(struct input *in)
{
	static const uint16_t usual[] = { EV_ADD, EV_ADD | EV_ONESHOT,
	    EV_ADD | EV_CLEAR, EV_DELETE, EV_DISABLE, EV_ENABLE,
	    EV_ADD | EV_DISABLE };
	struct kevent changes[LISTS], events[LISTS];
	uint8_t counts = byte(in), wait = byte(in);
	/* A kevent that sleeps does it for ticks, in which nothing is tried. */
	struct timespec ts = { 0, wait % 16 == 15 ? 300000 : 0 };
	int nchanges = counts % (LISTS + 1);
	int nevents = counts / 16 % (LISTS + 1);
	int i, kq = some_fd(in);

	for (i = 0; i < nchanges; i++) {
		uint8_t how = byte(in), flags = byte(in);
		uint32_t filter = how < 240 ? how % 11 : word(in);

		EV_SET(&changes[i], some_ident(in, filter), filter,
		    flags < 200 ? usual[flags % 7] : word(in),
		    how & 1 ? word(in) : 0,
		    how & 2 ? (int64_t)(word(in) >> 1) : how & 4, 0);
		/* No negative time: FINDINGS.md. */
	}
	if (wait > 250)
		ts.tv_nsec = (int32_t)word(in);
	if (wait > 252)
		ts.tv_sec = -(int)byte(in);
	if (ts.tv_nsec > 2000000)
		ts.tv_nsec |= 1 << 30;	/* an error: nothing waits for long */
	kevent(kq, changes, nchanges, events, nevents, &ts);
}

static void
some_ioctl(struct input *in)
{
	static const unsigned long usual[] = { KQUEUE_TICKLE, KQUEUE_TICKLE,
	    KQUEUE_TICKLE, KFILTER_BYFILTER, KFILTER_BYNAME, FIOCLEX, FIONBIO,
	    FIONREAD };
	union {
		struct kfilter_mapping mapping;
		char room[8192]; /* the most that a request can ask for */
	} argument;
	char name[16];
	uint8_t choice = byte(in);
	unsigned long request = choice < 224 ? usual[choice % 8] : word(in);
	void *pointer = &argument;
	uint8_t wild = byte(in);

	memset(&argument, byte(in), sizeof(argument));
	snprintf(name, sizeof(name), "%s",
	    choice & 16 ? "EVFILT_READ" : "EVFILT_NONE");
	argument.mapping.name = name;
	argument.mapping.len = byte(in);
	argument.mapping.filter = choice & 32 ? word(in) : byte(in) % 11;
#ifndef RUMP		/* whose copyin would take the address */
	if (wild < 16)
		pointer = (void *)(uintptr_t)word(in);
	else if (wild < 32)
		pointer = (void *)((uintptr_t)word(in) << 32 | word(in));
	else if (wild < 48)
		argument.mapping.name = (void *)(uintptr_t)word(in);
	else if (wild < 64)
		argument.mapping.name =
		    (void *)((uintptr_t)word(in) << 32 | word(in));
#else
	(void)wild;
#endif
	ioctl(some_fd(in), request, pointer);
}

/* A kqueue that watches the others. */
static void
some_nesting(struct input *in)
{
	struct kevent change, event;

	EV_SET(&change, some_fd(in), EVFILT_READ,
	    byte(in) & 1 ? EV_ADD : EV_DELETE, 0, 0, 0);
	kevent(outer, &change, 1, &event, 1, &poll_only);
}

static void *
calls(void *cookie)
{
	struct input *in = cookie;
	char bytes[16];
	int fd;

	thread_start();
	while (in->data < in->end) {
		uint8_t call = byte(in);
		atomic_int *slot = &slots[call / 16 % SLOTS];

		switch (call % 16) {
		case 0:
			if ((fd = kqueue()) != -1 &&
			    (fd = atomic_exchange(slot, fd)) != -1)
				close(fd);
			break;
		case 1:
			if ((fd = atomic_exchange(slot, -1)) != -1)
				close(fd);
			break;
		case 2:
			if ((fd = dup(*slot)) != -1 &&
			    (fd = atomic_exchange(&slots[byte(in) % SLOTS],
			    fd)) != -1)
				close(fd);
			break;
		case 3:
		case 4:
			ioctl(*slot, KQUEUE_TICKLE);
			break;
		case 5:
		case 6:
		case 7:
			some_ioctl(in);
			break;
		case 8:
			write(fds[1], bytes, 1 + call / 16);
			break;
		case 9:
			read(fds[0], bytes, sizeof(bytes));
			break;
		case 10:
			some_nesting(in);
			break;
		case 11:
		{
			struct pollfd one = { .fd = *slot, .events = POLLIN };

			poll(&one, 1, 0);
			break;
		}
		default:
			some_kevent(in);
			break;
		}
	}
	thread_end();
	return NULL;
}

static void
one_input(const uint8_t *data, size_t size)
{
	struct input inputs[THREADS];
	int i, fd, pair[2];

	memset(inputs, 0, sizeof(inputs));
	if (pipe(pair) == -1)
		err(1, "pipe");
	for (i = 0; i < 2; i++) {
		fcntl(pair[i], F_SETFL, NONBLOCK);
		fds[i] = pair[i];
	}
	outer = kqueue();
	for (i = 0; i < SLOTS; i++)
		slots[i] = kqueue();
	for (i = 0; i < THREADS; i++) {
		inputs[i].data = data + size * i / THREADS;
		inputs[i].end = data + size * (i + 1) / THREADS;
		if (pthread_create(&inputs[i].thread, NULL, calls,
		    &inputs[i]) != 0)
			err(1, "pthread_create");
	}
	for (i = 0; i < THREADS; i++)
		pthread_join(inputs[i].thread, NULL);
	for (i = 0; i < SLOTS; i++)
		if ((fd = slots[i]) != -1)
			close(fd);
	close(outer);
	close(pair[0]);
	close(pair[1]);
}

#ifdef LIBFUZZER
#include <sanitizer/lsan_interface.h>

int	LLVMFuzzerTestOneInput(const uint8_t *, size_t);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static bool started;

	if (!started) {
		__lsan_disable();	/* what it allocates now it keeps */
		kernel_start();
		__lsan_enable();
	}
	started = true;
	one_input(data, size);
	return 0;
}

#else

#ifndef RUMP
/* The pool that kqueues come from: that with most to do when many are made. */
static const char *
pool_of_kqueues(void)
{
	static struct pool_numbers before[POOLS], after[POOLS];
	static char found[17];
	size_t count = pools(before), i;
	uint64_t most = 0, made;
	int kqs[100], k;

	for (k = 0; k < 100; k++)
		kqs[k] = kqueue();
	if (pools(after) != count)
		count = 0;
	for (i = 0; i < count; i++) {
		made = after[i].numbers[POOL_OUT] - before[i].numbers[POOL_OUT];
		if (strncmp(after[i].name, "kmem", 4) == 0 &&
		    (int64_t)made > (int64_t)most) {
			most = made;
			snprintf(found, sizeof(found), "%.16s", after[i].name);
		}
	}
	for (k = 0; k < 100; k++)
		close(kqs[k]);
	return found;
}

static void
print_pools(const struct pool_numbers *before, size_t count,
    const char *of_kqueues)
{
	static struct pool_numbers after[POOLS];
	uint64_t was, is;
	size_t i;

	printf("kqueues come from the pool %s\n", of_kqueues);
	if (pools(after) != count)
		count = 0;
	for (i = 0; i < count; i++) {
		was = before[i].numbers[POOL_OUT];
		is = after[i].numbers[POOL_OUT];
		if (is > was || strncmp(after[i].name, "file", 16) == 0 ||
		    strncmp(after[i].name, of_kqueues, 16) == 0)
			printf("pool %.16s: %" PRIu64 " objects out after %d "
			    "inputs, %" PRIu64 " at the end\n",
			    after[i].name, was, WARM_UP, is);
	}
}
#endif

static void
hangs(int signo)
{
	static const char line[] = "a call does not return\n";

	(void)signo;
	(void)fwrite(line, sizeof(line) - 1, 1, stdout);
	fflush(stdout);
	_exit(1);
}

int
main(int argc, char **argv)
{
	uint64_t seed = (uint64_t)now() % 1000000000, state;
	int64_t until = 10;
#ifndef RUMP
	static struct pool_numbers before[POOLS];
	const char *of_kqueues;
	size_t pool_count = 0;
#endif
	uint8_t data[600];
	int option, count = 0;
	size_t i;

	while ((option = getopt(argc, argv, "t:s:")) != -1) {
		switch (option) {
		case 't':
			until = atol(optarg);
			break;
		case 's':
			seed = strtoull(optarg, NULL, 10);
			break;
		default:
			errx(2, "usage: fuzz [-t seconds] [-s seed]");
		}
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	kernel_start();
	printf("seed %" PRIu64 ", %s\n", seed, abi());
#ifndef RUMP
	of_kqueues = pool_of_kqueues();
#endif
	signal(SIGALRM, hangs);
	until = now() + until * 1000000000;
	for (; now() < until; count++) {
		state = seeded(seed, count);
		for (i = 0; i < sizeof(data); i++)
			data[i] = roll(&state, 256);
		alarm(60);
		one_input(data, sizeof(data));
#ifndef RUMP
		if (count == WARM_UP)
			pool_count = pools(before);
#endif
	}
#ifndef RUMP
	print_pools(before, pool_count, of_kqueues);
#endif
	printf("%d inputs, no call hung\n", count);
	return 0;
}

#endif
