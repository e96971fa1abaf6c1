"""``python -m pykq.bench``: what a tickle costs, beside its rivals, in one run on one kernel.

Every round measures each of them, so that a disturbance meets them all alike, and begins with another one;
the figures are medians over the rounds, with half of the range of their middle half. Then what pykq's own
code costs: the same done by pykq and by the standard library, in turn. ``--json`` prints all for programs,
in seconds.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import math
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pykq
from pykq import EV, EVFILT, Kevent, NoteUser, aio
from pykq._abi import TIMESPEC, io

FIOCLEX = io("f", 1)  # sys/filio.h: the least that an ioctl can do

ROUNDS = 5
CALLS = 1000  # of one kind in a round
BATCH = 50  # of calls in a row: a socket's buffer may hold no more than some hundred writes
WAKE_UPS = 2000  # of one kind in a round: in all rounds ten beyond p99.9
ENOUGH_FOR_P999 = 10_000
PROCESSES = 5  # that compare single calls
LOOP_WAKE_UPS = 300  # of an event loop in a round, each of which sleeps for a tick of the clock
EVENTS = 64  # in a busy kqueue

# A signal that comes just before the wait does not end it; this does.
RESCUE_S = 0.02


@dataclass
class Figures:
    """What one way to wake a wait was measured at: costs for each round, and each round's wake-ups."""

    name: str
    send: Callable[[], object]
    clean: Callable[[], object] = bool  # after sends that nobody waited for
    returned: Callable[[], object] = bool  # in the waiter, after its wait
    wait: Callable[[], object] | None = None  # for what does not end a wait of pykq's
    awake_s: list[float] = field(default_factory=list)  # nobody waits, nothing is pending
    pending_s: list[float] = field(default_factory=list)  # one is pending already
    asleep_s: list[float] = field(default_factory=list)  # the thread sleeps: it has to be made to run
    wake_s: list[list[float]] = field(default_factory=list)


class Waiter(threading.Thread):
    """Waits as often as it is told to, and notes the time of each return."""

    def __init__(self, kq: pykq.Kqueue) -> None:
        super().__init__(daemon=True)
        self._kq = kq
        self._begin, self._waits, self._done = (threading.Semaphore(0) for _ in range(3))
        self._way: Figures
        self.at = 0.0
        self.start()

    def run(self) -> None:
        while self._begin.acquire():
            wait = self._way.wait or self._kq.kevent
            self._waits.release()
            with contextlib.suppress(pykq.Tickled):
                wait()
            self.at = time.perf_counter()
            self._way.returned()
            self._done.release()

    def wake(self, way: Figures) -> tuple[float, float]:
        """Seconds for the send, and from before it to the return of the wait.

        The other thread holds the GIL until it is in its wait: so it mostly sleeps, and if it does not yet,
        nothing is lost.
        """
        self._way = way
        self._begin.release()
        self._waits.acquire()
        began = time.perf_counter()
        way.send()
        sent = time.perf_counter()
        self._done.acquire()
        return sent - began, self.at - began


def measure(kernel: pykq.Kernel) -> dict[str, Figures]:
    """Measure all the ways to wake a wait that this kernel has, and the floors: calls that do nothing."""
    with contextlib.ExitStack() as stack:
        kq = stack.enter_context(pykq.Kqueue(kernel))
        waiter = Waiter(kq)
        ways = _ways(kernel, kq, waiter, stack)
        floors = _floors(kernel, kq)
        for number in range(ROUNDS):
            first = number % len(ways)
            for way in [*floors, *ways[first:], *ways[:first]]:
                if way.wait is None:  # a signal would be for the thread that measures
                    way.awake_s.append(_one_by_one(way))
                    way.pending_s.append(_in_a_row(way))
                if way in floors:
                    continue
                sends, wake_ups = zip(*(waiter.wake(way) for _ in range(WAKE_UPS)), strict=True)
                way.asleep_s.append(statistics.median(sends))
                way.wake_s.append(list(wake_ups))
    return {way.name: way for way in [*floors, *ways]}


def _ways(
    kernel: pykq.Kernel, kq: pykq.Kqueue, waiter: Waiter, stack: contextlib.ExitStack
) -> list[Figures]:
    """The ways to wake a wait that the kernel and the process have."""
    empty = lambda: kq.kevent(timeout=0)  # noqa: E731
    ways = []
    if kernel.has_tickle:
        ways.append(Figures("KQUEUE_TICKLE", kq.tickle, empty))
    trigger = [Kevent(1, EVFILT.USER, EV(0), NoteUser.TRIGGER)]
    with contextlib.suppress(OSError):  # before NetBSD 10
        kq.kevent([Kevent(1, EVFILT.USER, EV.ADD | EV.CLEAR)], 0)
        ways.append(Figures("EVFILT_USER", lambda: kq.kevent(trigger, 0), empty))
    reader, writer = kernel.pipe()
    stack.callback(kernel.close, reader)
    stack.callback(kernel.close, writer)
    ways.append(_bytes("pipe", kernel, kq, reader, writer))
    if not kernel.shares_descriptors:
        return ways
    here, there = (stack.enter_context(one) for one in socket.socketpair())
    ways.append(_bytes("socket pair", kernel, kq, here.fileno(), there.fileno()))
    if threading.current_thread() is threading.main_thread():  # no other may set a handler
        before = signal.signal(signal.SIGUSR1, lambda *_: None)
        stack.callback(signal.signal, signal.SIGUSR1, before)
        buffer, rescue = kq.buffer(1), TIMESPEC.pack(0, round(RESCUE_S * 1e9))
        wait = lambda: kernel.kevent(kq.ident, None, 0, buffer._reference, 1, rescue)  # noqa: E731
        ident = waiter.ident or 0
        ways.append(Figures("pthread_kill", lambda: signal.pthread_kill(ident, signal.SIGUSR1), wait=wait))
    return ways


def _bytes(name: str, kernel: pykq.Kernel, kq: pykq.Kqueue, reader: int, writer: int) -> Figures:
    """Wake by a byte through a pair of descriptors."""
    kq.kevent([Kevent(reader)], 0)
    read = lambda: kernel.read(reader, CALLS)  # noqa: E731
    return Figures(name, lambda: kernel.write(writer, b"!"), read, read)


def _floors(kernel: pykq.Kernel, kq: pykq.Kqueue) -> list[Figures]:
    """What the least that a way could do costs."""
    floors = []
    if kernel.abi.system == "NetBSD":
        floors.append(Figures("ioctl FIOCLEX", lambda: kernel.plain_ioctl(kq.ident, FIOCLEX)))
    if kernel.shares_descriptors:
        floors.append(Figures("getppid", os.getppid))
    return floors


def _one_by_one(way: Figures) -> float:
    """Seconds for one send, with nobody waiting and nothing pending, as a median of many."""
    spent = []
    for _ in range(CALLS):
        began = time.perf_counter()
        way.send()
        spent.append(time.perf_counter() - began)
        way.clean()
    return statistics.median(spent)


def _in_a_row(way: Figures) -> float:
    """Seconds for one of many sends that come to one, as a median of batches."""
    timer, spent = timeit.Timer(way.send), []
    for _ in range(CALLS // BATCH):
        way.send()
        spent.append(timer.timeit(BATCH) / BATCH)
        way.clean()
    return statistics.median(spent)


def summary(figures: Figures) -> dict[str, float]:
    """The figures of one way as numbers, in seconds; _spread_s is that of the rounds."""
    rounds = {"send_s": figures.awake_s, "pending_s": figures.pending_s, "asleep_s": figures.asleep_s}
    for name, rank in (("wake_p50_s", 0.5), ("wake_p99_s", 0.99)):
        rounds[name] = [_nearest_rank(one, rank) for one in figures.wake_s]
    numbers = {}
    for name, values in rounds.items():
        if values:
            numbers[name] = statistics.median(values)
            numbers[name.removesuffix("_s") + "_spread_s"] = _spread(values)
    every = [one for each in figures.wake_s for one in each]
    if len(every) >= ENOUGH_FOR_P999:
        numbers["wake_p999_s"] = _nearest_rank(every, 0.999)
    return numbers


def _nearest_rank(values: Sequence[float], rank: float) -> float:
    """The smallest value that this share of the values is not greater than."""
    return sorted(values)[max(0, math.ceil(round(rank * len(values), 6)) - 1)]


def _spread(values: Sequence[float]) -> float:
    """Half of the range of the middle half."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / 2


# The driver beside the standard library.

LOOK_AT_EACH = "for event in {}: event.ident, event.data"


def compare(kernel: pykq.Kernel) -> dict[str, dict[str, float]]:
    """What pykq does, and the same without it: medians, in seconds, and the ratio."""
    # Each figure is the median of several processes', a ratio that of the ratios within one: where things lie
    # in memory makes up to a third of the speed of a call.
    command = [sys.executable, "-m", "pykq.bench", "--calls"]
    runs = [json.loads(subprocess.check_output(command)) for _ in range(PROCESSES)]
    results = {
        pair: {key: statistics.median(run[pair][key] for run in runs) for key in numbers}
        for pair, numbers in runs[0].items()
    }
    if kernel.shares_descriptors:
        results |= compare_loops(kernel)
    if not kernel.has_tickle:  # what is asked, is asked of the ioctl
        for numbers in results.values():
            numbers.pop("at_most", None)
    return results


def compare_calls(kernel: pykq.Kernel) -> dict[str, dict[str, float]]:
    """Single calls, in this process."""
    pairs: list[tuple[str, str, float | None]] = []  # ours, the other, and the ratio to keep to
    names: dict[str, Any] = {"fcntl": fcntl, "kernel": kernel, "KQUEUE_TICKLE": pykq.KQUEUE_TICKLE}
    with contextlib.ExitStack() as stack:
        kq = names["kq"] = stack.enter_context(pykq.Kqueue(kernel))
        names["fd"] = kq.ident
        names["buffer"] = kq.buffer(EVENTS)
        if kernel.has_tickle:
            module = "fcntl" if kernel.shares_descriptors else "kernel"
            names["tickle"], names["ioctl"] = kq.tickle, names[module].ioctl  # the calls without the look-up
            pairs += [("tickle()", "ioctl(fd, KQUEUE_TICKLE)", 1.25)]
            pairs += [("kq.tickle()", f"{module}.ioctl(fd, KQUEUE_TICKLE)", None)]
        if kernel.shares_descriptors and sys.platform != "linux":
            names["select_kq"] = stack.enter_context(contextlib.closing(select.kqueue()))
            busy = names["busy"] = stack.enter_context(pykq.Kqueue(kernel))
            select_busy = names["select_busy"] = stack.enter_context(contextlib.closing(select.kqueue()))
            for number in range(EVENTS):
                reader, writer = kernel.pipe()
                stack.callback(kernel.close, reader)
                stack.callback(kernel.close, writer)
                kernel.write(writer, b"!")
                busy.kevent([Kevent(reader, udata=number)], 0)
                select_busy.control([select.kevent(reader)], 0)  # its defaults are READ and ADD
            empty, full = f"select_kq.control(None, {EVENTS}, 0)", f"select_busy.control(None, {EVENTS}, 0)"
            into, into_list = f"kevent(None, {EVENTS}, 0, buffer)", f"kevent(None, {EVENTS}, 0)"
            pairs += [(f"kq.{into}", empty, 1.4), (f"kq.{into_list}", empty, None)]
            theirs = LOOK_AT_EACH.format(full)
            pairs += [(LOOK_AT_EACH.format(f"busy.{into}"), theirs, 1.2)]
            pairs += [(LOOK_AT_EACH.format(f"busy.{into_list}"), theirs, None)]
        timers = [[timeit.Timer(statement, globals=names) for statement in pair] for *pair, _ in pairs]
        rounds = []
        for number in range(ROUNDS):
            turn = 1 if number % 2 else -1  # of a pair, and of all, each is first in turn
            timed = [[one.timeit(CALLS) / CALLS for one in pair[::turn]][::turn] for pair in timers[::turn]]
            rounds.append(timed[::turn])
    results = {}
    for (*pair, at_most), seconds in zip(pairs, zip(*rounds, strict=True), strict=True):
        ours, others = map(statistics.median, zip(*seconds, strict=True))
        results[" : ".join(pair)] = _ratio(ours, others, at_most)
    return results


def _ratio(ours_s: float, theirs_s: float, at_most: float | None = None) -> dict[str, float]:
    ratio = {"pykq_s": ours_s, "other_s": theirs_s, "ratio": ours_s / theirs_s}
    return ratio if at_most is None else ratio | {"at_most": at_most}


def compare_loops(kernel: pykq.Kernel) -> dict[str, dict[str, float]]:
    """``call_soon_threadsafe``, the event loop of pykq.aio beside asyncio's own."""
    one_a_turn: tuple[list[float], list[float]] = [], []
    in_a_row: tuple[list[float], list[float]] = [], []
    p50_s: tuple[list[float], list[float]] = [], []
    p99_s: tuple[list[float], list[float]] = [], []
    loops: list[Callable[[], asyncio.AbstractEventLoop]]
    loops = [lambda: aio.TickleEventLoop(kernel), asyncio.SelectorEventLoop]
    for _ in range(ROUNDS):
        for which, factory in enumerate(loops):
            with asyncio.Runner(loop_factory=factory) as runner:
                one_a_turn[which].append(runner.run(_calls_one_a_turn()))
                in_a_row[which].append(runner.run(_calls_in_a_row()))
                latency_s = runner.run(_calls_one_by_one())
                p50_s[which].append(_nearest_rank(latency_s, 0.5))
                p99_s[which].append(_nearest_rank(latency_s, 0.99))
    measured = {
        "one a turn": (one_a_turn, 0.5),
        "in a row": (in_a_row, None),
        "latency p50": (p50_s, 1.0),
        "latency p99": (p99_s, 1.0),
    }
    results = {}
    for what, (seconds, at_most) in measured.items():
        ours, others = map(statistics.median, seconds)
        results[f"call_soon_threadsafe, {what} : asyncio"] = _ratio(ours, others, at_most)
    return results


async def _calls_one_a_turn() -> float:
    """Seconds for a turn of the loop that one call wakes up and that makes the next call: no other thread."""
    loop, done, left = asyncio.get_running_loop(), asyncio.Event(), iter(range(CALLS))

    def turn() -> None:
        if next(left, None) is None:
            done.set()
        else:
            loop.call_soon_threadsafe(turn)

    began = time.perf_counter()
    turn()
    await done.wait()
    return (time.perf_counter() - began) / CALLS


async def _calls_in_a_row() -> float:
    """Seconds for one of many calls by another thread, as fast as it can, until all have been made."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def send() -> None:
        for _ in range(CALLS):
            loop.call_soon_threadsafe(bool)
        loop.call_soon_threadsafe(done.set)

    began = time.perf_counter()
    thread = threading.Thread(target=send)
    thread.start()
    await done.wait()
    thread.join()
    return (time.perf_counter() - began) / CALLS


async def _calls_one_by_one() -> list[float]:
    """Seconds from each call to its being made, by a loop that sleeps."""
    loop, done, latency_s = asyncio.get_running_loop(), asyncio.Event(), []
    made = threading.Semaphore(0)

    def make(sent: float) -> None:
        latency_s.append(time.perf_counter() - sent)
        made.release()

    def send() -> None:
        for _ in range(LOOP_WAKE_UPS):
            time.sleep(0.0005)  # so that the loop mostly sleeps
            loop.call_soon_threadsafe(make, time.perf_counter())
            made.acquire()
        loop.call_soon_threadsafe(done.set)

    thread = threading.Thread(target=send)
    thread.start()
    await done.wait()
    thread.join()
    return latency_s


def figure(numbers: dict[str, float], key: str) -> str:
    """A figure in microseconds with its spread, as far as there is one."""
    if key not in numbers:
        return ""
    spread = numbers.get(key.removesuffix("_s") + "_spread_s")
    return f"{1e6 * numbers[key]:.1f}" + ("" if spread is None else f" ±{1e6 * spread:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pykq.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    parser.add_argument("--calls", action="store_true", help="compare single calls alone, for programs")
    arguments = parser.parse_args()
    try:
        kernel = pykq.load_kernel()
    except pykq.KernelUnavailable as error:
        print(f"pykq.bench: {error}", file=sys.stderr)
        return 1
    if arguments.calls:
        print(json.dumps(compare_calls(kernel)))
        return 0
    results = {name: summary(way) for name, way in measure(kernel).items()}
    driver = compare(kernel)
    if arguments.json:
        facts = {"kernel": kernel.name, "rounds": ROUNDS, "results": results, "driver": driver}
        print(json.dumps(facts, indent=1))
        return 0
    print(f"{kernel.name}; {ROUNDS} rounds, medians, microseconds; awake includes one reading of the clock")
    columns = ("awake", "pending", "asleep", "wake p50", "wake p99", "p99.9")
    print(" " * 16 + "".join(f"{column:>17}" for column in columns))
    keys = ("send_s", "pending_s", "asleep_s", "wake_p50_s", "wake_p99_s", "wake_p999_s")
    for name, numbers in results.items():
        print(f"{name:16}" + "".join(f"{figure(numbers, key):>17}" for key in keys))
    print(f"\n{'pykq':>10}{'other':>10}{'ratio':>10}{'at most':>10}   pykq : other")
    for name, numbers in driver.items():
        ours, theirs = 1e6 * numbers["pykq_s"], 1e6 * numbers["other_s"]
        bar = f"{numbers['at_most']:g}" if "at_most" in numbers else ""
        print(f"{ours:10.1f}{theirs:10.1f}{numbers['ratio']:10.2f}{bar:>10}   {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
