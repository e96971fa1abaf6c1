"""The C side: ``struct kevent`` and ``struct timespec``, the entry points that take them, ioctl numbers.

tests/host checks sizes, offsets and numbers against a compiler and NetBSD's headers.
"""

import ctypes
import struct
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property

from pykq._constants import EV, EVFILT, NOTES


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
    return f"{kind.__name__}.{kind(value).name}" if kind and value > 0 else f"{value:#x}"


class Kevent50(KeventFields, ctypes.Structure):
    """``struct kevent`` of NetBSD 6 to 10. The two pointers are given as numbers."""

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


@dataclass(frozen=True)
class Abi:
    """One layout of ``struct kevent`` and the call that takes it.

    ``entry``: the call's name, ``__entry`` in libc and ``rump___sysimpl_entry`` in a rump kernel. Plain
    ``kevent`` is the entry of NetBSD 5 and before (32-bit time_t), and never used.
    ``since``: the first release to have it.
    """

    entry: str
    kevent: type[Kevent50] | type[Kevent100]
    since: str

    @cached_property
    def codec(self) -> struct.Struct:
        """The six numbers, packed and unpacked: many times faster than field by field."""
        codes = "".join(kind._type_ for _, kind in Kevent50._fields_)
        rest = ctypes.sizeof(self.kevent) - struct.calcsize(codes)
        return struct.Struct(f"{codes}{rest}x")


# Newest first: the first whose entry point is there is used. Source: sys/event.h and syscalls.master of the
# releases named; kevent100 came to NetBSD-current in July 2023.
ABIS = (
    Abi("kevent100", Kevent100, "NetBSD 11"),
    Abi("kevent50", Kevent50, "NetBSD 6"),
)

TIMESPEC = struct.Struct("@ql0q")  # 64-bit time_t, long, aligned as in C: sys/timespec.h, NetBSD 6 and later
POLL = TIMESPEC.pack(0, 0)

O_CLOEXEC = 0x00400000  # sys/fcntl.h; the host's number may be another, and a rump kernel wants NetBSD's


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
