"""The rules T1 to T8 as a program sees them, through pykq, with each mechanism that the kernel has.

T8, that a tickle makes nothing readable, is the one that only KQUEUE_TICKLE keeps: a hidden event is an
event. What else a mechanism cannot keep is said in the docstring of ``Kqueue``.
"""

import contextlib
import threading

import pytest

import pykq
from pykq import EV, EVFILT, Kevent, Mechanism

LONG_S = 30.0


@pytest.fixture
def kq(kernel, mechanism, watchdog):
    with pykq.Kqueue(kernel, mechanism=mechanism) as kq:
        yield kq


def wait(kq, timeout=LONG_S, max_events=8):
    """The idents of the events, or "tickled"."""
    try:
        return [event.ident for event in kq.kevent(max_events=max_events, timeout=timeout)]
    except pykq.Tickled:
        return "tickled"


@pytest.fixture
def ready(kq, pipe):
    """The descriptor of an event that is pending, as long as nobody reads it."""
    kq.kevent([Kevent(pipe[0])], 0)
    kq.kernel.write(pipe[1], b"x")
    return pipe[0]


def test_t1_a_thread_asleep_comes_back(kq, waiter):
    asleep = waiter(wait, kq, None).fall_asleep()
    kq.tickle()
    assert asleep.outcome() == "tickled"


def test_t1_another_kqueue_does_not(kernel, kq, mechanism, waiter, short_s):
    with pykq.Kqueue(kernel, mechanism=mechanism) as other:
        asleep = waiter(wait, kq, 4 * short_s).fall_asleep()
        other.tickle()
        assert asleep.outcome() == []


def test_t2_pending_events_win_and_consume_the_tickle(kq, ready, short_s):
    kq.tickle()
    assert wait(kq) == [ready]
    kq.kernel.read(ready, 1)
    assert wait(kq, short_s) == []


def test_t2_events_that_come_after_the_tickle_win(kq, pipe, short_s):
    kq.kevent([Kevent(pipe[0])], 0)
    kq.tickle()
    kq.kernel.write(pipe[1], b"x")
    assert wait(kq) == [pipe[0]]
    kq.kernel.read(pipe[0], 1)
    assert wait(kq, short_s) == []


@pytest.mark.parametrize("tickle_first", [False, True])
def test_t2_events_win_although_there_is_room_for_one_only(kq, pipe, short_s, tickle_first):
    kq.kevent([Kevent(pipe[0])], 0)
    if tickle_first:
        kq.tickle()
    kq.kernel.write(pipe[1], b"x")
    if not tickle_first:
        kq.tickle()
    assert wait(kq, max_events=1) == [pipe[0]]
    kq.kernel.read(pipe[0], 1)
    assert wait(kq, short_s, max_events=1) == []


def test_t2_a_full_return_consumes_the_tickle(kernel, kq, short_s):
    pipes = [kernel.pipe() for _ in range(3)]
    kq.kevent([Kevent(reader) for reader, _ in pipes], 0)
    for _, writer in pipes:
        kernel.write(writer, b"x")
    kq.tickle()
    assert len(wait(kq, max_events=2)) == 2
    for reader, _ in pipes:
        kernel.read(reader, 1)
    assert wait(kq, short_s) == []
    for fds in pipes:
        for fd in fds:
            kernel.close(fd)


def test_t3_a_tickle_waits_for_the_next_wait_and_ends_one(kq, short_s):
    kq.tickle()
    assert wait(kq) == "tickled"
    assert wait(kq, short_s) == []


@pytest.mark.stress
def test_t4_any_number_of_tickles_is_one(kq, short_s):
    for _ in range(20000):  # more than fit into a pipe at once, on NetBSD
        kq.tickle()
    assert wait(kq) == "tickled"
    assert wait(kq, short_s) == []


def test_t5_a_look_returns_nothing_and_consumes_the_tickle(kq, short_s):
    kq.tickle()
    assert wait(kq, 0) == []
    assert wait(kq, short_s) == []


def test_t6_changes_alone_neither_see_nor_consume_a_tickle(kq, pipe):
    kq.tickle()
    assert kq.kevent([Kevent(pipe[0])], 0) == []
    assert kq.kevent([Kevent(pipe[0], EVFILT.READ, EV.DELETE)], 0) == []
    assert wait(kq) == "tickled"


@pytest.mark.parametrize("threads", [2, 4])
def test_t7_each_tickle_brings_one_of_several_threads_back_at_least(kq, waiter, threads):
    asleep = [waiter(wait, kq, None) for _ in range(threads)]
    while asleep:
        waiter.all_asleep(asleep)
        kq.tickle()
        while all(one.waits for one in asleep):
            asleep[0]._thread.join(0.01)
        back = [one for one in asleep if not one.waits]
        assert [one.outcome() for one in back] == ["tickled"] * len(back)
        asleep = [one for one in asleep if one not in back]


def test_t8_a_tickle_is_readable_only_as_a_hidden_event(kernel, kq, mechanism, short_s):
    if kernel.abi.system == "libkqueue":
        pytest.skip("a kqueue of libkqueue's is readable only while somebody waits")
    with pykq.Kqueue(kernel) as outer:
        outer.kevent([Kevent(kq)], 0)
        kq.tickle()
        assert wait(outer, short_s) == ([] if mechanism == Mechanism.TICKLE else [kq.ident])
    assert wait(kq) == "tickled"


@pytest.mark.stress
def test_the_hidden_event_never_shows(kernel, kq, watchdog):
    """Among events that come and go, in small buffers and large ones, taken by several threads."""
    pipes = [kernel.pipe() for _ in range(4)]
    kq.kevent([Kevent(reader, udata=77) for reader, _ in pipes], 0)
    shown, stop = [], threading.Event()

    def take(max_events):
        events = kq.buffer(max_events)
        while not stop.is_set():
            with contextlib.suppress(pykq.Tickled):
                shown.extend(event.udata for event in kq.kevent(timeout=0.01, into=events))

    threads = [threading.Thread(target=take, args=(n,)) for n in (1, 3, 8)]
    for thread in threads:
        thread.start()
    for number in range(2000):
        reader, writer = pipes[number % len(pipes)]
        kernel.write(writer, b"x")
        kq.tickle()
        kernel.read(reader, 1)
    stop.set()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert set(shown) <= {77}
    for fds in pipes:
        for fd in fds:
            kernel.close(fd)
