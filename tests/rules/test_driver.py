"""What pykq makes of the rules: Tickled, signals, closing, fork, buffers, with each mechanism that the kernel
has. Where: see tests/conftest.py."""

import collections
import contextlib
import errno
import gc
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import pykq
from pykq import EV, EVFILT, Kevent, Mechanism, NoteUser, aio
from pykq._mechanism import WAKERS

SHORT_S = 0.2
LONG_S = 30.0


@pytest.fixture
def kq(kernel, mechanism, watchdog):
    with pykq.Kqueue(kernel, mechanism=mechanism) as kq:
        assert kq.mechanism == mechanism
        yield kq


@pytest.fixture
def handler():
    """A handler for SIGUSR1; the list of the threads it ran in."""
    ran = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: ran.append(threading.current_thread()))
    yield ran
    signal.signal(signal.SIGUSR1, before)


def signal_the_main_thread(number=signal.SIGUSR1):
    signal.pthread_kill(threading.main_thread().ident, number)


# Tickles.


def test_a_tickle_raises_tickled(kq, waiter):
    asleep = waiter(kq.kevent).fall_asleep()
    kq.tickle()
    outcome = asleep.outcome()
    assert isinstance(outcome, pykq.Tickled)
    assert outcome.errno == errno.EINTR


def test_a_tickle_ends_a_wait_of_the_main_thread(kq, once_asleep):
    once_asleep(kq.tickle)
    with pytest.raises(pykq.Tickled):
        kq.kevent()


def test_the_function_tickles_a_kqueue_object(kq):
    pykq.tickle(kq)
    with pytest.raises(pykq.Tickled):
        kq.kevent(timeout=LONG_S)


def test_a_stock_kernel_is_named_in_the_error(kernel, tickling):
    if tickling:
        pytest.skip("this kernel has KQUEUE_TICKLE")
    with pytest.raises(pykq.TickleNotSupported, match="has no KQUEUE_TICKLE") as caught:
        pykq.Kqueue(kernel, mechanism="KQUEUE_TICKLE")
    assert caught.value.errno == errno.ENOTTY
    assert kernel.name in str(caught.value)


def test_the_best_mechanism_is_the_default_and_the_environment_another(kernel, tickling, monkeypatch):
    monkeypatch.delenv("PYKQ_MECHANISM", raising=False)
    best = next(one for one in Mechanism if kernel.offers(one))
    with pykq.Kqueue(kernel) as kq:
        assert kq.mechanism == best == kernel.mechanism
        assert (best == Mechanism.TICKLE) == tickling
        assert best in repr(kq)
    monkeypatch.setenv("PYKQ_MECHANISM", "pipe")
    with pykq.Kqueue(kernel) as kq:
        assert kq.mechanism == Mechanism.PIPE
    monkeypatch.setenv("PYKQ_MECHANISM", "telepathy")
    with pytest.raises(ValueError, match=r"PYKQ_MECHANISM=telepathy.*KQUEUE_TICKLE, EVFILT_USER, pipe"):
        pykq.Kqueue(kernel)


def test_events_win_and_consume_the_tickle(kq, pipe):
    kq.kevent([Kevent(pipe[0])], 0)
    kq.kernel.write(pipe[1], b"x")
    kq.tickle()
    assert [event.ident for event in kq.kevent()] == [pipe[0]]
    kq.kernel.read(pipe[0], 1)
    assert kq.kevent(timeout=SHORT_S) == []


def test_a_tickle_is_not_lost_when_events_end_a_wait_before_its_ioctl(kernel, mechanism, pipe, monkeypatch):
    """The moment between what tickle() notes and what the kernel notes, held open."""
    make, came_first = WAKERS[mechanism], []

    def make_slow(kernel, fd):
        waker = make(kernel, fd)
        send = waker.send

        def wait_and_then(fd, request):
            kernel.write(pipe[1], b"x")
            came_first.extend(kq.kevent(timeout=LONG_S))
            kernel.read(pipe[0], 1)
            send(fd, request)

        waker.send = wait_and_then
        return waker

    monkeypatch.setitem(WAKERS, mechanism, make_slow)
    with pykq.Kqueue(kernel, mechanism=mechanism) as kq:
        kq.kevent([Kevent(pipe[0])], 0)
        kq.tickle()
        assert [event.ident for event in came_first] == [pipe[0]]
        with pytest.raises(pykq.Tickled):
            kq.kevent(timeout=LONG_S)


def test_on_tickle_is_called_in_the_waiting_thread(kernel, mechanism, waiter):
    called_in = []

    def on_tickle():
        called_in.append(threading.current_thread())

    with pykq.Kqueue(kernel, mechanism=mechanism, on_tickle=on_tickle) as kq:
        asleep = waiter(kq.kevent).fall_asleep()
        kq.tickle()
        assert asleep.outcome() == []
    assert called_in == [asleep._thread]


def test_what_on_tickle_raises_comes_out_of_the_wait(kernel):
    with pykq.Kqueue(kernel, on_tickle=lambda: 1 / 0) as kq:
        kq.tickle()
        with pytest.raises(ZeroDivisionError):
            kq.kevent(timeout=LONG_S)


def test_on_tickle_has_to_be_callable(kernel):
    with pytest.raises(TypeError, match="callable"):
        pykq.Kqueue(kernel, on_tickle="a string")


@pytest.mark.stress
@pytest.mark.parametrize("consumers", [1, 3])
def test_work_that_is_announced_by_a_tickle_is_never_left_lying(kernel, kq, pipe, watchdog, consumers):
    """Two threads put work into a queue and tickle; a third makes events, which consume tickles. Whoever
    returns
    from a wait, for whatever reason, takes all the work there is. A tickle lost would leave some.
    """
    kq.kevent([Kevent(pipe[0], EVFILT.READ, EV.ADD | EV.CLEAR)], 0)
    work, taken, done = collections.deque(), [], threading.Event()
    items = 10000

    def take_all():
        while True:
            try:
                taken.append(work.popleft())
            except IndexError:
                return

    def consume():
        while not done.is_set():
            take_all()
            with contextlib.suppress(pykq.Tickled):
                kq.kevent()

    def produce(numbers):
        for number in numbers:
            work.append(number)
            kq.tickle()

    def make_events():
        while not done.is_set():
            kernel.write(pipe[1], b"x")
            kernel.read(pipe[0], 1)

    helpers = [threading.Thread(target=consume, daemon=True) for _ in range(consumers)] + [
        threading.Thread(target=make_events, daemon=True)
    ]
    producers = [threading.Thread(target=produce, args=(range(half, items, 2),)) for half in (0, 1)]
    for thread in helpers + producers:
        thread.start()
    for thread in producers:
        thread.join()
    deadline = time.monotonic() + LONG_S
    while len(taken) < items and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(taken) == items, f"{items - len(taken)} left lying"
    assert sorted(taken) == list(range(items))
    done.set()
    while any(thread.is_alive() for thread in helpers):
        kq.tickle()
        for thread in helpers:
            thread.join(0.01)


# Signals.


def test_a_signal_does_not_end_a_wait(kq, once_asleep, handler, short_s):
    once_asleep(signal_the_main_thread)
    start = time.monotonic()
    assert kq.kevent(timeout=10 * short_s) == []
    assert time.monotonic() - start >= 10 * short_s - 0.02  # two ticks of the kernel's clock
    assert handler == [threading.main_thread()]


def test_the_handler_runs_during_the_wait(kq, pipe, once_asleep):
    """Without a timeout: the wait ends because the handler makes an event."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: kq.kernel.write(pipe[1], b"x"))
    try:
        once_asleep(signal_the_main_thread)
        assert [event.ident for event in kq.kevent([Kevent(pipe[0])])] == [pipe[0]]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_changes_are_applied_once_although_a_signal_restarts_the_wait(
    kq, pipe, once_asleep, handler, short_s
):
    kq.kevent([Kevent(pipe[0])], 0)
    once_asleep(signal_the_main_thread)
    delete = Kevent(pipe[0], EVFILT.READ, EV.DELETE)
    assert kq.kevent([delete], timeout=10 * short_s) == [], "a second DELETE would fail"
    assert handler


def test_what_a_handler_raises_ends_the_wait(kq, pipe, once_asleep):
    once_asleep(lambda: signal_the_main_thread(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        kq.kevent()
    kq.kernel.write(pipe[1], b"x")
    assert kq.kevent([Kevent(pipe[0])]), "and the kqueue works on"


def test_what_a_handler_raises_ends_the_main_threads_wait_although_others_wait(kq, waiter, once_asleep):
    """In a rump kernel a tickle has to bring it back, which the others may take."""
    others = [waiter(kq.kevent) for _ in range(3)]
    waiter.all_asleep(others)
    once_asleep(lambda: signal_the_main_thread(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        kq.kevent()
    kq.close()
    assert all(isinstance(one.outcome(), (pykq.Tickled, ValueError)) for one in others)


def test_a_handler_may_tickle(kq, once_asleep):
    before = signal.signal(signal.SIGUSR1, lambda number, frame: kq.tickle())
    try:
        once_asleep(signal_the_main_thread)
        with pytest.raises(pykq.Tickled):
            kq.kevent()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.stress
def test_signals_and_tickles_in_a_storm_are_told_apart(kq, handler, watchdog):
    """Each round sends one tickle, and signals all the while: it ends by Tickled, not before the tickle."""
    stop = threading.Event()
    sent = 0

    def storm():
        while not stop.wait(0.0005):
            signal_the_main_thread()

    def tickle_in_turn():
        nonlocal sent
        for number in range(200):
            turn.acquire()
            time.sleep(number % 3 * 0.001)  # signals come before it, or none does
            sent += 1
            kq.tickle()

    turn = threading.Semaphore(0)
    threads = [
        threading.Thread(target=storm, daemon=True),
        threading.Thread(target=tickle_in_turn, daemon=True),
    ]
    for thread in threads:
        thread.start()
    for number in range(1, 201):
        turn.release()
        with pytest.raises(pykq.Tickled):
            kq.kevent(timeout=LONG_S)
        assert sent == number
    stop.set()
    for thread in threads:
        thread.join()
    assert handler


# Life and death.


def test_using_a_closed_kqueue_is_a_value_error(kernel):
    with pykq.Kqueue(kernel) as kq:
        assert not kq.closed
        kept = kq.tickle  # as a timer or a signal handler may have it
    assert kq.closed
    kq.close()
    for use in (kq.kevent, kq.tickle, kept, lambda: kq.ident, lambda: Kevent(kq)):
        with pytest.raises(ValueError, match="closed kqueue"):
            use()
    assert "closed" in repr(kq)


@pytest.mark.parametrize("threads", [1, 4])
def test_closing_ends_the_waits_of_other_threads(kernel, mechanism, waiter, threads):
    kq = pykq.Kqueue(kernel, mechanism=mechanism)
    asleep = [waiter(kq.kevent) for _ in range(threads)]
    waiter.all_asleep(asleep)
    kq.close()
    assert [type(one.outcome()) for one in asleep] == [ValueError] * threads


@pytest.mark.parametrize("pause_s", [0, 0.0002, 0.002])
def test_closing_ends_waits_that_are_about_to_begin(kernel, mechanism, waiter, pause_s):
    """The kernel's own close would wait for ever for a thread that goes to sleep while it is under way."""

    def wait_again_and_again():
        while True:
            with contextlib.suppress(pykq.Tickled):
                kq.kevent()

    for _ in range(20):
        kq = pykq.Kqueue(kernel, mechanism=mechanism)
        waiting = [waiter(wait_again_and_again) for _ in range(4)]
        time.sleep(pause_s)
        closing = waiter(kq.close)
        assert closing.outcome() is None
        assert closing.took_s < pykq._kqueue._CLOSE_S
        assert [type(one.outcome()) for one in waiting] == [ValueError] * 4


def test_a_signal_handler_may_close(kernel, mechanism, once_asleep, watchdog):
    kq = pykq.Kqueue(kernel, mechanism=mechanism)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: kq.close())
    try:
        once_asleep(signal_the_main_thread)
        start = time.monotonic()
        with pytest.raises(ValueError, match="closed kqueue"):
            kq.kevent()
        assert time.monotonic() - start < pykq._kqueue._CLOSE_S
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_on_tickle_may_close(kernel, mechanism, watchdog):
    kq = pykq.Kqueue(kernel, mechanism=mechanism, on_tickle=lambda: kq.close())
    kq.tickle()
    start = time.monotonic()
    assert kq.kevent() == []
    assert kq.closed and time.monotonic() - start < pykq._kqueue._CLOSE_S


@pytest.fixture
def closed(kernel, monkeypatch):
    """The descriptors that the kernel was told to close."""
    closed, close = [], kernel.close
    monkeypatch.setattr(kernel, "close", lambda fd: (closed.append(fd), close(fd)))
    return closed


def test_a_forgotten_kqueue_is_closed(kernel, mechanism, closed):
    number = pykq.Kqueue(kernel, mechanism=mechanism).ident
    gc.collect()
    assert closed.count(number) == 1


def test_what_interrupts_the_making_of_a_kqueue_closes_it_once(kernel, mechanism, closed, monkeypatch):
    """As Ctrl-C would when the object has just come to own the descriptor. Closed twice, it could be
    another's by then."""
    own = pykq.Kqueue._own

    def interrupted(self, fd):
        own(self, fd)
        raise KeyboardInterrupt

    monkeypatch.setattr(pykq.Kqueue, "_own", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pykq.Kqueue(kernel, mechanism=mechanism)
    gc.collect()
    assert closed and sorted(closed) == sorted(set(closed))


def test_a_kqueue_can_be_taken_over_by_its_descriptor(kernel, mechanism, pipe):
    with pykq.Kqueue.from_fd(kernel.kqueue(), kernel, mechanism=mechanism) as kq:
        kq.kevent([Kevent(pipe[0])], 0)
        kernel.write(pipe[1], b"x")
        assert len(kq.kevent()) == 1
        kernel.read(pipe[0], 1)
        kq.tickle()
        with pytest.raises(pykq.Tickled):
            kq.kevent(timeout=LONG_S)


def test_taking_over_consumes_no_tickle(kernel, raw, tickling):
    if not tickling:
        pytest.skip("this kernel has no KQUEUE_TICKLE")
    fd = kernel.kqueue()
    kernel.plain_ioctl(fd, pykq.KQUEUE_TICKLE)
    with pykq.Kqueue.from_fd(fd, kernel) as kq, pytest.raises(InterruptedError):
        raw(kq, timeout=LONG_S)


@pytest.mark.parametrize("descriptor", ["a pipe", -1, 1 << 20, 1 << 32])
def test_what_is_no_kqueue_cannot_be_taken_over(kernel, pipe, descriptor):
    with pytest.raises(OSError) as caught:
        pykq.Kqueue.from_fd(pipe[0] if descriptor == "a pipe" else descriptor, kernel)
    assert caught.value.errno == errno.EBADF


def test_a_child_process_is_told_that_it_has_no_kqueue(kernel, kq):
    kept = kq.tickle
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for use in (kq.kevent, kq.tickle, kept):
                with pytest.raises(ValueError, match="parent process"):
                    use()
            kq.close()
            if not kernel.shares_descriptors:
                with pytest.raises(pykq.KernelUnavailable, match="fork"):
                    pykq.Kqueue(kernel)
            else:
                with pykq.Kqueue(kernel) as own:
                    assert own.kevent(timeout=0) == []
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert kq.kevent(timeout=0) == [], "the parent's lives on"


def test_a_process_can_end_while_a_thread_waits(kernel, mechanism):
    program = f"import pykq, threading; kq = pykq.Kqueue(mechanism={mechanism.value!r});"
    program += "threading.Thread(target=kq.kevent, daemon=True).start()"
    assert run_python("-c", program).stderr == ""


# Arguments.


@pytest.mark.parametrize("timeout", [-1, -1e-9, -math.inf, math.nan])
def test_a_timeout_below_zero_or_nan_is_a_value_error(kq, timeout):
    with pytest.raises(ValueError, match="timeout"):
        kq.kevent(timeout=timeout)


def test_a_timeout_that_is_no_number_is_a_type_error(kq):
    with pytest.raises(TypeError):
        kq.kevent(timeout="1")


@pytest.mark.parametrize("timeout", [1e9, 1e300, math.inf])
def test_a_huge_timeout_is_none(kq, waiter, pipe, timeout):
    asleep = waiter(kq.kevent, [Kevent(pipe[0])], timeout=timeout).fall_asleep()
    kq.kernel.write(pipe[1], b"x")
    assert [event.ident for event in asleep.outcome()] == [pipe[0]]


@pytest.mark.parametrize("max_events", [-1, 10**9])
def test_an_absurd_number_of_events_is_a_value_error(kq, max_events):
    with pytest.raises(ValueError, match="max_events"):
        kq.kevent(max_events=max_events)


@pytest.mark.parametrize("ident", [None, "a", 1.5, threading.current_thread()])
def test_an_ident_that_is_no_number_and_has_no_descriptor_is_a_type_error(ident):
    with pytest.raises(TypeError, match="fileno"):
        Kevent(ident)


@pytest.mark.parametrize("timeout", [0, None])
def test_a_buffer_that_is_none_is_a_type_error(kq, timeout):
    with pytest.raises(TypeError, match="buffer"):
        kq.kevent(into=[], timeout=timeout)


@pytest.mark.parametrize("descriptor", [-1, 1 << 31, 1 << 40])
def test_tickling_what_can_be_no_descriptor_is_an_os_error(kernel, descriptor):
    if not kernel.shares_descriptors:
        pytest.skip(f"not the running system: {kernel.name}")
    with pytest.raises(OSError, match="tickle: ") as caught:
        pykq.tickle(descriptor)
    assert caught.value.errno == errno.EBADF


def test_a_filter_that_is_none_is_an_error(kernel, kq):
    if kernel.abi.system != "NetBSD":
        with pytest.raises(OSError, match="only NetBSD") as caught:
            kq.kfilter_byfilter(0)
        assert caught.value.errno == errno.ENOTTY
        return
    assert kq.kfilter_byname(kq.kfilter_byfilter(EVFILT.USER)) == EVFILT.USER
    for number in (-1, 1 << 32):
        with pytest.raises(ValueError, match="32 bits"):
            kq.kfilter_byfilter(number)
    for number in (99, (1 << 32) - 1):
        with pytest.raises(FileNotFoundError, match="ioctl"):
            kq.kfilter_byfilter(number)
    with pytest.raises(ValueError, match="NUL"):
        kq.kfilter_byname("EVFILT_READ\0xx")
    with pytest.raises(OSError, match="ioctl"):
        kq.kfilter_byname("E" * 300)


@pytest.mark.parametrize("changes", [[1], ["a"], [(3, 0, 1, 0, 0, 0)], Kevent(0), [None]])
def test_a_change_that_is_none_is_a_type_error(kq, changes):
    with pytest.raises(TypeError, match="Kevent"):
        kq.kevent(changes, 0)


@pytest.mark.parametrize("field", ["ident", "filter", "flags", "fflags", "data", "udata"])
def test_a_number_that_does_not_fit_is_a_value_error(kq, field):
    with pytest.raises(ValueError, match="does not fit"):
        kq.kevent([Kevent(0)._replace(**{field: 1 << 64})], 0)


@pytest.mark.parametrize("field", Kevent._fields)
@pytest.mark.parametrize("value", ["x", 1.5, None])
def test_a_field_that_is_no_number_is_a_type_error(kq, field, value):
    with pytest.raises(TypeError, match="numbers"):
        kq.kevent([Kevent(0)._replace(**{field: value})], 0)


def test_a_selector_and_a_loop_watch_the_running_system_only(kernel, capfd):
    if kernel.shares_descriptors:
        pytest.skip(f"the running system: {kernel.name}")
    for make in (pykq.TickleSelector, aio.TickleEventLoop):
        with pytest.raises(ValueError, match="running system"):
            make(kernel)
    gc.collect()
    assert capfd.readouterr().err == "", "nor is there a complaint of asyncio's __del__"


def test_changes_may_be_any_iterable_or_none(kq, pipe):
    kq.kevent((Kevent(fd) for fd in pipe[:1]), 0)
    kq.kernel.write(pipe[1], b"x")
    assert len(kq.kevent(None)) == 1


def test_a_change_that_fails_is_an_event_or_without_room_an_error(kq, pipe):
    if kq.kernel.abi.system == "libkqueue":
        pytest.skip("libkqueue sleeps on after a change that failed")
    bad = Kevent(pipe[0], EVFILT.READ, EV.DELETE)
    (event,) = kq.kevent([bad])
    assert (event.ident, event.flags, event.data) == (pipe[0], EV.ERROR, errno.ENOENT)
    with pytest.raises(FileNotFoundError, match="kevent: "):
        kq.kevent([bad], 0)


def test_fileno_is_for_the_running_system_only(kernel, kq):
    if kernel.shares_descriptors:
        assert kq.fileno() == kq.ident
        return
    with pytest.raises(io.UnsupportedOperation, match="rump"):
        kq.fileno()


# Events.


def test_an_event_brings_its_numbers_through_the_kernel(kernel, kq):
    if not kernel.offers(Mechanism.USER):
        pytest.skip("this kernel has no EVFILT_USER")
    udata = (1 << 64) - 1
    kq.kevent([Kevent(2**40 + 1, EVFILT.USER, EV.ADD | EV.CLEAR, udata=udata)], 0)
    kq.kevent([Kevent(2**40 + 1, EVFILT.USER, 0, NoteUser.TRIGGER | NoteUser.COPY | 0xABCDEF, -5, udata)], 0)
    (event,) = kq.kevent(timeout=LONG_S)
    assert (event.ident, event.filter, event.udata) == (2**40 + 1, EVFILT.USER, udata)
    assert event.data == -5 or kernel.abi.system == "libkqueue"  # which does not keep it
    assert event.fflags & 0xFFFFFF == 0xABCDEF
    assert "EVFILT.USER" in repr(event)


def test_a_timer_fires(kq):
    (event,) = kq.kevent([Kevent(7, EVFILT.TIMER, EV.ADD | EV.ONESHOT, data=10)], timeout=LONG_S)
    assert (event.ident, event.filter) == (7, EVFILT.TIMER)


def test_the_other_end_of_a_pipe_closes(kernel, kq):
    reader, writer = kernel.pipe()
    kq.kevent([Kevent(reader)], 0)
    kernel.close(writer)
    (event,) = kq.kevent(timeout=LONG_S)
    assert event.flags & EV.EOF
    kernel.close(reader)


def test_a_buffer_is_filled_again_and_again(kq, pipe):
    events = kq.buffer(4)
    kq.kevent([Kevent(pipe[0], udata=1)], 0)
    kq.kernel.write(pipe[1], b"x")
    assert kq.kevent(into=events) is events
    assert len(events) == 1
    assert [(event.ident, event.data) for event in events] == [(pipe[0], 1)]
    assert events.copy() == [Kevent(pipe[0], EVFILT.READ, EV.ADD, data=1, udata=1)]
    assert "EVFILT.READ" in repr(events[-1])
    with pytest.raises(IndexError):
        events[1]
    kq.kernel.read(pipe[0], 1)
    assert kq.kevent(into=events, timeout=0) is events
    assert len(events) == 0 and list(events) == []


def test_a_buffer_bounds_the_number_of_events(kq):
    timers = [Kevent(n, EVFILT.TIMER, EV.ADD | EV.ONESHOT, data=1) for n in range(5)]
    kq.kevent(timers, 0)
    events = kq.buffer(2)
    seen = []
    while len(seen) < 5:
        assert len(kq.kevent(into=events, timeout=LONG_S)) <= 2
        seen += [event.ident for event in events]
    assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.stress
def test_threads_that_wait_at_once_get_their_own_events(kernel, kq, watchdog):
    """Each of 4 threads returns whole batches; one-shot timers are each reported once, to one of them."""
    total = 400
    seen = [[] for _ in range(4)]

    def collect(mine):
        while sum(map(len, seen)) < total:
            mine += [event.udata for event in kq.kevent(max_events=3, timeout=0.05)]

    threads = [threading.Thread(target=collect, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for n in range(total):
        kq.kevent([Kevent(n, EVFILT.TIMER, EV.ADD | EV.ONESHOT, data=1, udata=n)], 0)
    for thread in threads:
        thread.join(LONG_S)
    assert sorted(itertools.chain(*seen)) == list(range(total))


# The programs.


def run_python(*args, status=0):
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=4 * LONG_S)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_the_demo_shows_the_wake_up(kernel, mechanism):
    done = run_python("-m", "pykq.demo", "--mechanism", mechanism)
    assert f"Kernel:    {kernel.name}" in done.stdout
    assert re.search(rf"^Mechanism: .*\b{mechanism}\b", done.stdout, re.MULTILINE)
    assert "us later kevent is back: Tickled" in done.stdout
    assert "a wait of 0.1 s gets []" in done.stdout
    assert done.stderr == ""


def test_the_module_says_what_the_kernel_offers(kernel, tickling, monkeypatch):
    monkeypatch.delenv("PYKQ_MECHANISM", raising=False)
    facts = json.loads(run_python("-m", "pykq", "--json").stdout)
    assert facts["kernel"] == kernel.name
    assert facts["tickle"] == tickling
    assert facts["mechanism"] == kernel.mechanism
    assert facts["filters"]["EVFILT_TIMER"] == kernel.abi.filters.get(EVFILT.TIMER, EVFILT.TIMER)
    text = run_python("-m", "pykq").stdout
    assert kernel.name in text
    assert facts["kevent"]["source"] in text


def test_the_module_names_the_mechanism_that_the_environment_chooses(kernel, monkeypatch):
    monkeypatch.setenv("PYKQ_MECHANISM", "pipe")
    assert json.loads(run_python("-m", "pykq", "--json").stdout)["mechanism"] == "pipe"
    monkeypatch.setenv("PYKQ_MECHANISM", "telepathy")
    assert "telepathy" in run_python("-m", "pykq", status=1).stderr
