"""The C side of pykq: its encoders, and its numbers against NetBSD's headers, which PyPI's ziglang has."""

import ctypes
import subprocess
import sys
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pykq
from pykq import _abi, _kernel
from pykq._constants import EV, EVFILT, NoteProc, NoteReadWrite, NoteTimer, NoteUser, NoteVnode
from pykq._kqueue import Events, Kevent

ABIS = pytest.mark.parametrize("abi", _abi.ABIS, ids=lambda abi: abi.entry)

kevents = st.builds(
    Kevent,
    ident=st.integers(0, 2**64 - 1),
    filter=st.integers(0, 2**32 - 1),
    flags=st.integers(0, 2**32 - 1),
    fflags=st.integers(0, 2**32 - 1),
    data=st.integers(-(2**63), 2**63 - 1),
    udata=st.integers(0, 2**64 - 1),
)


@ABIS
@given(change=kevents)
def test_a_change_is_what_c_reads(abi, change):
    assert abi.codec.size == ctypes.sizeof(abi.kevent)
    c = abi.kevent.from_buffer_copy(abi.codec.pack(*change))
    assert (c.ident, c.filter, c.flags, c.fflags, c.data, c.udata) == change
    assert list(getattr(c, "ext", [])) in ([], [0, 0, 0, 0])


@ABIS
@given(written=st.lists(kevents, max_size=5))
def test_events_are_what_c_wrote(abi, written):
    events = Events(abi, 5)
    for c, event in zip(events._array, written, strict=False):
        c.ident, c.filter, c.flags, c.fflags, c.data, c.udata = event
    events._count = len(written)
    assert events.copy() == written
    assert [(c.ident, c.filter, c.flags, c.fflags, c.data, c.udata) for c in events] == written


@given(event=kevents)
def test_every_event_has_a_repr(event):
    assert repr(event).startswith(f"Kevent(ident={event.ident}, filter=")


def test_a_repr_names_the_constants():
    event = Kevent(5, EVFILT.VNODE, EV.ADD | EV.CLEAR, NoteVnode.WRITE | NoteVnode.RENAME, -1, 0xBEEF)
    names = "filter=EVFILT.VNODE, flags=EV.ADD|CLEAR, fflags=NoteVnode.WRITE|RENAME"
    assert repr(event) == f"Kevent(ident=5, {names}, data=-1, udata=0xbeef)"


def test_kqueue_tickle_is_the_number_in_the_design():
    assert pykq.KQUEUE_TICKLE == 0x20006B02


def test_netbsd_release_numbers():
    assert [_kernel._release(number) for number in (1099001200, 1001000000, 799001000, 1100000000)] == [
        "10.99.12",
        "10.1",
        "7.99.10",
        "11.0",
    ]


# Against NetBSD's headers: those of 10.1 came with ziglang 0.15, those of 11 with 0.17.


def numbers():
    for field in ("ident", "filter", "flags", "fflags", "data", "udata"):
        yield f"offsetof(struct kevent, {field})", getattr(_abi.Kevent50, field).offset
    yield "sizeof(struct timespec)", _abi.TIMESPEC.size
    yield "offsetof(struct timespec, tv_nsec)", 8
    yield "sizeof(struct kfilter_mapping)", ctypes.sizeof(_abi.KfilterMapping)
    yield "KFILTER_BYFILTER", _abi.KFILTER_BYFILTER
    yield "KFILTER_BYNAME", _abi.KFILTER_BYNAME
    yield "_IO('k', 2)", pykq.KQUEUE_TICKLE
    yield "O_CLOEXEC", _abi.O_CLOEXEC
    for number, name in _kernel._NETBSD_ERRNO.items():
        yield name, number
    yield "ELAST", max(_kernel._NETBSD_ERRNO)
    for filter in EVFILT:
        yield f"EVFILT_{filter.name}", filter
    for flag in EV:
        yield f"EV_{flag.name}", flag
    for notes in (NoteProc, NoteReadWrite, NoteTimer, NoteVnode):
        for note in notes.__members__.values():
            yield f"NOTE_{note.name}", note
    yield "NOTE_TRIGGER", NoteUser.TRIGGER
    for name in ("AND", "OR", "COPY"):
        yield f"NOTE_FF{name}", NoteUser[name]


INCLUDES = """
#include <sys/types.h>
#include <sys/event.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <time.h>
"""


@pytest.mark.skipif(find_spec("ziglang") is None, reason="needs PyPI's ziglang, for NetBSD's headers")
def test_all_numbers_are_those_of_netbsds_headers(tmp_path):
    source = tmp_path / "check.c"
    sizes = " || ".join(f"sizeof(struct kevent) == {abi.codec.size}" for abi in _abi.ABIS)
    checks = [sizes, *(f"{c} == {int(number)}u" for c, number in numbers())]
    source.write_text(INCLUDES + "".join(f'_Static_assert({check}, "{check}");\n' for check in checks))
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-netbsd", "-D_NETBSD_SOURCE"]
    done = subprocess.run(
        [*compiler, "-c", str(source), "-o", str(tmp_path / "check.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
