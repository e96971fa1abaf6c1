"""A selector of the standard library's kind, which another thread can wake up."""

import contextlib
import os
import selectors
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pykq._callable import callable
from pykq._constants import EV, EVFILT
from pykq._events import Events, HasFileno, Kevent
from pykq._kernel import Kernel, load_kernel
from pykq._kqueue import Kqueue
from pykq._mechanism import Mechanism

_FILTERS = {selectors.EVENT_READ: EVFILT.READ, selectors.EVENT_WRITE: EVFILT.WRITE}
_EVENTS = {int(filter): event for event, filter in _FILTERS.items()}


class TickleSelector(selectors.BaseSelector):
    """``selectors.KqueueSelector`` with ``wakeup()``, which ends a ``select`` in another thread.

    One thread registers and selects; any thread, and a signal handler, may call ``wakeup``. The arguments are
    those of ``Kqueue``, and so are the exceptions. What is registered are descriptors of the running system,
    so a rump kernel is a ValueError.
    """

    def __init__(
        self,
        kernel: Kernel | str | os.PathLike[str] | None = None,
        *,
        mechanism: Mechanism | str | None = None,
    ) -> None:
        kernel = load_kernel(kernel)
        if not kernel.shares_descriptors:
            raise ValueError(f"it cannot watch descriptors of the running system: {kernel.name}")
        self._kq = Kqueue(kernel, mechanism=mechanism, on_tickle=bool)  # so that a tickle returns no events
        #: What ``wakeup`` uses.
        self.mechanism = self._kq.mechanism
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._signals: dict[int, Callable[[int], object]] = {}
        self._buffer = self._kq.buffer(64)
        self._woken = False  # a wake-up is under way
        self._owed = False  # one that failed is being made up for

    def wakeup(self) -> None:
        """End the ``select`` that waits, or else the next one that would wait; it returns what is ready.

        From any thread, and from a signal handler. Where a wake-up is under way it makes no system call: so
        first make what is to be found, then call this; and look for it after each ``select``. Raises
        ValueError when the selector is closed.
        """
        if not self._woken:
            try:
                self._woken = True  # before the tickle: a select that returns meanwhile takes it back
                self._kq.tickle()
            except BaseException:  # Ctrl-C as well
                self._woken, self._owed = False, True
                with contextlib.suppress(OSError, ValueError):
                    self._kq.tickle()  # another thread may have relied on it
                raise

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """The keys that are ready, each with its ready events; none when the time is over, or by ``wakeup``.

        ``timeout`` is in seconds; None waits for ever, and 0 or less does not wait. A signal does not end the
        wait, unless its handler raises (PEP 475).
        """
        events = self._buffer
        try:
            count = self._wait(events, timeout)
        finally:
            self._woken = self._owed = False
        if count <= 0:
            return []
        events._count = count
        ready: dict[int, int] = {}
        for event in events:
            if event.filter == EVFILT.SIGNAL:
                handler = self._signals.get(event.ident)
                if handler is not None:  # else a handler before it has removed it
                    handler(event.ident)
            else:
                ready[event.ident] = ready.get(event.ident, 0) | _EVENTS[event.filter]
        keys = self._keys
        return [(keys[fd], found & keys[fd].events) for fd, found in ready.items() if fd in keys]

    def _wait(self, events: Events, timeout: float | None) -> int:
        """The number of events, 0 or less when there are none: ``Kqueue._wait``, but faster where it sleeps.

        That counts the tickles to tell one from a signal. Here a tickle has set a flag before, so one call of
        kevent does, and of what runs only now and then each line is slow.
        """
        kq = self._kq
        if timeout is not None and timeout <= 0:
            return kq._wait(None, events, 0)
        if kq._waker.head:  # it has to look for the hidden event
            return kq._wait(None, events, timeout)
        began = time.monotonic()
        count = kq._nap(events, timeout)
        if count < 0 and not (self._woken or self._owed):  # it was a signal, or has failed and will again
            kq._see_tickles()  # the tickles until now are none of the next wait's; so look again:
            if not (self._woken or self._owed):
                left = None if timeout is None else max(0, timeout - (time.monotonic() - began))
                count = kq._wait(None, events, left)
        return count

    def register(self, fileobj: int | HasFileno, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a file object or descriptor for ``EVENT_READ``, ``EVENT_WRITE`` or both.

        Raises:
            ValueError: the events are none of those, or there is no valid descriptor.
            KeyError: it is registered already.
            OSError: the kernel cannot watch it.
        """
        key = selectors.SelectorKey(fileobj, self._descriptor(fileobj), _checked(events), data)
        if key.fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {key.fd}) is already registered")
        try:
            self._change(key.fd, 0, events)
        except OSError:
            self._drop(key.fd)
            raise
        self._keys[key.fd] = key
        if 2 * len(self._keys) > self._buffer.max_events:
            self._buffer = self._kq.buffer(4 * len(self._keys))
        return key

    def unregister(self, fileobj: int | HasFileno) -> selectors.SelectorKey:
        """Stop watching it. KeyError: it is not registered."""
        key = self.get_key(fileobj)
        del self._keys[key.fd]
        with contextlib.suppress(OSError):  # it was closed, and the kernel has forgotten it
            self._change(key.fd, key.events, 0)
        return key

    def modify(self, fileobj: int | HasFileno, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch it for other events, with other data. Raises what ``register`` and ``unregister`` do.

        After an OSError it is not registered any more, as the standard library has it.
        """
        key = self.get_key(fileobj)
        try:
            self._change(key.fd, key.events, _checked(events))
        except OSError:
            del self._keys[key.fd]
            self._drop(key.fd)
            raise
        self._keys[key.fd] = key._replace(events=events, data=data)
        return self._keys[key.fd]

    def get_map(self) -> Mapping[int | HasFileno, selectors.SelectorKey]:
        """The keys by descriptor or file object; None when it is closed, as the standard library has it."""
        return None if self._kq.closed else _ByFile(self._keys, self._descriptor)  # type: ignore[return-value]

    def fileno(self) -> int:
        """The descriptor of the kqueue."""
        return self._kq.fileno()

    def close(self) -> None:
        """Close the kqueue; what was registered stays open."""
        self._kq.close()
        self._keys.clear()

    def on_signal(self, number: int, handler: Callable[[int], object] | None) -> None:
        """Call ``handler(number)`` from ``select`` when the process gets this signal; None: no longer.

        The kqueue watches for it (EVFILT_SIGNAL), so it ends a wait whichever thread the system gives the
        signal to. What the signal does besides is as ``signal.signal`` says.

        Raises TypeError: the handler cannot be called. OSError: there is no such signal, or no handler to be
        removed.
        """
        if handler is not None and not callable(handler):
            raise TypeError(f"handler must be callable or None, not {handler!r}")
        self._kq.kevent([Kevent(number, EVFILT.SIGNAL, EV.DELETE if handler is None else EV.ADD)], 0)
        if handler is None:
            self._signals.pop(number, None)
        else:
            self._signals[number] = handler

    def _change(self, fd: int, before: int, after: int) -> None:
        changes = [
            Kevent(fd, filter, EV.ADD if after & event else EV.DELETE)
            for event, filter in _FILTERS.items()
            if (before ^ after) & event
        ]
        self._kq.kevent(changes, 0)

    def _drop(self, fd: int) -> None:
        """After a change that failed: one of the two events may be watched."""
        for event in _FILTERS:
            with contextlib.suppress(OSError):
                self._change(fd, event, 0)

    def _descriptor(self, fileobj: int | HasFileno) -> int:
        """Its descriptor, also when it is registered and has been closed since."""
        fd = -1
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            fd = fileobj if isinstance(fileobj, int) else int(fileobj.fileno())
        if fd >= 0:
            return fd
        for key in self._keys.values():
            if key.fileobj is fileobj:
                return key.fd
        raise ValueError(f"Invalid file object or descriptor: {fileobj!r}")


class _ByFile(Mapping[int | HasFileno, selectors.SelectorKey]):
    """The keys of a selector, found by descriptor or by file object."""

    def __init__(
        self, keys: dict[int, selectors.SelectorKey], descriptor: Callable[[int | HasFileno], int]
    ) -> None:
        self._keys, self._descriptor = keys, descriptor

    def __getitem__(self, fileobj: int | HasFileno) -> selectors.SelectorKey:
        try:
            return self._keys[self._descriptor(fileobj)]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None

    def __iter__(self) -> Iterator[int | HasFileno]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _checked(events: int) -> int:
    if not events or events & ~(selectors.EVENT_READ | selectors.EVENT_WRITE):
        raise ValueError(f"Invalid events: {events!r}")
    return events
