"""``python -m pykq.demo``: a kevent is interrupted while you watch. Exit status 1: there is no kqueue."""

import argparse
import select
import statistics
import sys
import threading
import time
from collections.abc import Callable

import pykq

PAUSE_S = 0.5  # for the reader to follow; no result depends on it
ROUNDS = 100


def interrupt_a_wait(kernel: pykq.Kernel, mechanism: pykq.Mechanism) -> None:
    print("1. A wait is interrupted")
    with pykq.Kqueue(kernel, mechanism=mechanism) as kq:
        reader, writer = kernel.pipe()
        kq.kevent([pykq.Kevent(reader)], 0)
        returned = Waiter(lambda: kq.kevent())
        print("   A thread sleeps in kevent. It watches a pipe, and it has no timeout:")
        print("   so far, only a byte in the pipe, or a signal, could wake it.")
        time.sleep(PAUSE_S)
        print(f"   {PAUSE_S} s have passed, and it sleeps. Now another thread tickles the kqueue ...")
        sent = time.perf_counter()
        kq.tickle()
        outcome = returned.result()
        print(f"   ... and {1e6 * (returned.at - sent):.0f} us later kevent is back: {outcome}.")
        if mechanism == pykq.Mechanism.TICKLE:
            print("   The pipe is as empty as before: no byte was sent, no signal, no event.")
        else:
            print(f"   The pipe is as empty as before. What happened is a hidden event: {mechanism}.")
        latencies_us = [1e6 * wake_up(kq) for _ in range(ROUNDS)]
        median = statistics.median(latencies_us)
        print(f"   The same {ROUNDS} times: median {median:.0f} us, the slowest {max(latencies_us):.0f} us.")
        kernel.close(reader)
        kernel.close(writer)


def wake_up(kq: pykq.Kqueue) -> float:
    """Seconds from the tickle to the return of a wait in another thread."""
    waiter = Waiter(lambda: kq.kevent())
    time.sleep(0.0005)  # so that it mostly sleeps; if it does not yet, the tickle waits for it
    sent = time.perf_counter()
    kq.tickle()
    waiter.result()
    return waiter.at - sent


def let_events_win(kernel: pykq.Kernel, mechanism: pykq.Mechanism) -> None:
    print("2. Pending events win")
    with pykq.Kqueue(kernel, mechanism=mechanism) as kq:
        reader, writer = kernel.pipe()
        kq.kevent([pykq.Kevent(reader)], 0)
        kernel.write(writer, b"!")
        kq.tickle()
        print("   Nobody waits. A byte goes into the pipe, and after it a tickle. Now someone waits:")
        print(f"   kevent returns {kq.kevent()}.")
        print("   The event, not the tickle: a program that has work to do is not told to wake up.")
        kernel.read(reader, 1)
        outcome = Waiter(lambda: kq.kevent(timeout=0.1)).result()
        print(f"   And that return used the tickle up: with the byte read, a wait of 0.1 s gets {outcome}.")
        kernel.close(reader)
        kernel.close(writer)


def swallow_it(kernel: pykq.Kernel) -> None:
    print("3. select.kqueue swallows a tickle")
    if not kernel.shares_descriptors:
        print("   Left out: Python's select.kqueue asks the running system, and this is a rump kernel.")
        return
    if not kernel.has_tickle:
        print("   Left out: this kernel has no KQUEUE_TICKLE to be swallowed.")
        return
    kq = select.kqueue()  # type: ignore[attr-defined,unused-ignore]  # Linux has none
    start = time.perf_counter()
    waiter = Waiter(lambda: kq.control(None, 1, 1.0))
    print("   A thread waits in select.kqueue().control(None, 1, 1.0): one second at the most.")
    time.sleep(0.3)
    pykq.tickle(kq)
    print(f"   It is tickled {time.perf_counter() - start:.1f} s later ...")
    print(
        f"   ... and returns {waiter.result()} after {waiter.at - start:.1f} s. Its kevent was interrupted,"
    )
    print("   but Python started it again, as it does after EINTR (PEP 475).")
    print("   That is why pykq calls kevent itself.")
    kq.close()


class Waiter:
    """A thread that makes one blocking call."""

    at: float  # time.perf_counter() when the call returned

    def __init__(self, call: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            outcome: object = call()
        except Exception as error:
            outcome = error
        self.at = time.perf_counter()
        self._outcome = outcome

    def result(self) -> str:
        """What the call returned or raised."""
        self._thread.join()
        return repr(self._outcome)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pykq.demo", description="Interrupt a kevent and watch.")
    parser.add_argument("--kernel", help="system, rump or a directory (default: $PYKQ_KERNEL)")
    parser.add_argument("--mechanism", help=f"{', '.join(pykq.Mechanism)} (default: the best there is)")
    options = parser.parse_args(args)
    try:
        kernel = pykq.load_kernel(options.kernel)
        with pykq.Kqueue(kernel, mechanism=options.mechanism) as kq:
            mechanism = kq.mechanism
    except (pykq.KernelUnavailable, OSError, ValueError) as error:
        print(f"pykq.demo: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    print(f"Kernel:    {kernel.name}")
    if mechanism == pykq.Mechanism.TICKLE:
        print("Mechanism: the ioctl KQUEUE_TICKLE\n")
    else:
        has = "has KQUEUE_TICKLE, too" if kernel.has_tickle else "has no KQUEUE_TICKLE"
        print(f"Mechanism: {mechanism}, not the ioctl (this kernel {has})\n")
    interrupt_a_wait(kernel, mechanism)
    print()
    let_events_win(kernel, mechanism)
    print()
    swallow_it(kernel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
