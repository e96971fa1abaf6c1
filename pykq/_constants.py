"""NetBSD's names for filters, actions and notes (sys/event.h), as enums that print their names.

They are pykq's numbers on every system. NetBSD counts its filters from 0 upward, the others from -1
downward, each in its own order: pykq translates, on the way in and out. On the way in a system's own negative
number, such as ``select.KQ_FILTER_READ``, will do as well. Timers have other notes elsewhere, which pykq
translates on the way in; those of an event are the system's. All other numbers are the same on all systems,
but for ``NoteVnode.OPEN`` to ``READ``: NetBSD and FreeBSD only.
"""

from enum import IntEnum, IntFlag


class EVFILT(IntEnum):
    """Filters: what to watch. The comment says what ``ident`` and an event's ``data`` are."""

    READ = 0  # ident: a descriptor that can be read; data: bytes there to read, or connections to accept
    WRITE = 1  # ident: a descriptor that can be written; data: bytes of room
    AIO = 2  # asynchronous I/O requests; not implemented by the kernel
    VNODE = 3  # ident: an open file; fflags: NoteVnode
    PROC = 4  # ident: a process id; fflags: NoteProc; data: exit status, or child's process id
    SIGNAL = 5  # ident: a signal number; data: how often it came
    TIMER = 6  # ident: any number; data in: the period, in ms unless NoteTimer says so; data out: expirations
    FS = 7  # a file system was mounted or unmounted, or its server stopped answering
    USER = 8  # ident: any number; triggered by NoteUser.TRIGGER; NetBSD 10 and later
    EMPTY = 9  # a socket's send buffer has drained; NetBSD 10 and later


class EV(IntFlag):
    """Actions on a change, flags of an event."""

    ADD = 0x0001  # add the event, or modify it; enables it
    DELETE = 0x0002  # remove the event
    ENABLE = 0x0004  # report the event again after DISABLE or DISPATCH
    DISABLE = 0x0008  # keep the event and do not report it
    ONESHOT = 0x0010  # remove the event when it has been reported once
    CLEAR = 0x0020  # reset its state when it has been reported: edge, not level
    RECEIPT = 0x0040  # answer the change with an ERROR event, data 0 when it went well
    DISPATCH = 0x0080  # disable the event when it has been reported once
    FLAG1 = 0x2000  # free for the filter's use
    ERROR = 0x4000  # out: the change failed, data is the kernel's errno number: NetBSD's in a rump kernel
    EOF = 0x8000  # out: the other end has closed


class NoteReadWrite(IntFlag):
    """Notes of EVFILT.READ and WRITE."""

    LOWAT = 0x0001  # in: data is the least number of bytes worth reporting


class NoteVnode(IntFlag):
    """Notes of EVFILT.VNODE: in, what to watch for; out, what happened."""

    DELETE = 0x0001  # unlinked
    WRITE = 0x0002  # contents changed
    EXTEND = 0x0004  # grew
    ATTRIB = 0x0008  # attributes changed
    LINK = 0x0010  # link count changed
    RENAME = 0x0020  # renamed
    REVOKE = 0x0040  # access revoked, or file system unmounted
    OPEN = 0x0080  # opened; this and the next three: NetBSD 10 and FreeBSD; other bits elsewhere
    CLOSE = 0x0100  # a descriptor that could not write was closed
    CLOSE_WRITE = 0x0200  # a descriptor that could write was closed
    READ = 0x0400  # read from


class NoteProc(IntFlag):
    """Notes of EVFILT.PROC."""

    TRACK = 0x00000001  # in: watch the children, too
    TRACKERR = 0x00000002  # out: a child could not be watched
    CHILD = 0x00000004  # out: this process is a child of one watched
    EXEC = 0x20000000  # ran another program
    FORK = 0x40000000  # forked
    EXIT = 0x80000000  # exited


class NoteTimer(IntFlag):
    """Notes of EVFILT.TIMER: the unit of data, which is milliseconds without one. NetBSD 10 and later."""

    SECONDS = 0x0001  # data is seconds
    USECONDS = 0x0002  # data is microseconds
    NSECONDS = 0x0003  # data is nanoseconds
    ABSTIME = 0x0010  # data is a time of the real-time clock, not a period


class NoteUser(IntFlag):
    """Notes of EVFILT.USER. The low 24 bits of fflags are the program's own."""

    TRIGGER = 0x01000000  # in: make the event happen
    AND = 0x40000000  # in: the stored bits become stored & fflags
    OR = 0x80000000  # in: stored | fflags
    COPY = 0xC0000000  # in: fflags


NOTES: dict[int, type[IntFlag]] = {
    EVFILT.READ: NoteReadWrite,
    EVFILT.WRITE: NoteReadWrite,
    EVFILT.VNODE: NoteVnode,
    EVFILT.PROC: NoteProc,
    EVFILT.TIMER: NoteTimer,
    EVFILT.USER: NoteUser,
}
