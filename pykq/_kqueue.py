"""The kqueue object, and what a tickle is to the thread that waits."""

import contextlib
import ctypes
import errno
import io
import math
import operator
import os
import struct
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from threading import get_ident
from types import TracebackType
from typing import NoReturn, Self, overload

from pykq._abi import (
    KFILTER_BYFILTER,
    KFILTER_BYNAME,
    KFILTER_MAXNAME,
    KQUEUE_TICKLE,
    POLL,
    TIMESPEC,
    KfilterMapping,
)
from pykq._callable import callable
from pykq._events import Events, HasFileno, HasIdent, Kevent, descriptor
from pykq._kernel import Kernel, TickleNotSupported, load_kernel
from pykq._mechanism import WAKERS, Mechanism, Waker

_FOREVER_S = 1e8  # three years: a longer wait is one without end
_CLOSE_S = 5.0  # the longest that close() waits for other threads


class Tickled(InterruptedError):
    """Someone called ``tickle()``: the wait ended without an event. ``errno`` is ``EINTR``.

    The changes given with the wait have been applied: do not give them again.
    """


def _nanoseconds(timeout: float) -> int | None:
    """A timeout in nanoseconds, rounded up so that a short wait is no look; None for one without end."""
    if not timeout > 0:  # so that NaN is caught as well
        raise ValueError(f"timeout must be None or seconds from 0 up, not {timeout!r}")
    return math.ceil(timeout * 1e9) if timeout <= _FOREVER_S else None


def _timespec(nanoseconds: int) -> bytes:
    return TIMESPEC.pack(*divmod(nanoseconds, 1_000_000_000))


class Kqueue(HasIdent):
    """A kqueue: a kernel object that watches many things, and ``kevent`` to wait for what happens to them.

    Any number of threads may use one at the same time. In a ``with`` block it is closed at the end; else with
    the object, which a thread in ``kevent`` keeps alive, or when the process ends: a daemon thread in
    ``kevent`` does not hold that up. It is not inherited by a child process: after ``fork`` the object raises
    ``ValueError`` there, and ``exec`` closes the descriptor.

    Args:
        kernel: the kernel to open it in, as for ``load_kernel``.
        mechanism: what ``tickle`` uses, a ``Mechanism`` or its value; None means what ``PYKQ_MECHANISM`` in
            the environment says, or else the best that the kernel has.
        on_tickle: called without arguments when a tickle ends a wait, in the thread that waited;
            ``kevent`` then returns no events. Without it ``kevent`` raises ``Tickled``.

    Raises:
        KernelUnavailable: there is no such kernel.
        TickleNotSupported: the mechanism is KQUEUE_TICKLE, and the kernel has none.
        ValueError: there is no mechanism of that name.
        OSError: ``EMFILE``, ``ENFILE``: too many descriptors are open; ``EINVAL``: the mechanism is
            EVFILT_USER, and the kernel has none.

    **Without KQUEUE_TICKLE** a hidden event stands in for the kernel's flag, and what is promised of a
    tickle (T1 to T8 in the README) holds but for these:

    * T2: when events fill the whole buffer while another thread is inside ``tickle``, its tickle may not be
      consumed by that return, and is reported by a later wait: once too often.
    * T7: EVFILT_USER wakes one of the threads asleep, and that one returns.
    * T8: the hidden event makes the descriptor readable, for ``select`` and for another kqueue.

    With EVFILT_USER the ident 0x70796B71 ("pykq" in ASCII) is taken: it is that of the hidden event.

    **Several threads in a wait** on one kqueue: one tickle brings one of them back, and which one is the
    kernel's choice. So let any of them do what a tickle announces, or give each a kqueue of its own. And a
    thread that looks with a zero timeout consumes tickles without being told (T5): where one thread sleeps
    and another looks, keep what is announced in a place that both look at.
    """

    def __init__(
        self,
        kernel: Kernel | str | os.PathLike[str] | None = None,
        *,
        mechanism: Mechanism | str | None = None,
        on_tickle: Callable[[], object] | None = None,
    ) -> None:
        self._prepare(load_kernel(kernel), mechanism, on_tickle)
        fd = self.kernel.kqueue()
        try:
            self._own(fd)
        except BaseException:
            if self._fd < 0:  # else the object owns it already, and closes it
                self.kernel.close(fd)
            raise

    @classmethod
    def from_fd(
        cls,
        fd: int,
        kernel: Kernel | str | os.PathLike[str] | None = None,
        *,
        mechanism: Mechanism | str | None = None,
        on_tickle: Callable[[], object] | None = None,
    ) -> Self:
        """Take over an open kqueue by its descriptor, and close it in the end. ``EBADF`` when it is none.

        A hidden event would be an event like any other to code that goes on using the descriptor itself.
        """
        self = cls.__new__(cls)
        self._prepare(load_kernel(kernel), mechanism, on_tickle)
        # With no room for events kevent does not scan: this says that fd is a kqueue, and consumes no tickle.
        if self._kevent(_checked(fd, "kevent"), None, 0, None, 0, POLL) < 0:
            raise _bad_descriptor("kevent")
        self._own(fd)
        return self

    _fd = -1  # until it owns a descriptor, and when it no longer does

    def _prepare(
        self, kernel: Kernel, mechanism: Mechanism | str | None, on_tickle: Callable[[], object] | None
    ) -> None:
        if on_tickle is not None and not callable(on_tickle):
            raise TypeError(f"on_tickle must be callable, not {on_tickle!r}")
        #: The kernel it lives in.
        self.kernel = kernel
        try:
            #: What ``tickle`` uses.
            self.mechanism = Mechanism(mechanism or os.environ.get("PYKQ_MECHANISM") or kernel.mechanism)
        except ValueError:
            known = ", ".join(Mechanism)
            name = mechanism or f"PYKQ_MECHANISM={os.environ['PYKQ_MECHANISM']}"
            raise ValueError(f"there is no mechanism {name!r}: give one of {known}") from None
        if self.mechanism == Mechanism.TICKLE and not kernel.has_tickle:
            raise _not_supported(kernel)
        self._on_tickle = on_tickle
        self._kevent: Callable[..., int] = kernel.kevent
        self._look: Callable[..., int] = kernel.look
        self._codec = kernel.abi.codec
        self._spare: list[Events] = []
        self._waits: list[int] = []  # the threads that sleep, or are about to: see close
        self._closed_text = ""

    def _own(self, fd: int) -> None:
        self._waker: Waker = WAKERS[self.mechanism](self.kernel, fd)
        if self._waker.head:
            self._look = _to_be_waited_for
        self._ioctl = partial(self._waker.send, fd, KQUEUE_TICKLE)
        # A cache without room counts the calls, before they are made, and in C.
        self._send = counted = lru_cache(maxsize=0)(self._ioctl)
        self._sends, self._seen = counted.cache_info, 0
        overridden = type(self).tickle is not Kqueue.tickle
        if self.mechanism == Mechanism.TICKLE and self.kernel.shares_descriptors and not overridden:
            # C code throughout: a Python frame would double what it takes besides the bare ioctl.
            self.tickle = self._send  # type: ignore[method-assign, assignment]
        self._to_close = [fd]
        self.kernel.kqueues[fd] = self
        self._fd = fd  # last: from here on __del__ closes it

    @overload
    def kevent(
        self, changes: Iterable[Kevent] | None = ..., max_events: int = ..., timeout: float | None = ...
    ) -> list[Kevent]: ...
    @overload
    def kevent(
        self, changes: Iterable[Kevent] | None = ..., *, timeout: float | None = ..., into: Events
    ) -> Events: ...
    @overload
    def kevent(
        self, changes: Iterable[Kevent] | None, max_events: int, timeout: float | None, into: Events
    ) -> Events: ...
    def kevent(
        self,
        changes: Iterable[Kevent] | None = (),
        max_events: int = 64,
        timeout: float | None = None,
        into: Events | None = None,
    ) -> list[Kevent] | Events:
        """Apply ``changes``, then wait for events. The arguments are in ``select.kqueue.control``'s order.

        Args:
            changes: what to watch from now on. A change that fails is reported as an event with ``EV.ERROR``,
                whose ``data`` is the kernel's errno number; with ``max_events`` 0 it raises ``OSError``.
            max_events: the most events to return; 0 applies the changes and does not wait.
            timeout: seconds, rounded up to a nanosecond; None waits for ever, and so do more than 10**8
                seconds or infinity; 0 looks and does not wait.
            into: a ``buffer()`` to fill and return, which ``max_events`` does not change. For a fast loop: no
                memory is allocated for events, and no object made for one. One thread at a time.

        Returns:
            The events; none when the time is over.

        Raises:
            Tickled: ``tickle()`` was called and no event was there. A wait that comes to look for events
                consumes all tickles before it, whatever it returns. A tickle may be reported once too often,
                never not at all: so look at what it announces, and do not count.
            TypeError: an argument of the wrong type.
            ValueError: a bad argument, or the kqueue is closed, be it during the wait.
            OSError: from the kernel.

        A signal does not end the wait: Python's handlers run, in the main thread, and when they do not raise
        the wait goes on with the time that remains. What a handler raises, as Ctrl-C's does, may come when
        the kernel has returned events already: they are lost, unless what they report goes on (a pipe that
        can still be read; not a timer, nor with EV.CLEAR or EV.ONESHOT). The GIL is released while it sleeps.
        """
        if type(into) is Events and timeout == 0 and not changes and into._codec is self._codec:
            # The fastest there is: a loop looks often. Of a tickle it need not know (T5).
            look = self._look  # calling self._look(...) takes longer, in CPython 3.11
            count = look(self._fd, None, 0, into._reference, into._capacity, POLL)
            if count >= 0:  # else it is to be waited for; or it failed, and _wait will raise what for
                into._count = count
                return into
        if into is None:
            try:
                events = self._spare.pop()
            except IndexError:
                events = self.buffer(max_events)
            if events._capacity != max_events:
                events = self.buffer(max_events)
            try:
                events._count = self._wait(changes, events, timeout)
                return events.copy() if events._count else []
            finally:
                self._spare.append(events)
        if not isinstance(into, Events):
            raise TypeError(f"into must be a buffer(), not {into!r}")
        if into._codec is not self._codec:
            raise ValueError("the buffer belongs to a kqueue of a kernel with another struct kevent")
        into._count = self._wait(changes, into, timeout)
        return into

    def _wait(self, changes: Iterable[Kevent] | None, events: Events, timeout: float | None) -> int:
        """The number of events, when they are there or the time is over."""
        if timeout == 0 and not changes:
            count = self._look(self._fd, None, 0, events._reference, events._capacity, POLL)
            if count >= 0:
                return count
        events._count = 0  # should this raise
        changelist, nchanges = self._pack(changes) if changes else (None, 0)
        timespec, deadline_ns = None, None
        if timeout == 0:
            timespec, deadline_ns = POLL, 0
        elif timeout is not None and (timeout_ns := _nanoseconds(timeout)) is not None:
            timespec, deadline_ns = _timespec(timeout_ns), time.monotonic_ns() + timeout_ns
        waits, me = self._waits, get_ident()
        try:
            waits.append(me)  # in here, so that no signal handler can raise between it and the removal
            found = self._sleep(changelist, nchanges, events, timespec, deadline_ns)
        finally:
            waits.remove(me)
        if found >= 0:
            return found
        if self._on_tickle is None:
            raise Tickled(errno.EINTR, "kevent: interrupted by a tickle")
        self._on_tickle()
        return 0

    def _nap(self, events: Events, timeout: float | None) -> int:
        """What one call of kevent returns; -1 for whatever reason, a tickle among them."""
        timespec = None
        if timeout is not None and (timeout_ns := _nanoseconds(timeout)) is not None:
            timespec = _timespec(timeout_ns)
        waits, me = self._waits, get_ident()
        try:
            waits.append(me)
            return self._kevent(self._fd, None, 0, events._reference, events._capacity, timespec)
        finally:
            waits.remove(me)

    def _sleep(
        self,
        changelist: bytes | None,
        nchanges: int,
        events: Events,
        timespec: bytes | None,
        deadline_ns: int | None,
    ) -> int:
        """The number of events, or -1 for a tickle."""
        waker = self._waker  # which lives as long as this: see Pipe
        while True:
            count = self._kevent(
                self._fd, changelist, nchanges, events._reference, events._capacity, timespec
            )
            tickled = False
            if count < 0:
                tickled = self._tickle_ended_it(waker)
            elif count > 0 and waker.head:
                count, tickled = self._without_hidden(waker, events, count)
                if count or timespec == POLL:
                    return count
            elif count > 0 or timespec is not None or not events._capacity:
                return count
            if tickled:
                return -1
            # It was a signal, and Python runs its handlers between bytecodes: here, or when the loop jumps
            # back. Or another thread took the tickle that woke this one; or, as libkqueue has it, the event.
            #
            # The changes are not given again: the kernel registers them before it scans, and only the scan
            # sleeps (kevent1 in kern_event.c).
            changelist, nchanges = None, 0
            if deadline_ns is not None:
                left_ns = deadline_ns - time.monotonic_ns()
                if left_ns <= 0:
                    return 0
                timespec = _timespec(left_ns)

    def _tickle_ended_it(self, waker: Waker) -> bool:
        """After kevent failed: True for a tickle, False for a signal.

        The kernel says EINTR for both. So ``_send`` counts itself, and then sets the kernel's flag by its
        ioctl. The kernel's flag is cleared by every return from kevent; the count is seen only here. Say that
        a tickle is counted at t0 and its ioctl is done at t1:

        * If a wait sees the count after t0, it reports this tickle, after t0.
        * Else the count is unseen, and from t1 on the kernel's flag is set, too. The next return from kevent
          consumes that; it brings events, or nothing from a look (T2, T5), or it is EINTR and reported here.

        So no tickle is lost. One would be if events saw the count: coming between t0 and t1 they would take
        it away, and the EINTR that the ioctl causes after that would pass for a signal. The price is that a
        tickle which events consumed is still unseen, and the next signal is reported as a tickle: once too
        often. An ioctl that did not come through pykq passes for a signal.
        """
        if ctypes.get_errno() != errno.EINTR or self._fd < 0:
            error = self.kernel.error("kevent")
            if self._fd < 0:
                raise ValueError(self._closed_text)
            if error.errno != errno.EINTR:
                raise error
        return not waker.head and self._see_tickles()

    def _see_tickles(self) -> bool:
        """Whether ``tickle`` was called since this was."""
        before, self._seen = self._seen, self._sends().misses
        return self._seen != before

    def _without_hidden(self, waker: Waker, events: Events, count: int) -> tuple[int, bool]:
        """The number of events besides the hidden one, and whether that was there: a tickle, consumed.

        A tickle without the ioctl. Where nobody has called ``tickle`` since one was seen, the hidden event
        cannot be left behind, and that saves system calls here.
        """
        events._count = count
        if not events._remove(waker.head):
            if count == events._capacity and self._see_tickles():
                waker.clear()  # there was no room for it, and this return consumes it (T2)
            return count, False
        self._see_tickles()
        tickled = waker.take()
        if not events._count:  # any other event that is there wins (T2), and it consumes a tickle, too
            more = self._kevent(self._fd, None, 0, events._reference, events._capacity, POLL)
            events._count = max(more, 0)
            if more > 0 and events._remove(waker.head):
                tickled = waker.take() or tickled
        return events._count, tickled

    def tickle(self) -> None:
        """Interrupt one wait: a thread that sleeps in ``kevent``, or else the next that would sleep.

        Pending events win over it. From any thread, and from a signal handler. Who sends many looks
        ``kq.tickle`` up once: that is a good part of what a call takes.

        Raises:
            ValueError: the kqueue is closed.
            OSError: ``EBADF``, ``ENOTTY``: its descriptor was closed in this moment, or behind its back, and
                may be another file's now; of the running system's KQUEUE_TICKLE in ``fcntl.ioctl``'s words.
        """
        try:
            self._send()
        except (OSError, ValueError) as error:
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

        Those waits are woken up first, each of them: NetBSD's own close waits until the last one returns, and
        wakes only some. Takes as long as they need to come back, 5 s at the most.
        """
        try:
            fd = self._to_close.pop()  # once, whoever calls: threads, signal handlers, __del__
        except IndexError:
            return
        wake = partial(self._waker.send, fd, KQUEUE_TICKLE)
        self._refuse("I/O operation on closed kqueue object")
        if self.kernel.kqueues.get(fd) is self:
            del self.kernel.kqueues[fd]
        # A wait is in the list before it looks whether this is closed; so what is not in it now will look.
        deadline = time.monotonic() + _CLOSE_S
        while self._waits:
            with contextlib.suppress(OSError):  # closed behind its back
                wake()  # again and again, as one wait may take what was to wake the others
            # A wait of this thread's own goes on after the signal handler that this is called from.
            if set(self._waits) <= {get_ident()} or time.monotonic() > deadline:
                break
            time.sleep(0.0005)
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
        self._kevent = self._look = refuse
        # In place, for a tickle that somebody has kept: threading.Timer(1.0, kq.tickle). A call that is under
        # way still uses the arguments.
        self._ioctl.__setstate__((refuse, (), {}, {"before": self._ioctl.args}))  # type: ignore[attr-defined]
        self._waker = Waker()

    def _pack(self, changes: Iterable[Kevent]) -> tuple[bytes, int]:
        pack = self.kernel.abi.pack
        packed = []
        for change in map(Kevent.of, changes):
            try:
                packed.append(pack(*change))
            except struct.error as error:
                if all(isinstance(field, int) for field in change):
                    raise ValueError(f"{change!r} does not fit struct kevent: {error}") from None
                raise TypeError(f"all must be numbers: {tuple(change)}") from None
        return b"".join(packed), len(packed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def control(
        self, changes: Iterable[Kevent] | None, max_events: int, timeout: float | None = None
    ) -> list[Kevent]:
        """``kevent`` under the name it has in ``select.kqueue``."""
        return self.kevent(changes, max_events, timeout)

    def kfilter_byfilter(self, number: int) -> str:
        """The name of the filter with this number, as ``"EVFILT_READ"``: KFILTER_BYFILTER of kqueue(2).

        Raises:
            FileNotFoundError: there is none.
            ValueError: the number does not fit 32 bits.
            OSError: ``ENOTTY``: it is not NetBSD.
        """
        if not 0 <= number < 1 << 32:
            raise ValueError(f"a filter's number has 32 bits: {number}")
        name = ctypes.create_string_buffer(KFILTER_MAXNAME)
        self._map_filter(KFILTER_BYFILTER, KfilterMapping(ctypes.addressof(name), len(name), number))
        return name.value.decode()

    def kfilter_byname(self, name: str) -> int:
        """The number of the filter with this name: KFILTER_BYNAME of kqueue(2).

        Raises as ``kfilter_byfilter``; ValueError: there is a NUL in the name.
        """
        if "\0" in name:
            raise ValueError(f"NUL in a filter's name: {name!r}")
        text = ctypes.create_string_buffer(name.encode())
        mapping = KfilterMapping(ctypes.addressof(text), len(text), 0)
        self._map_filter(KFILTER_BYNAME, mapping)
        return int(mapping.filter)

    def _map_filter(self, request: int, mapping: KfilterMapping) -> None:
        if self.kernel.abi.system != "NetBSD":
            raise OSError(errno.ENOTTY, f"only NetBSD can be asked for its filters, not {self.kernel.name}")
        self.kernel.ioctl(self.ident, request, ctypes.byref(mapping))

    def __del__(self) -> None:
        if self._fd >= 0:  # it came to own one
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self._fd}, {self.mechanism}"
        return f"<Kqueue {state}, on {self.kernel.name}>"


def _to_be_waited_for(*_: object) -> int:
    return -1


def tickle(kqueue: Kqueue | HasFileno | int) -> None:
    """Interrupt one wait on a kqueue, given as a ``Kqueue``, a ``select.kqueue`` or a descriptor.

    A wait by ``Kqueue.kevent`` on that descriptor raises ``Tickled``. ``select.kqueue.control`` swallows
    it: it starts again after ``EINTR`` (PEP 475). A descriptor is one of the running system; what is no
    ``Kqueue`` can be tickled by KQUEUE_TICKLE alone.

    Raises:
        TickleNotSupported: the kernel has no KQUEUE_TICKLE.
        TypeError: it is neither a number nor an object with ``fileno``.
        OSError: ``EBADF`` or another: it is no kqueue.
        KernelUnavailable: a descriptor is given, and the running system has no kqueue.
    """
    if isinstance(kqueue, Kqueue):
        return kqueue.tickle()
    kernel = load_kernel("system")
    fd = _checked(descriptor(kqueue), "tickle")
    known = kernel.kqueues.get(fd)
    if known is not None:
        return known.tickle()
    try:
        kernel.plain_ioctl(fd, KQUEUE_TICKLE)
    except OSError as error:
        raise _tickle_error(error, kernel) from None


def _checked(fd: int, call: str) -> int:
    """A descriptor that can be one: others are no C int, or would be cut down to one."""
    if not 0 <= operator.index(fd) < 1 << 31:
        raise _bad_descriptor(call)
    return fd


def _bad_descriptor(call: str) -> OSError:
    return OSError(errno.EBADF, f"{call}: {os.strerror(errno.EBADF)}")


def _tickle_error(error: Exception, kernel: Kernel) -> Exception:
    if not isinstance(error, OSError):
        return error
    if error.errno == errno.ENOTTY:
        return _not_supported(kernel)
    return OSError(error.errno, f"tickle: {os.strerror(error.errno or 0)}")


def _not_supported(kernel: Kernel) -> TickleNotSupported:
    return TickleNotSupported(errno.ENOTTY, f"this kernel has no KQUEUE_TICKLE: {kernel.name}")
