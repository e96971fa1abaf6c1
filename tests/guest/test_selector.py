"""TickleSelector, with each mechanism: what other threads and signals do to a select.

What a selector does besides is tested by CPython's own tests, in test_cpython.py.
"""

import collections
import os
import selectors
import signal
import socket
import threading

import pytest

import pykq

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


def test_a_watched_signal_ends_a_select_although_another_thread_gets_it(selector, waiter):
    seen = []
    selector.on_signal(signal.SIGUSR1, seen.append)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        asleep = waiter(selector.select).fall_asleep()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asleep.outcome() == []
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


@pytest.mark.stress
@pytest.mark.parametrize("senders", [1, 4])
def test_no_wakeup_is_lost(selector, senders):
    """Whoever puts something into the queue wakes the selector, which makes a system call for some only."""
    items, work, taken = 20000, collections.deque(), []

    def send(numbers):
        for number in numbers:
            work.append(number)
            selector.wakeup()

    threads = [threading.Thread(target=send, args=(range(n, items, senders),)) for n in range(senders)]
    for thread in threads:
        thread.start()
    while len(taken) < items:
        before = len(taken)
        while work:
            taken.append(work.popleft())
        if len(taken) < items:
            selector.select(LONG_S)
            assert work or len(taken) > before or any(thread.is_alive() for thread in threads), "one is lost"
    assert sorted(taken) == list(range(items))
