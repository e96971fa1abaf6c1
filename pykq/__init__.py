"""A kqueue whose ``kevent`` can be interrupted: KQUEUE_TICKLE for NetBSD, through ctypes.

    with pykq.Kqueue() as kq:
        kq.kevent([pykq.Kevent(sock, pykq.EVFILT.READ)], 0)
        try:
            for event in kq.kevent():       # sleeps; another thread calls kq.tickle()
                ...
        except pykq.Tickled:
            ...                             # something besides the events wants attention

``Kqueue`` is the object around the descriptor, ``Kevent`` one change or one event, ``Tickled`` what an
interrupted wait raises. The kernel is the running system's or a rump kernel, NetBSD's kernel code as a
library in this process: ``load_kernel`` says how it is chosen. Nothing is loaded before the first
``Kqueue`` is opened, so the import works on any system.
"""

from pykq._abi import KQUEUE_TICKLE, KeventFields
from pykq._constants import EV, EVFILT, NoteProc, NoteReadWrite, NoteTimer, NoteUser, NoteVnode
from pykq._events import Events, Kevent
from pykq._kernel import Kernel, KernelUnavailable, TickleNotSupported, load_kernel
from pykq._kqueue import Kqueue, Tickled, tickle
from pykq._mechanism import Mechanism
from pykq._selector import TickleSelector

__version__ = "0.1.0"

__all__ = [
    "EV",
    "EVFILT",
    "KQUEUE_TICKLE",
    "Events",
    "Kernel",
    "KernelUnavailable",
    "Kevent",
    "KeventFields",
    "Kqueue",
    "Mechanism",
    "NoteProc",
    "NoteReadWrite",
    "NoteTimer",
    "NoteUser",
    "NoteVnode",
    "TickleNotSupported",
    "TickleSelector",
    "Tickled",
    "load_kernel",
    "tickle",
]
