"""The C side: ``struct kevent`` and ``struct timespec``, the entry points that take them, ioctl numbers.

``ABIS`` is the table of the systems that have a kqueue. tests/host checks sizes, offsets and numbers
against a compiler and the systems' own headers.
"""

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property
from typing import Any

from pykq._constants import EV, EVFILT, NOTES, NoteTimer


class KeventFields:
    """What a change and an event have in common: six numbers, and a repr with the names of the constants."""

    __slots__ = ()

    ident: int
    filter: int
    flags: int
    fflags: int
    data: int
    udata: int

    def __repr__(self) -> str:
        name = f"EVFILT.{EVFILT(self.filter).name}" if self.filter in list(EVFILT) else str(self.filter)
        return (
            f"{type(self).__name__}(ident={self.ident}, filter={name}, flags={_flags(EV, self.flags)},"
            f" fflags={_flags(NOTES.get(self.filter), self.fflags)}, data={self.data}, udata={self.udata:#x})"
        )


def _flags(kind: type[IntFlag] | None, value: int) -> str:
    """The names of the bits that have one, and the rest in hexadecimal."""
    names, rest = [], int(value)
    # Those of several bits first: COPY is not AND and OR.
    for name, flag in sorted(
        (kind.__members__ if kind else {}).items(), key=lambda item: -item[1].bit_count()
    ):
        if rest & int(flag) == flag:
            names.append(name)
            rest &= ~int(flag)
    if kind is None or not names:
        return f"{rest:#x}"
    return f"{kind.__name__}.{'|'.join(names)}" + (f"|{rest:#x}" if rest else "")


# The six fields, for each layout. The two pointers are given as numbers.


class Kevent50(KeventFields, ctypes.Structure):
    """``struct kevent`` of NetBSD 6 to 10."""

    _fields_ = (
        ("ident", ctypes.c_size_t),
        ("filter", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("fflags", ctypes.c_uint32),
        ("data", ctypes.c_int64),
        ("udata", ctypes.c_size_t),
    )


class Kevent100(KeventFields, ctypes.Structure):
    """``struct kevent`` of NetBSD 11: with four words for the program's own use, which Kevent leaves out."""

    _fields_ = (*Kevent50._fields_, ("ext", ctypes.c_uint64 * 4))


class _Numbered(KeventFields):
    """A layout of a system that numbers its filters from -1 downward: ``filter`` is pykq's number here."""

    __slots__ = ()

    _filter: int
    numbers: Mapping[int, int]  # pykq's to the system's

    @property
    def filter(self) -> int:  # type: ignore[override]
        for number, systems in self.numbers.items():
            if systems == self._filter:
                return number
        return self._filter


_BSD: Any = (
    ("ident", ctypes.c_size_t),
    ("_filter", ctypes.c_short),
    ("flags", ctypes.c_ushort),
    ("fflags", ctypes.c_uint),
    ("data", ctypes.c_ssize_t),
    ("udata", ctypes.c_size_t),
)
_DATA64: Any = (*_BSD[:4], ("data", ctypes.c_int64), _BSD[5])


def _numbers(*names: str) -> dict[int, int]:
    """pykq's number to the system's, for filters that the system numbers from -1 downward in this order."""
    listed = {name: -number for number, name in enumerate(names, start=1)}
    return {filter: listed[filter.name] for filter in EVFILT if filter.name in listed}


_COMMON = ("READ", "WRITE", "AIO", "VNODE", "PROC", "SIGNAL", "TIMER")
_FREEBSD = _numbers(*_COMMON, "PROCDESC", "FS", "LIO", "USER", "SENDFILE", "EMPTY")
_OPENBSD = _numbers(*_COMMON, "DEVICE", "EXCEPT", "USER")
_DRAGONFLY = _numbers(*_COMMON, "EXCEPT", "USER", "FS")
_MACOS = _numbers(*_COMMON, "MACHPORT", "FS", "USER")
_LIBKQUEUE = _numbers(*_COMMON, "NETDEV", "FS", "LIO", "USER")

# A timer's notes where they are not NetBSD's: milliseconds, SECONDS, USECONDS, NSECONDS, ABSTIME.
_FREEBSD_TIMER = (2, 1, 4, 8, 0x10)
_MACOS_TIMER = (0, 1, 2, 4, 8)


class KeventFreeBSD11(_Numbered, ctypes.Structure):
    """``struct kevent`` of FreeBSD before 12."""

    _fields_ = _BSD
    numbers = _FREEBSD


class KeventFreeBSD12(_Numbered, ctypes.Structure):
    """``struct kevent`` of FreeBSD 12 and later."""

    _fields_ = (*_DATA64, ("ext", ctypes.c_uint64 * 4))
    numbers = _FREEBSD


class KeventOpenBSD(_Numbered, ctypes.Structure):
    """``struct kevent`` of OpenBSD 5.5 and later."""

    _fields_ = _DATA64
    numbers = _OPENBSD


class KeventDragonFly(_Numbered, ctypes.Structure):
    """``struct kevent`` of DragonFly."""

    _fields_ = _BSD
    numbers = _DRAGONFLY


class KeventMacOS(_Numbered, ctypes.Structure):
    """``struct kevent`` of macOS."""

    _fields_ = _BSD
    numbers = _MACOS


class KeventLibkqueue(_Numbered, ctypes.Structure):
    """``struct kevent`` of libkqueue."""

    _fields_ = _BSD
    numbers = _LIBKQUEUE


@dataclass(frozen=True)
class Abi:
    """One layout of ``struct kevent`` and the call that takes it.

    Attributes:
        system: whose it is, as ``platform.system()`` says it, or libkqueue.
        since: the first release to have it.
        entry: the call's name in the C library. NetBSD's plain ``kevent`` is the entry of NetBSD 5 and
            before (32-bit time_t), and never used.
        kevent: the layout.
        source: where the numbers come from.
        timer: a timer's notes as the system numbers them: milliseconds, SECONDS, USECONDS, NSECONDS, ABSTIME;
            or milliseconds alone, when it has no others.
    """

    system: str
    since: str
    entry: str
    kevent: Any
    source: str
    timer: tuple[int, ...] = (0, 1, 2, 3, 0x10)

    @cached_property
    def filters(self) -> Mapping[int, int]:
        """The filters it has, pykq's number to the system's; empty where they are the same."""
        return getattr(self.kevent, "numbers", {})

    @cached_property
    def codec(self) -> struct.Struct:
        """The six numbers, packed and unpacked: many times faster than field by field."""
        codes = "".join(kind._type_ for _, kind in self.kevent._fields_[:6])
        rest = ctypes.sizeof(self.kevent) - struct.calcsize(codes)
        return struct.Struct(f"{codes}{rest}x")

    def pack(self, ident: int, filter: int, flags: int, fflags: int, data: int, udata: int) -> bytes:
        """A change as the system reads it.

        Raises struct.error: a number does not fit. ValueError: the system's timers have not that note.
        """
        if self.filters:
            if filter == EVFILT.TIMER:
                fflags = self._timer_notes(fflags)
            filter = self.filters.get(filter, filter)
        return self.codec.pack(ident, filter, flags, fflags, data, udata)

    def _timer_notes(self, fflags: int) -> int:
        unit = fflags & NoteTimer.NSECONDS  # a number of two bits: 0 to 3
        rest = fflags & ~0x13
        try:
            absolute = self.timer[4] if fflags & NoteTimer.ABSTIME else 0
            return self.timer[unit] | absolute | rest
        except IndexError:
            known = f"{self.system}'s timers count milliseconds from now"
            raise ValueError(f"{known}: no {_flags(NoteTimer, fflags)}") from None


# The first row of the running system whose entry point is in its C library is used, and on FreeBSD, whose
# entry points are all called kevent, whose release is not newer.
ABIS = (
    Abi("NetBSD", "11", "__kevent100", Kevent100, "sys/event.h 1.55 (10.99, July 2023)"),
    Abi("NetBSD", "6", "__kevent50", Kevent50, "sys/event.h 1.54 (10.1)"),
    Abi("FreeBSD", "12", "kevent", KeventFreeBSD12, "sys/event.h (14.0)", _FREEBSD_TIMER),
    Abi("FreeBSD", "4", "kevent", KeventFreeBSD11, "sys/event.h (14.0, kevent_freebsd11)", _FREEBSD_TIMER),
    Abi("OpenBSD", "5.5", "kevent", KeventOpenBSD, "sys/event.h (7.8)"),
    Abi("DragonFly", "1", "kevent", KeventDragonFly, "sys/event.h, kqueue(2) (6.4)", (0,)),
    Abi("Darwin", "7", "kevent", KeventMacOS, "sys/event.h (macOS 15 SDK)", _MACOS_TIMER),
    Abi("libkqueue", "2", "kevent", KeventLibkqueue, "sys/event.h (2.6)", _MACOS_TIMER),
)

TIMESPEC = struct.Struct("@ql0q")  # 64-bit time_t, long, aligned as in C: sys/timespec.h, NetBSD 6 and later
POLL = TIMESPEC.pack(0, 0)

# NetBSD's sys/fcntl.h: the host's numbers may be others, and a rump kernel wants these.
O_NONBLOCK = 0x00000004
O_CLOEXEC = 0x00400000


def _ioc(direction: int, group: str, number: int, size_bytes: int) -> int:
    """An ioctl number as sys/ioccom.h lays it out: direction, 13 bits of size, group, number."""
    return direction | (size_bytes & 0x1FFF) << 16 | ord(group) << 8 | number


def io(group: str, number: int) -> int:
    """``_IO``: the number of an ioctl without an argument."""
    return _ioc(0x20000000, group, number, 0)


def iowr(group: str, number: int, argument: type[ctypes.Structure]) -> int:
    """``_IOWR``: the number of an ioctl whose argument goes in and comes back."""
    return _ioc(0xC0000000, group, number, ctypes.sizeof(argument))


class KfilterMapping(ctypes.Structure):
    """``struct kfilter_mapping``: a filter's name and number (sys/event.h)."""

    _fields_ = (("name", ctypes.c_void_p), ("len", ctypes.c_size_t), ("filter", ctypes.c_uint32))


KFILTER_BYFILTER = iowr("k", 0, KfilterMapping)
KFILTER_BYNAME = iowr("k", 1, KfilterMapping)
KFILTER_MAXNAME = 256  # bytes, with the final NUL: kern_event.c

#: Interrupt ``kevent``: the ioctl that pykq's kernel patch adds. No argument.
KQUEUE_TICKLE = io("k", 2)
