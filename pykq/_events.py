"""Changes and events: one as an object, many as the C array that the kernel reads or writes."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, Self, SupportsIndex, overload

from pykq._abi import Abi, KeventFields
from pykq._constants import EV, EVFILT

_MAX_EVENTS = 1 << 20  # more in one wait is a mistake: the buffer alone would be 72 MB


class HasFileno(Protocol):
    """A file, a socket, a kqueue: what has a descriptor."""

    def fileno(self) -> int: ...


class HasIdent:
    """A ``Kqueue``: its ident is its descriptor in its own kernel, which ``fileno`` may refuse to give."""

    @property
    def ident(self) -> int:
        raise NotImplementedError


def descriptor(it: object) -> int:
    """The descriptor of an object that has one, or the number that it is. TypeError: it is neither."""
    if isinstance(it, int):
        return it
    fileno: Callable[[], int] | None = getattr(it, "fileno", None)
    if fileno is None:
        raise TypeError(f"neither a number nor an object with fileno(): {it!r}")
    return fileno()


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

    Raises TypeError: the ident is neither a number nor an object with a descriptor.
    """

    __slots__ = ()

    def __new__(
        cls,
        ident: int | HasFileno | HasIdent,
        filter: int = EVFILT.READ,
        flags: int = EV.ADD,
        fflags: int = 0,
        data: int = 0,
        udata: int = 0,
    ) -> Self:
        if not isinstance(ident, int):
            ident = ident.ident if isinstance(ident, HasIdent) else descriptor(ident)
        return super().__new__(cls, ident, filter, flags, fflags, data, udata)

    @classmethod
    def of(cls, other: object) -> Self:
        """A Kevent with the numbers of another one, of a ``select.kevent`` or of an event in a buffer.

        Raises TypeError: it has not those attributes.
        """
        if isinstance(other, cls):
            return other
        try:
            return tuple.__new__(cls, [getattr(other, name) for name in cls._fields])
        except AttributeError:
            raise TypeError(f"changes must be Kevent objects, not {other!r}") from None


_kevent_from = partial(tuple.__new__, Kevent)  # not through __new__: the kernel's numbers need no checks


class Events(Sequence[KeventFields]):
    """A buffer for the events of one wait, from ``Kqueue.buffer``, to use again and again.

    Its events are views of the C array that the kernel writes, made once: they have the attributes of a
    ``Kevent``, and change with the next wait into the buffer.
    """

    __slots__ = ("_abi", "_array", "_bytes", "_capacity", "_codec", "_count", "_reference", "_views")

    def __init__(self, abi: Abi, max_events: int) -> None:
        if not 0 <= max_events <= _MAX_EVENTS:
            raise ValueError(f"max_events must be 0 to {_MAX_EVENTS}, not {max_events}")
        self._capacity = max_events
        self._array = (abi.kevent * max_events)()
        self._reference = ctypes.byref(self._array)
        self._bytes = memoryview(self._array).cast("B")
        self._abi = abi
        self._codec = abi.codec
        self._views: list[KeventFields] = []
        self._count = 0

    @property
    def max_events(self) -> int:
        """The most events that it holds."""
        return self._capacity

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[KeventFields]:
        return iter(self._made()[: self._count])

    @overload
    def __getitem__(self, index: SupportsIndex) -> KeventFields: ...
    @overload
    def __getitem__(self, index: slice) -> list[KeventFields]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> KeventFields | list[KeventFields]:
        if isinstance(index, slice):
            return self._made()[: self._count][index]
        return self._made()[range(self._count)[index]]

    def _made(self) -> list[KeventFields]:
        """The views, those of events that are there first."""
        if not self._views:
            self._views = list(self._array)
        return self._views

    def copy(self) -> list[Kevent]:
        """The events as objects of their own."""
        if self._abi.filters:
            return list(map(Kevent.of, self))  # which gives the filters pykq's numbers
        filled = self._bytes[: self._count * self._codec.size]
        return list(map(_kevent_from, self._codec.iter_unpack(filled)))

    def _remove(self, head: bytes) -> bool:
        """Take out the event that begins with these bytes; False when there is none."""
        size = self._codec.size
        filled = bytes(self._bytes[: self._count * size])
        at = filled.find(head)
        while at % size and at >= 0:  # it is part of another event's numbers
            at = filled.find(head, at + 1)
        if at < 0:
            return False
        self._bytes[at : len(filled) - size] = filled[at + size :]
        self._count -= 1
        return True

    def __repr__(self) -> str:
        return f"Events({self.copy()})"
