"""TickleSelector, with each mechanism: what other threads and signals do to a select.

What a selector does besides is tested by CPython's own tests, in test_cpython.py.
"""

import collections
import os
import selectors
import signal
import socket
import threading
import time

import pytest

import pykq
from pykq import EV, EVFILT, Kevent

LONG_S = 30.0


@pytest.fixture
def mechanism(mechanism, kernel):
    if not kernel.shares_descriptors:
        pytest.skip(f"not the running system: {kernel.name}")
    return mechanism


@pytest.fixture
def selector(kernel, mechanism, watchdog):
    with pykq.TickleSelector(kernel, mechanism=mechanism) as selector:
        assert selector.mechanism == mechanism
        yield selector


@pytest.fixture
def quiet_signals():
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(number, lambda number, frame: None) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, signal.SIG_IGN)  # so that one that is still pending goes
        signal.signal(number, handler)


def test_wakeup_ends_a_select_in_another_thread(selector, waiter):
    asleep = waiter(selector.select).fall_asleep()
    selector.wakeup()
    assert asleep.outcome() == []


def test_a_wakeup_before_a_select_ends_it_and_only_that(selector, short_s):
    selector.wakeup()
    selector.wakeup()
    assert selector.select() == []
    assert selector.select(short_s) == []


def test_what_is_ready_wins(selector, short_s):
    left, right = socket.socketpair()
    with left, right:
        selector.register(left, selectors.EVENT_READ, "data")
        right.send(b"x")
        selector.wakeup()
        ((key, events),) = selector.select()
        assert (key.fileobj, key.data, events) == (left, "data", selectors.EVENT_READ)
        left.recv(1)
        assert selector.select(short_s) == []


def test_a_file_object_that_can_be_read_and_written_is_one_key(selector):
    left, right = socket.socketpair()
    with left, right:
        selector.register(left, selectors.EVENT_READ | selectors.EVENT_WRITE)
        right.send(b"x")
        ((_, events),) = selector.select()
        assert events == selectors.EVENT_READ | selectors.EVENT_WRITE


def test_a_failed_register_leaves_nothing_behind(selector, short_s):
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(OSError):
        selector.register(reader, selectors.EVENT_READ | selectors.EVENT_WRITE)
    assert len(selector.get_map()) == 0
    assert selector.select(short_s) == []
    os.close(writer)


def test_a_failed_modify_leaves_nothing_behind(selector):
    """As in the standard library. Here the second of two changes fails."""
    left, right = socket.socketpair()
    with left, right:
        selector.register(left, selectors.EVENT_WRITE)
        selector._kq.kevent([Kevent(left, EVFILT.WRITE, EV.DELETE)], 0)
        right.send(b"x")
        with pytest.raises(FileNotFoundError):
            selector.modify(left, selectors.EVENT_READ)
        assert len(selector.get_map()) == 0
        assert selector._kq.kevent(timeout=0) == []


def test_there_is_room_for_all_that_is_ready(selector):
    pairs = [socket.socketpair() for _ in range(60)]
    for pair in pairs:
        for one in pair:
            selector.register(one, selectors.EVENT_WRITE)
    assert len(selector.select()) == 120
    for pair in pairs:
        for one in pair:
            one.close()


def test_a_closed_selector_cannot_be_woken(selector):
    selector.close()
    with pytest.raises(ValueError, match="closed"):
        selector.wakeup()


def test_a_watched_signal_ends_a_select_although_another_thread_gets_it(selector, waiter, quiet_signals):
    seen = []
    selector.on_signal(signal.SIGUSR1, seen.append)
    asleep = waiter(selector.select).fall_asleep()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert asleep.outcome() == []
    assert seen == [signal.SIGUSR1]


def test_a_signals_handler_may_remove_another(kernel, selector, quiet_signals):
    if kernel.abi.system == "libkqueue":
        pytest.skip("libkqueue loses one of two signals now and then, or leaves it to end the process")
    one, two = quiet_signals
    seen = []
    selector.on_signal(one, lambda number: (seen.append(number), selector.on_signal(two, None)))
    selector.on_signal(two, lambda number: (seen.append(number), selector.on_signal(one, None)))
    for number in quiet_signals:
        os.kill(os.getpid(), number)
    while not seen:
        assert selector.select(LONG_S) == []
    assert selector.select(0) == []
    assert len(seen) == 1


def test_what_cannot_be_called_is_no_signals_handler(selector):
    with pytest.raises(TypeError, match="callable"):
        selector.on_signal(signal.SIGUSR1, "a string")


def test_a_wakeup_that_fails_is_not_taken_for_one_under_way(selector, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selector._kq, "tickle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            selector.wakeup()
    selector.wakeup()
    start = time.monotonic()
    assert selector.select(LONG_S) == []
    assert time.monotonic() - start < LONG_S


def test_what_makes_up_for_a_wakeup_that_fails_ends_a_select(selector, monkeypatch, short_s):
    """Another thread may have relied on the one that failed."""
    tickle, failures = selector._kq.tickle, [KeyboardInterrupt]

    def interrupted_once():
        if failures:
            raise failures.pop()
        tickle()

    with monkeypatch.context() as patch:
        patch.setattr(selector._kq, "tickle", interrupted_once)
        with pytest.raises(KeyboardInterrupt):
            selector.wakeup()
    start = time.monotonic()
    assert selector.select(LONG_S) == []
    assert time.monotonic() - start < LONG_S
    assert selector.select(short_s) == []


@pytest.mark.stress
@pytest.mark.parametrize("senders", [1, 4])
def test_no_wakeup_is_lost(selector, senders):
    """Whoever puts something into the queue wakes the selector, which makes a system call for some only.

    In each round all put in one thing, and none goes on before all of it is taken: so no later wake-up makes
    up for one that is lost.
    """
    rounds, work = 3000, collections.deque()
    turns = [threading.Semaphore(0) for _ in range(senders)]

    def send(turn):
        for _ in range(rounds):
            turn.acquire()
            work.append("something")
            selector.wakeup()

    for turn in turns:
        threading.Thread(target=send, args=(turn,), daemon=True).start()
    for _ in range(rounds):
        for turn in turns:
            turn.release()
        taken = 0
        while taken < senders:
            start = time.monotonic()
            selector.select(LONG_S)
            assert time.monotonic() - start < LONG_S, "one is lost"
            while work:
                work.popleft()
                taken += 1


@pytest.mark.stress
@pytest.mark.parametrize("timeout", [None, LONG_S])
def test_signals_end_no_select_and_hide_no_wakeup(selector, quiet_signals, timeout):
    """Each round wakes it once, and signals come all the while: it ends by the wake-up, and not before.

    Where a signal comes between what a wake-up notes and its tickle, the tickle may end the next as well.
    """
    rounds, sent, early = 300, 0, 0
    stop, turn = threading.Event(), threading.Semaphore(0)

    def storm():
        while not stop.wait(0.0005):
            signal.pthread_kill(threading.main_thread().ident, quiet_signals[0])

    def send():
        nonlocal sent
        for number in range(rounds):
            turn.acquire()
            time.sleep(number % 3 * 0.001)  # signals come before it, or none does
            sent += 1
            selector.wakeup()

    threads = [threading.Thread(target=body, daemon=True) for body in (storm, send)]
    for thread in threads:
        thread.start()
    for number in range(1, rounds + 1):
        turn.release()
        start = time.monotonic()
        assert selector.select(timeout) == []
        while sent < number:
            early += 1
            assert selector.select(timeout) == []
        assert time.monotonic() - start < LONG_S, "one is lost"
    stop.set()
    for thread in threads:
        thread.join()
    assert early < rounds / 30
