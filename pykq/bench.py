"""``python -m pykq.bench``: what a tickle costs, beside its rivals, in one run on one kernel.

Every round measures each of them once, so that a disturbance meets them all alike; the figures are medians
over the rounds. Then what pykq's own code costs: the same done by pykq and by the standard library, in turn.
``--json`` prints all for programs, in seconds.
"""

import argparse
import asyncio
import contextlib
import json
import select
import statistics
import sys
import threading
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pykq
from pykq import EV, EVFILT, Kevent, NoteUser, aio
from pykq._abi import io

FIOCLEX = io("f", 1)  # sys/filio.h: the least that an ioctl can do

ROUNDS = 20
CALLS = 1000  # of one kind in a round
WAKE_UPS = 100  # of one kind in a round
EVENTS = 64  # in a busy kqueue


@dataclass
class Figures:
    """What one way to wake a wait was measured at: a cost for each round, a latency for each wake-up."""

    name: str
    send: Callable[[], object]
    clean: Callable[[], object]  # after a send that nobody waited for
    returned: Callable[[], object]  # in the waiter, after its wait
    cost_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)


class Waiter(threading.Thread):
    """Waits as often as it is told to, and notes the time of each return."""

    def __init__(self, kq: pykq.Kqueue) -> None:
        super().__init__(daemon=True)
        self._kq = kq
        self._begin, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._returned: Callable[[], object] = bool
        self.at = 0.0
        self.start()

    def run(self) -> None:
        while self._begin.acquire():
            with contextlib.suppress(pykq.Tickled):
                self._kq.kevent()
            self.at = time.perf_counter()
            self._returned()
            self._done.release()

    def wake(self, way: Figures) -> float:
        """Seconds from the send to the return of the wait."""
        self._returned = way.returned
        self._begin.release()
        time.sleep(0.0005)  # so that it mostly sleeps; if it does not yet, nothing is lost
        sent = time.perf_counter()
        way.send()
        self._done.acquire()
        return self.at - sent


def measure(kernel: pykq.Kernel) -> dict[str, Figures]:
    """Measure all the ways to wake a wait that this kernel has, and the floor, an ioctl that does nothing."""
    with pykq.Kqueue(kernel) as kq:
        reader, writer = kernel.pipe()
        kq.kevent([Kevent(reader)], 0)
        ways = [
            Figures("pipe", lambda: kernel.write(writer, b"!"), lambda: kernel.read(reader, 1),
                    lambda: kernel.read(reader, 1)),
        ]
        if kernel.has_tickle:
            ways.append(Figures("KQUEUE_TICKLE", kq.tickle, bool, bool))
        trigger = [Kevent(1, EVFILT.USER, EV(0), NoteUser.TRIGGER)]
        try:
            kq.kevent([Kevent(1, EVFILT.USER, EV.ADD | EV.CLEAR)], 0)
        except OSError:  # before NetBSD 10
            pass
        else:
            send, clean = lambda: kq.kevent(trigger, 0), lambda: kq.kevent(timeout=0)
            ways.append(Figures("EVFILT_USER", send, clean, bool))
        floors = []
        if kernel.abi.system == "NetBSD":
            floors += [Figures("ioctl FIOCLEX", lambda: kernel.plain_ioctl(kq.ident, FIOCLEX), bool, bool)]
        waiter = Waiter(kq)
        for _ in range(ROUNDS):
            for way in [*floors, *ways]:
                way.cost_s.append(_cost(way))
            kq.kevent(timeout=0)  # a tickle is left over from its cost
            for way in ways:
                way.latency_s += [waiter.wake(way) for _ in range(WAKE_UPS)]
        kernel.close(reader)
        kernel.close(writer)
    return {way.name: way for way in [*floors, *ways]}


def _cost(way: Figures) -> float:
    """Seconds for one send, with nobody waiting, as a mean over many."""
    spent = 0.0
    for _ in range(CALLS):
        began = time.perf_counter()
        way.send()
        spent += time.perf_counter() - began
        way.clean()
    return spent / CALLS


def summary(figures: Figures) -> dict[str, float]:
    """The figures of one way as numbers, in seconds."""
    numbers = {"send_s": statistics.median(figures.cost_s)}
    if figures.latency_s:
        numbers |= {f"wake_{name}": value for name, value in _percentiles(figures.latency_s).items()}
    return numbers


def _percentiles(latency_s: list[float]) -> dict[str, float]:
    ordered = sorted(latency_s)
    return {"p50_s": statistics.median(ordered), "p99_s": ordered[len(ordered) * 99 // 100]}


# The driver beside the standard library.

LOOK_AT_EACH = "for event in {}: event.ident, event.data"


def compare(kernel: pykq.Kernel) -> dict[str, dict[str, float]]:
    """What pykq does, and the same without it: medians over the rounds, in seconds, and their ratio."""
    pairs: list[tuple[str, str]] = []
    names: dict[str, Any] = {"ioctl": kernel.plain_ioctl, "KQUEUE_TICKLE": pykq.KQUEUE_TICKLE}
    with contextlib.ExitStack() as stack:
        kq = names["kq"] = stack.enter_context(pykq.Kqueue(kernel))
        names["fd"] = kq.ident
        names["buffer"] = kq.buffer(EVENTS)
        if kernel.has_tickle:
            pairs += [("kq.tickle()", "ioctl(fd, KQUEUE_TICKLE)")]
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
            pairs += [(f"kq.{call}", empty) for call in (into, into_list)]
            theirs = LOOK_AT_EACH.format(full)
            pairs += [(LOOK_AT_EACH.format(f"busy.{call}"), theirs) for call in (into, into_list)]
        results = {}
        for pair in pairs:
            timers = [timeit.Timer(statement, globals=names) for statement in pair]
            seconds = [[timer.timeit(CALLS) / CALLS for timer in timers] for _ in range(ROUNDS)]
            ours, others = map(statistics.median, zip(*seconds, strict=True))
            results[" : ".join(pair)] = _ratio(ours, others)
    return results | (compare_loops(kernel) if kernel.shares_descriptors else {})


def _ratio(ours_s: float, theirs_s: float) -> dict[str, float]:
    return {"pykq_s": ours_s, "other_s": theirs_s, "ratio": ours_s / theirs_s}


def compare_loops(kernel: pykq.Kernel) -> dict[str, dict[str, float]]:
    """``call_soon_threadsafe``, the event loop of pykq.aio beside asyncio's own."""
    in_a_row: tuple[list[float], list[float]] = [], []
    latency_s: tuple[list[float], list[float]] = [], []
    loops: list[Callable[[], asyncio.AbstractEventLoop]]
    loops = [lambda: aio.TickleEventLoop(kernel), asyncio.SelectorEventLoop]
    for _ in range(ROUNDS):
        for which, factory in enumerate(loops):
            with asyncio.Runner(loop_factory=factory) as runner:
                in_a_row[which].append(runner.run(_calls_in_a_row()))
                latency_s[which].extend(runner.run(_calls_one_by_one()))
    ours, theirs = map(_percentiles, latency_s)
    return {
        "call_soon_threadsafe, in a row : asyncio": _ratio(*map(statistics.median, in_a_row)),
        "call_soon_threadsafe, latency p50 : asyncio": _ratio(ours["p50_s"], theirs["p50_s"]),
        "call_soon_threadsafe, latency p99 : asyncio": _ratio(ours["p99_s"], theirs["p99_s"]),
    }


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
        for _ in range(WAKE_UPS):
            time.sleep(0.0005)  # so that the loop mostly sleeps
            loop.call_soon_threadsafe(make, time.perf_counter())
            made.acquire()
        loop.call_soon_threadsafe(done.set)

    thread = threading.Thread(target=send)
    thread.start()
    await done.wait()
    thread.join()
    return latency_s


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pykq.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    arguments = parser.parse_args()
    try:
        kernel = pykq.load_kernel()
    except pykq.KernelUnavailable as error:
        print(f"pykq.bench: {error}", file=sys.stderr)
        return 1
    results = {name: summary(way) for name, way in measure(kernel).items()}
    driver = compare(kernel)
    if arguments.json:
        facts = {"kernel": kernel.name, "rounds": ROUNDS, "results": results, "driver": driver}
        print(json.dumps(facts, indent=1))
        return 0
    print(f"{kernel.name}; {ROUNDS} rounds, medians, microseconds; each includes one reading of the clock")
    print(f"{'':16}{'send':>10}{'wake p50':>10}{'wake p99':>10}")
    for name, numbers in results.items():
        cells = [f"{1e6 * numbers[key]:10.1f}" if key in numbers else f"{'':10}" for key in
                 ("send_s", "wake_p50_s", "wake_p99_s")]
        print(f"{name:16}{''.join(cells)}")
    print(f"\n{'pykq':>10}{'other':>10}{'ratio':>10}   pykq : other")
    for name, numbers in driver.items():
        ours, theirs = 1e6 * numbers["pykq_s"], 1e6 * numbers["other_s"]
        print(f"{ours:10.1f}{theirs:10.1f}{numbers['ratio']:10.2f}   {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
