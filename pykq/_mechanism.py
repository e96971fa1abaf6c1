"""What brings a wait back: the kernel's tickle, or, where the kernel has none, an event of pykq's own.

A hidden event is registered when the kqueue is opened, happens when it is tickled, and is taken out of what
the kernel returns. ``Kqueue`` makes the rules of it: see ``Kqueue._without_hidden``.
"""

import contextlib
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from pykq._abi import POLL
from pykq._constants import EV, EVFILT, NoteUser

if TYPE_CHECKING:
    from pykq._kernel import Kernel

# The EVFILT_USER event that is pykq's, in a name space that a program shares with it: "pykq" in ASCII.
_IDENT = 0x70796B71

# More than a pipe takes without waiting is not in it; so this empties one, in one read or two.
_PIPE_BYTES = 65536


class Mechanism(StrEnum):
    """What ``Kqueue.tickle`` uses; also the values of ``PYKQ_MECHANISM``."""

    TICKLE = "KQUEUE_TICKLE"  # the ioctl, on a NetBSD kernel with the patch
    USER = "EVFILT_USER"  # a hidden event; NetBSD 10, FreeBSD, OpenBSD 7.6, DragonFly, macOS, libkqueue
    PIPE = "pipe"  # a hidden pipe: everywhere, for two descriptors more


class Waker:
    """A mechanism on one kqueue; this one serves a kqueue that is closed, and does nothing.

    Attributes:
        head: what the hidden event begins with, b"" when there is none.
        send: interrupts a wait; called as an ioctl is, with the kqueue and KQUEUE_TICKLE.
    """

    head = b""
    send: Callable[[int, int], object]

    def take(self) -> bool:
        """Consume the tickle whose event was returned; False: another thread was faster."""
        raise NotImplementedError

    def clear(self) -> None:
        """Consume a tickle whose event may not have been returned yet."""
        raise NotImplementedError


class Tickle(Waker):
    """KQUEUE_TICKLE: the kernel says EINTR, and there is no event to be taken."""

    def __init__(self, kernel: "Kernel", fd: int) -> None:
        self.send = kernel.plain_ioctl


class UserEvent(Waker):
    """An EVFILT_USER event that is reset when it is returned: one thread gets it."""

    def __init__(self, kernel: "Kernel", fd: int) -> None:
        self._kernel, self._fd = kernel, fd
        pack = kernel.abi.pack
        self.head = _head(kernel, _IDENT, EVFILT.USER)
        self._add = pack(_IDENT, EVFILT.USER, EV.ADD | EV.CLEAR, 0, 0, 0)
        self._delete = pack(_IDENT, EVFILT.USER, EV.DELETE, 0, 0, 0)
        self._trigger = pack(_IDENT, EVFILT.USER, 0, NoteUser.TRIGGER, 0, 0)
        self._register(self._add)

    def _register(self, *changes: bytes) -> None:
        if self._kernel.kevent(self._fd, b"".join(changes), len(changes), None, 0, POLL) < 0:
            raise self._kernel.error("kevent(EVFILT_USER)")

    def send(self, fd: int, request: int) -> None:
        while True:
            try:
                return self._register(self._trigger)
            except FileNotFoundError:  # another thread is between delete and add, in clear()
                self._register(self._add)

    def take(self) -> bool:
        return True

    def clear(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # another thread does the same
            self._register(self._delete, self._add)


class Pipe(Waker):
    """A pipe that the kqueue watches: a byte in it is a tickle.

    It lives as long as this object, which every thread in a wait holds on to: none can read from the
    number when it has become another file's.
    """

    def __init__(self, kernel: "Kernel", fd: int) -> None:
        self._kernel = kernel
        self._fds = kernel.pipe(blocking=False)
        reader, _ = self._fds
        self.head = _head(kernel, reader, EVFILT.READ)
        watch = kernel.abi.pack(reader, EVFILT.READ, EV.ADD, 0, 0, 0)
        if kernel.kevent(fd, watch, 1, None, 0, POLL) < 0:
            raise kernel.error("kevent(EVFILT_READ)")

    def send(self, fd: int, request: int) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full, and that is a tickle
            self._kernel.write(self._fds[1], b"!")

    def take(self) -> bool:
        taken = False
        with contextlib.suppress(BlockingIOError):
            while True:
                count = len(self._kernel.read(self._fds[0], _PIPE_BYTES))
                taken = taken or count > 0
                if count < _PIPE_BYTES:
                    break
        return taken

    def clear(self) -> None:
        self.take()

    def __del__(self) -> None:
        for fd in getattr(self, "_fds", ()):  # none, if there was no descriptor left
            with contextlib.suppress(OSError, RuntimeError):  # a rump kernel does not live on after a fork
                self._kernel.close(fd)


def _head(kernel: "Kernel", ident: int, filter: int) -> bytes:
    """What struct kevent begins with in an event of this ident and filter."""
    return kernel.abi.pack(ident, filter, 0, 0, 0, 0)[: kernel.abi.kevent.flags.offset]


WAKERS: dict[Mechanism, Callable[["Kernel", int], Waker]] = {
    Mechanism.TICKLE: Tickle,
    Mechanism.USER: UserEvent,
    Mechanism.PIPE: Pipe,
}
