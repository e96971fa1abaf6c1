"""The kqueue object, its changes and events, and what a tickle is to the thread that waits."""

import contextlib
import ctypes
import errno
import io
import math
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, NoReturn, Protocol, Self, SupportsIndex, overload

from pykq._abi import KQUEUE_TICKLE, POLL, TIMESPEC, Abi, KeventFields
from pykq._constants import EV, EVFILT
from pykq._kernel import Kernel, TickleNotSupported, load_kernel

# The package ctypes-callable asks CPython itself; on other interpreters the builtin serves.
try:
    from ctypes_callable import callable
except (ImportError, AttributeError):
    from builtins import callable

_MAX_EVENTS = 1 << 20  # more in one wait is a mistake: the buffer alone would be 72 MB
_FOREVER_S = 1e8  # three years: a longer wait is one without end


class Tickled(InterruptedError):
    """Someone called ``tickle()``: the wait ended without an event. ``errno`` is ``EINTR``.

    The changes given with the wait have been applied: do not give them again.
    """


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class _Fields(NamedTuple):
    ident: int
    filter: int
    flags: int
    fflags: int
    data: int
    udata: int


class Kevent(KeventFields, _Fields):
    """A change to give to a kqueue, or an event got from it: ``struct kevent``, a tuple of six numbers.

    Args:
        ident: what to watch: a descriptor or an object that has one; for other filters a number (see
            ``EVFILT``).
        filter: what to watch it for.
        flags: what to do (``EV.ADD`` and so on); in an event, what is to be known of it.
        fflags: the filter's own flags (``NoteVnode`` and so on).
        data: the filter's own number, signed, 64 bits.
        udata: a number of yours, as wide as a pointer, that comes back with each event.
    """

    __slots__ = ()

    def __new__(
        cls,
        ident: int | HasFileno,
        filter: int = EVFILT.READ,
        flags: int = EV.ADD,
        fflags: int = 0,
        data: int = 0,
        udata: int = 0,
    ) -> Self:
        if isinstance(ident, Kqueue):
            ident = ident.ident
        elif not isinstance(ident, int):
            ident = ident.fileno()
        return super().__new__(cls, ident, filter, flags, fflags, data, udata)


_kevent_from = partial(tuple.__new__, Kevent)  # not through __new__: the kernel's numbers need no checks


class Events(Sequence[KeventFields]):
    """A buffer for the events of one wait, from ``Kqueue.buffer``, to use again and again.

    Its events are views of the C array that the kernel writes, made once: they have the attributes of a
    ``Kevent``, and change with the next wait into the buffer.
    """

    __slots__ = ("_array", "_bytes", "_capacity", "_codec", "_count", "_reference", "_views")

    def __init__(self, abi: Abi, max_events: int) -> None:
        if not 0 <= max_events <= _MAX_EVENTS:
            raise ValueError(f"max_events must be 0 to {_MAX_EVENTS}, not {max_events}")
        self._capacity = max_events
        self._array = (abi.kevent * max_events)()
        self._reference = ctypes.byref(self._array)
        self._bytes = memoryview(self._array).cast("B")
        self._codec = abi.codec
        self._views: list[KeventFields] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[KeventFields]:
        return iter(self[:])

    @overload
    def __getitem__(self, index: SupportsIndex) -> KeventFields: ...
    @overload
    def __getitem__(self, index: slice) -> list[KeventFields]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> KeventFields | list[KeventFields]:
        if not self._views:
            self._views = list(self._array)
        return self._views[: self._count][index]

    def copy(self) -> list[Kevent]:
        """The events as objects of their own."""
        filled = self._bytes[: self._count * self._codec.size]
        return list(map(_kevent_from, self._codec.iter_unpack(filled)))

    def __repr__(self) -> str:
        return f"Events({self.copy()})"


def _nanoseconds(timeout: float) -> int | None:
    """A timeout in nanoseconds, rounded up so that a short wait is no look; None for one without end."""
    if not timeout > 0:  # so that NaN is caught as well
        raise ValueError(f"timeout must be None or seconds from 0 up, not {timeout!r}")
    return math.ceil(timeout * 1e9) if timeout <= _FOREVER_S else None


class Kqueue:
    """A kqueue: a kernel object that watches many things, and ``kevent`` to wait for what happens to them.

    Any number of threads may use one at the same time. In a ``with`` block it is closed at the end. It is not
    inherited by a child process: after ``fork`` the object raises ``ValueError`` there.

    Args:
        kernel: the kernel to open it in, as for ``load_kernel``.
        on_tickle: called without arguments when a tickle ends a wait, in the thread that waited;
            ``kevent`` then returns no events. Without it ``kevent`` raises ``Tickled``.

    Raises:
        KernelUnavailable: there is no such kernel.
        OSError: ``EMFILE``, ``ENFILE``: too many descriptors are open.
    """

    def __init__(
        self,
        kernel: Kernel | str | os.PathLike[str] | None = None,
        *,
        on_tickle: Callable[[], object] | None = None,
    ) -> None:
        self._prepare(load_kernel(kernel), on_tickle)
        self._own(self.kernel.kqueue())

    @classmethod
    def from_fd(
        cls,
        fd: int,
        kernel: Kernel | str | os.PathLike[str] | None = None,
        *,
        on_tickle: Callable[[], object] | None = None,
    ) -> Self:
        """Take over an open kqueue by its descriptor, and close it in the end. ``EBADF`` when it is none."""
        self = cls.__new__(cls)
        self._prepare(load_kernel(kernel), on_tickle)
        # With no room for events kevent does not scan: this says that fd is a kqueue, and consumes no tickle.
        if not 0 <= fd < 1 << 31:  # which ctypes would cut down to a C int
            raise OSError(errno.EBADF, f"kevent: {os.strerror(errno.EBADF)}")
        if self._kevent(fd, None, 0, None, 0, POLL) < 0:
            raise self.kernel.error("kevent")
        self._own(fd)
        return self

    _fd = -1  # until it owns a descriptor, and when it no longer does

    def _prepare(self, kernel: Kernel, on_tickle: Callable[[], object] | None) -> None:
        if on_tickle is not None and not callable(on_tickle):
            raise TypeError(f"on_tickle must be callable, not {on_tickle!r}")
        #: The kernel it lives in.
        self.kernel = kernel
        self._on_tickle = on_tickle
        self._tickled = False
        self._kevent: Callable[..., int] = kernel.kevent
        self._ioctl: Callable[[int, int], object] = kernel.plain_ioctl
        self._look: Callable[..., int] = kernel.look
        self._codec = kernel.abi.codec
        self._spare: list[Events] = []
        self._closed_text = ""

    def _own(self, fd: int) -> None:
        self._fd = fd
        self._to_close = [fd]
        self.kernel.kqueues[fd] = self

    @overload
    def kevent(
        self, changes: Iterable[Kevent] | None = ..., max_events: int = ..., timeout: float | None = ...
    ) -> list[Kevent]: ...
    @overload
    def kevent(
        self, changes: Iterable[Kevent] | None = ..., *, timeout: float | None = ..., into: Events
    ) -> Events: ...
    def kevent(
        self,
        changes: Iterable[Kevent] | None = (),
        max_events: int = 64,
        timeout: float | None = None,
        *,
        into: Events | None = None,
    ) -> list[Kevent] | Events:
        """Apply ``changes``, then wait for events. The arguments are in ``select.kqueue.control``'s order.

        Args:
            changes: what to watch from now on. A change that fails is reported as an event with ``EV.ERROR``,
                whose ``data`` is NetBSD's errno number; with ``max_events`` 0 it raises ``OSError``.
            max_events: the most events to return; 0 applies the changes and does not wait.
            timeout: seconds, rounded up to a nanosecond; None waits for ever, and so do more than 10**8
                seconds or infinity; 0 looks and does not wait.
            into: a ``buffer()`` to fill and return, which ``max_events`` does not change. For a fast loop: a
                wait allocates nothing, and no object is made for an event. One thread at a time.

        Returns:
            The events; none when the time is over.

        Raises:
            Tickled: ``tickle()`` was called and no event was there. The wait consumes all tickles before it,
                whatever it returns or raises. A tickle may be reported once too often, never not at all.
            ValueError: a bad argument, or the kqueue is closed, be it during the wait.
            OSError: from the kernel.

        A signal does not end the wait: Python's handlers run, in the main thread, and when they do not raise
        the wait goes on with the time that remains. The GIL is released while it lasts.
        """
        if into is None:
            try:
                events = self._spare.pop()
            except IndexError:
                events = self.buffer(max_events)
            if events._capacity != max_events:
                events = self.buffer(max_events)
        elif into._codec is self._codec:
            events = into
        else:
            raise ValueError("the buffer belongs to a kqueue of a kernel with another struct kevent")
        try:
            count = -1
            if timeout == 0 and not changes:
                look = self._look  # calling self._look(...) takes longer, in CPython 3.11
                count = look(self._fd, None, 0, events._reference, events._capacity, POLL)
            if count < 0:  # to be waited for; or the look failed, and this will raise what it failed for
                count = self._wait(changes, events, timeout)
            events._count = count
            if into is not None:
                return into
            return events.copy() if count else []
        finally:
            if into is None:
                self._spare.append(events)

    def _wait(self, changes: Iterable[Kevent] | None, events: Events, timeout: float | None) -> int:
        """The number of events, when they are there or the time is over."""
        events._count = 0  # should this raise
        changelist, nchanges = self._pack(changes) if changes else (None, 0)
        timespec, deadline_ns = None, None
        if timeout == 0:
            timespec, deadline_ns = POLL, 0
        elif timeout is not None and (timeout_ns := _nanoseconds(timeout)) is not None:
            timespec = TIMESPEC.pack(*divmod(timeout_ns, 1_000_000_000))
            deadline_ns = time.monotonic_ns() + timeout_ns
        while True:
            count = self._kevent(
                self._fd, changelist, nchanges, events._reference, events._capacity, timespec
            )
            if count >= 0:
                return count
            if self._tickle_ended_it():
                return 0
            # It was a signal. Python runs its handlers between bytecodes: here, or when the loop jumps back.
            # The changes are not given again: the kernel registers them before it scans, and only the scan
            # sleeps (kevent1 in kern_event.c).
            changelist, nchanges = None, 0
            if deadline_ns is not None:
                left_ns = deadline_ns - time.monotonic_ns()
                if left_ns <= 0:
                    return 0
                timespec = TIMESPEC.pack(*divmod(left_ns, 1_000_000_000))

    def _tickle_ended_it(self) -> bool:
        """After kevent failed: True for a tickle that on_tickle has been told of, False for a signal.

        The kernel says EINTR for both. So ``tickle()`` sets ``_tickled``, and then the kernel's own flag by
        its ioctl. The kernel's flag is cleared by every return from kevent, ``_tickled`` only here. Say that
        ``tickle()`` begins at t0 and its ioctl is done at t1:

        * If a wait clears ``_tickled`` after t0, it reports this tickle, after t0.
        * Else ``_tickled`` is set, and from t1 on the kernel's flag is, too. The next return from kevent
          consumes that; it brings events, or nothing from a look (T2, T5), or it is EINTR and reported here.

        So no tickle is lost. One would be if events cleared ``_tickled``: coming between t0 and t1 they would
        take it away, and the EINTR that the ioctl causes after that would pass for a signal. The price is
        that a tickle which events consumed leaves ``_tickled`` set, and the next signal is reported as a
        tickle: once too often. An ioctl that did not come through pykq passes for a signal.
        """
        if ctypes.get_errno() != errno.EINTR or self._fd < 0:
            error = self.kernel.error("kevent")
            if self._fd < 0:
                raise ValueError(self._closed_text)
            if error.errno != errno.EINTR:
                raise error
        if not self._tickled:
            return False
        self._tickled = False
        if self._on_tickle is None:
            raise Tickled(errno.EINTR, "kevent: interrupted by a tickle")
        self._on_tickle()
        return True

    def tickle(self) -> None:
        """Interrupt one wait: a thread that sleeps in ``kevent``, or else the next that would sleep.

        Pending events win over it. From any thread, and from a signal handler.

        Raises:
            TickleNotSupported: the kernel has no KQUEUE_TICKLE.
            ValueError: the kqueue is closed.
        """
        self._tickled = True  # before the ioctl: see _tickle_ended_it
        ioctl = self._ioctl  # calling self._ioctl(...) takes longer, in CPython 3.11
        try:
            ioctl(self._fd, KQUEUE_TICKLE)
        except (OSError, ValueError) as error:
            self._tickled = False
            if self._fd < 0:
                raise ValueError(self._closed_text) from None
            raise _tickle_error(error, self.kernel) from None

    def buffer(self, max_events: int = 64) -> Events:
        """A buffer for ``kevent(into=...)``."""
        return Events(self.kernel.abi, max_events)

    @property
    def ident(self) -> int:
        """Its descriptor, as its own kernel knows it. On the running system this is ``fileno()``."""
        if self._fd < 0:
            raise ValueError(self._closed_text)
        return self._fd

    def fileno(self) -> int:
        """Its descriptor, for ``select``, ``os`` and other calls of the running system.

        Raises:
            io.UnsupportedOperation: it lives in a rump kernel, and the number would be another file's here.
            ValueError: it is closed.
        """
        if not self.kernel.shares_descriptors:
            raise io.UnsupportedOperation(
                "a rump kernel's descriptor means nothing to the running system: see ident"
            )
        return self.ident

    @property
    def closed(self) -> bool:
        """Whether it is closed, or was left behind by a fork."""
        return self._fd < 0

    def close(self) -> None:
        """Close it; a second time does nothing. A wait in another thread ends with ``ValueError``.

        Before NetBSD 10 the kernel's close waits for the threads asleep on the kqueue to return: one of
        them does at once, with KQUEUE_TICKLE; any others only when an event or their timeout comes.
        """
        try:
            fd = self._to_close.pop()  # once, whoever calls: threads, signal handlers, __del__
        except IndexError:
            return
        self._refuse("I/O operation on closed kqueue object")
        if self.kernel.kqueues.get(fd) is self:
            del self.kernel.kqueues[fd]
        with contextlib.suppress(OSError):  # most kernels have none
            self.kernel.plain_ioctl(fd, KQUEUE_TICKLE)
        self.kernel.close(fd)

    def _forget(self) -> None:
        self._to_close.clear()
        self._refuse("this kqueue stayed with the parent process: fork hands none down")

    def _refuse(self, why: str) -> None:
        """From now on raise ValueError, without a call: the number may become another file's."""

        def refuse(*_: object) -> NoReturn:
            raise ValueError(why)

        self._closed_text = why
        self._fd = -1
        self._kevent = self._look = self._ioctl = refuse

    def _pack(self, changes: Iterable[Kevent]) -> tuple[bytes, int]:
        packed = []
        for change in changes:
            if not isinstance(change, Kevent):
                raise TypeError(f"changes must be Kevent objects, not {change!r}")
            try:
                packed.append(self._codec.pack(*change))
            except struct.error as error:
                raise ValueError(f"{change!r} does not fit struct kevent: {error}") from None
        return b"".join(packed), len(packed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:  # it came to own one
            self.close()

    def __repr__(self) -> str:
        return f"<Kqueue {'closed' if self.closed else self._fd} on {self.kernel.name}>"


def tickle(kqueue: Kqueue | HasFileno | int) -> None:
    """Interrupt one wait on a kqueue, given as a ``Kqueue``, a ``select.kqueue`` or a descriptor.

    A wait by ``Kqueue.kevent`` on that descriptor raises ``Tickled``. ``select.kqueue.control`` swallows
    it: it starts again after ``EINTR`` (PEP 475). A descriptor is one of the running system.

    Raises:
        TickleNotSupported: the kernel has no KQUEUE_TICKLE.
        OSError: ``EBADF`` or another: it is no kqueue.
        KernelUnavailable: a descriptor is given, and the running system has no kqueue.
    """
    if isinstance(kqueue, Kqueue):
        return kqueue.tickle()
    kernel = load_kernel("system")
    fd = kqueue if isinstance(kqueue, int) else kqueue.fileno()
    known = kernel.kqueues.get(fd)
    if known is not None:
        return known.tickle()
    try:
        kernel.plain_ioctl(fd, KQUEUE_TICKLE)
    except OSError as error:
        raise _tickle_error(error, kernel) from None


def _tickle_error(error: Exception, kernel: Kernel) -> Exception:
    if not isinstance(error, OSError):
        return error
    if error.errno == errno.ENOTTY:
        return TickleNotSupported(errno.ENOTTY, f"this kernel has no KQUEUE_TICKLE: {kernel.name}")
    return OSError(error.errno, f"ioctl(KQUEUE_TICKLE): {os.strerror(error.errno or 0)}")
