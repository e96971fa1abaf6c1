"""The C side: ``struct kevent`` and ``struct timespec``, the entry points that take them, ioctl numbers.

Structures are ``struct`` formats in native mode, which aligns as the C compiler does; a trailing ``0q``
rounds the size up as C does for arrays. tests/host checks sizes and offsets against a compiler and
NetBSD's headers.
"""

import ctypes
import struct
from typing import NamedTuple


class Abi(NamedTuple):
    """One layout of ``struct kevent`` and the call that takes it.

    ``kevent``: fields ident, filter, flags, fflags, data, udata; what follows them is sent as zeros and
    not read. ``entry``: the call's name, ``__entry`` in libc and ``rump___sysimpl_entry`` in a rump
    kernel. Plain ``kevent`` is the entry from before NetBSD 5.99 (32-bit time_t), and never used.
    ``since``: the first release to have it.
    """

    entry: str
    kevent: struct.Struct
    since: str


# Newest first: the first whose entry point is there is used. Source: sys/event.h and syscalls.master of the
# releases named. kevent100 brought ext[4], four words for the program's own use, in 10.99.5 (July 2023).
ABIS = (
    Abi("kevent100", struct.Struct("@NIIIqP0Q32x0q"), "NetBSD 11"),
    Abi("kevent50", struct.Struct("@NIIIqP0q"), "NetBSD 6"),
)

TIMESPEC = struct.Struct("@ql0q")  # 64-bit time_t, long: sys/timespec.h, NetBSD 6 and later
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
