"""``python -m pykq.bench``: what a tickle costs, beside its rivals, in one run on one kernel.

Every round measures each of them once, so that a disturbance meets them all alike; the figures are medians
over the rounds. ``--json`` prints them for programs, in seconds.
"""

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pykq
from pykq import EV, EVFILT, Kevent, NoteUser
from pykq._abi import io

FIOCLEX = io("f", 1)  # sys/filio.h: the least that an ioctl can do

ROUNDS = 20
CALLS = 1000  # of one kind in a round
WAKE_UPS = 100  # of one kind in a round


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
        floor = Figures("ioctl FIOCLEX", lambda: kernel.plain_ioctl(kq.ident, FIOCLEX), bool, bool)
        waiter = Waiter(kq)
        for _ in range(ROUNDS):
            for way in [floor, *ways]:
                way.cost_s.append(_cost(way))
            kq.kevent(timeout=0)  # a tickle is left over from its cost
            for way in ways:
                way.latency_s += [waiter.wake(way) for _ in range(WAKE_UPS)]
        kernel.close(reader)
        kernel.close(writer)
    return {way.name: way for way in [floor, *ways]}


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
        ordered = sorted(figures.latency_s)
        numbers |= {"wake_p50_s": statistics.median(ordered), "wake_p99_s": ordered[len(ordered) * 99 // 100]}
    return numbers


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
    if arguments.json:
        print(json.dumps({"kernel": kernel.name, "rounds": ROUNDS, "results": results}, indent=1))
        return 0
    print(f"{kernel.name}; {ROUNDS} rounds, medians, microseconds; each includes one reading of the clock")
    print(f"{'':16}{'send':>10}{'wake p50':>10}{'wake p99':>10}")
    for name, numbers in results.items():
        cells = [f"{1e6 * numbers[key]:10.1f}" if key in numbers else f"{'':10}" for key in
                 ("send_s", "wake_p50_s", "wake_p99_s")]
        print(f"{name:16}{''.join(cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
