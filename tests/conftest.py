"""What the tests of a kernel share: the kernel, its bare kevent, and threads that wait.

The kernel is the one that ``PYKQ_KERNEL`` names (default: the running system), and the same tests run on
all of them, stock or patched. ``PYKQ_EXPECT=stock|patched`` says which it has to be; without it the
kernel is asked. Tests say what a patched kernel does through ``interrupted`` and ``patience``; on a stock
kernel the same tests see that ``tickle`` answers ENOTTY, and that a wait goes on to its timeout.
"""

import ctypes
import errno
import faulthandler
import os
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pykq
from pykq._abi import TIMESPEC

HANG_S = 30.0  # no wait that is about to end takes so long, on the slowest emulated guest

EINTR = "EINTR"  # what Waiter.outcome says of a wait that the kernel interrupted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stress: races thousands of times; invoke test --quick leaves it out")


@pytest.fixture(scope="session")
def kernel(record_testsuite_property: Callable[[str, object], None]) -> pykq.Kernel:
    try:
        kernel = pykq.load_kernel()
    except pykq.KernelUnavailable as error:
        if "PYKQ_KERNEL" in os.environ or "PYKQ_EXPECT" in os.environ:
            raise
        pytest.skip(f"PYKQ_KERNEL names no kernel, and {error}")
    record_testsuite_property("kernel", kernel.name)
    return kernel


@pytest.fixture(scope="session")
def tickling(kernel: pykq.Kernel) -> bool:
    """Whether the kernel has KQUEUE_TICKLE, which has to be as the runner says."""
    expected = os.environ.get("PYKQ_EXPECT")
    assert expected in (None, "patched", "stock"), f"PYKQ_EXPECT={expected}: it is patched or stock"
    if expected is not None:
        assert kernel.has_tickle == (expected == "patched"), f"{kernel.name} is not a {expected} kernel"
    return kernel.has_tickle


@pytest.fixture(scope="session")
def short_s() -> float:
    """A timeout that is to pass. Four of them are long enough to see the thread asleep before."""
    return 0.05


@pytest.fixture(params=list(pykq.Mechanism))
def mechanism(request: pytest.FixtureRequest, kernel: pykq.Kernel, tickling: bool) -> pykq.Mechanism:
    """Each mechanism that the kernel has."""
    chosen = pykq.Mechanism(request.param)
    if not kernel.offers(chosen):
        pytest.skip(f"this kernel has no {chosen}")
    return chosen


@pytest.fixture
def interrupted(tickling: bool) -> str | list[pykq.Kevent]:
    """What a wait with ``patience`` comes to when it has been tickled and nothing else happens."""
    return EINTR if tickling else []


@pytest.fixture
def patience(tickling: bool, short_s: float) -> float | None:
    """The timeout of a wait that a tickle is to end: none, or on a stock kernel a short one."""
    return None if tickling else short_s


@pytest.fixture
def tickle(tickling: bool) -> Callable[[pykq.Kqueue], None]:
    """The bare ioctl: no part of pykq but its number. A stock kernel has to answer ENOTTY."""

    def tickle(kq: pykq.Kqueue) -> None:
        if tickling:
            kq.kernel.plain_ioctl(kq.ident, pykq.KQUEUE_TICKLE)
            return
        with pytest.raises(OSError) as caught:
            kq.kernel.plain_ioctl(kq.ident, pykq.KQUEUE_TICKLE)
        assert caught.value.errno == errno.ENOTTY

    return tickle


@pytest.fixture
def until_closed(kernel: pykq.Kernel) -> float | None:
    """The timeout of a wait whose descriptor is closed: before NetBSD 10 the kernel's close waits for it."""
    release = re.search(r"NetBSD (\d+)", kernel.name)
    return 2.0 if release and int(release[1]) < 10 else None


@pytest.fixture
def kq(kernel: pykq.Kernel, watchdog: None) -> Iterator[pykq.Kqueue]:
    with pykq.Kqueue(kernel) as kq:
        yield kq


@pytest.fixture
def pipe(kernel: pykq.Kernel) -> Iterator[tuple[int, int]]:
    """A pipe of the kernel under test: reader, writer."""
    fds = kernel.pipe()
    yield fds
    for fd in fds:
        kernel.close(fd)


@pytest.fixture(scope="session")
def real_stderr(pytestconfig: pytest.Config) -> int:
    """A descriptor of stderr as it is outside of a test, where pytest puts something else in its place."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        return os.dup(2)


@pytest.fixture
def watchdog(real_stderr: int) -> Iterator[None]:
    """End the process, with all its stacks, when a test hangs where Python cannot interrupt it."""
    faulthandler.dump_traceback_later(4 * HANG_S, exit=True, file=real_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def signal_mask() -> Iterator[None]:
    """libkqueue blocks a signal that it watches (EVFILT_SIGNAL), and leaves it so: not for the next test."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def raw() -> Callable[..., list[pykq.Kevent]]:
    return raw_kevent


def raw_kevent(
    kq: pykq.Kqueue, changes: Iterable[pykq.Kevent] = (), max_events: int = 8, timeout: float | None = None
) -> list[pykq.Kevent]:
    """``kevent`` as the kernel does it: once, and InterruptedError for its EINTR, whatever that came from."""
    events = kq.buffer(max_events)
    changelist, nchanges = kq._pack(changes)
    timespec = None if timeout is None else TIMESPEC.pack(*divmod(round(timeout * 1e9), 10**9))
    kernel = kq.kernel
    count = kernel.kevent(kq.ident, changelist, nchanges, events._reference, max_events, timespec)
    if count < 0:
        raise kernel.error("kevent")
    events._count = count
    return events.copy()


class Waiter:
    """A thread that makes one blocking call. ``took_s`` is how long, when it has returned."""

    took_s: float

    def __init__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._thread = threading.Thread(target=self._run, args=(call, args, kwargs), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        start = time.monotonic()
        try:
            self._outcome = call(*args, **kwargs)
        except InterruptedError as error:
            self._outcome = EINTR if type(error) is InterruptedError else error
        except Exception as error:
            self._outcome = error
        self.took_s = time.monotonic() - start

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def outcome(self) -> Any:
        """What the call returned, EINTR, or the exception it raised."""
        self._thread.join(HANG_S)
        assert not self.waits, f"still waiting after {HANG_S} s"
        return self._outcome

    def fall_asleep(self) -> "Waiter":
        """Return when the thread sleeps in kevent."""
        Waiter.all_asleep([self])
        return self

    @staticmethod
    def all_asleep(waiters: "Iterable[Waiter]") -> None:
        """Return when the threads sleep in kevent, all at the same time."""
        deadline = time.monotonic() + HANG_S
        while not _sleep_in_kevent({one._thread.native_id for one in waiters}):
            assert all(one.waits for one in waiters), "a thread did not wait"
            assert time.monotonic() < deadline, f"not asleep in kevent after {HANG_S} s"
            time.sleep(0.001)


@pytest.fixture
def waiter(watchdog: None) -> type[Waiter]:
    return Waiter


@pytest.fixture
def once_asleep(watchdog: None) -> Iterator[Callable[[Callable[[], object]], None]]:
    """``once_asleep(action)``: another thread does it when the main thread sleeps in kevent."""
    threads = []
    main_thread = threading.get_native_id()
    over = threading.Event()

    def run(action: Callable[[], object]) -> None:
        while not over.is_set():
            if _sleep_in_kevent({main_thread}):
                action()
                return
            time.sleep(0.001)

    def once_asleep(action: Callable[[], object]) -> None:
        threads.append(threading.Thread(target=run, args=(action,)))
        threads[-1].start()

    yield once_asleep
    over.set()
    for thread in threads:
        thread.join(HANG_S)


# sysctl(3), kern.lwp: of struct kinfo_lwp (sys/sysctl.h) the identifier, and what the thread sleeps on.
_CTL_KERN, _KERN_LWP = 1, 64
_LWP = struct.Struct("32xi28x8s")
_LWPS = 64  # of one process, at most


def _sleep_in_kevent(thread_ids: set[int | None]) -> bool:
    """Whether these threads sleep in the kernel under test. NetBSD says what a thread sleeps on.

    With a rump kernel that is any lock of the host's. A thread that wants the GIL sleeps on one, too, but
    wakes up every 5 ms (sys.getswitchinterval) to ask for it; so one that has slept through 20 ms is in
    kevent.
    """
    if sys.platform.startswith("netbsd"):
        lwps, size = ctypes.create_string_buffer(_LWPS * _LWP.size), ctypes.c_size_t(_LWPS * _LWP.size)
        mib = (ctypes.c_int * 5)(_CTL_KERN, _KERN_LWP, os.getpid(), _LWP.size, _LWPS)
        assert ctypes.CDLL(None).sysctl(mib, 5, lwps, ctypes.byref(size), None, ctypes.c_size_t(0)) == 0
        sleeps_on = dict(_LWP.iter_unpack(lwps.raw[: size.value]))
        return all(sleeps_on.get(one, b"").rstrip(b"\0") == b"kqueue" for one in thread_ids)
    before = [_sleep_of(one) for one in thread_ids]
    time.sleep(0.02)
    return None not in before and before == [_sleep_of(one) for one in thread_ids]


def _sleep_of(thread_id: int | None) -> str | None:
    """For a sleeping thread of this process, how often it has gone to sleep (proc(5))."""
    try:
        text = Path(f"/proc/self/task/{thread_id}/status").read_text()
    except FileNotFoundError:
        return None
    status = dict(line.split(":\t", 1) for line in text.splitlines())
    return status["voluntary_ctxt_switches"] if status["State"].startswith("S") else None
