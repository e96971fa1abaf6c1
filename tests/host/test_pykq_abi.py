"""The C side of pykq: its encoders, and its numbers against the systems' headers, from ziglang."""

import ctypes
import subprocess
import sys
import types
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pykq
from pykq import _abi, _kernel
from pykq._constants import EV, EVFILT, NOTES, NoteProc, NoteReadWrite, NoteTimer, NoteUser, NoteVnode
from pykq._kqueue import Events, Kevent

ABIS = pytest.mark.parametrize("abi", _abi.ABIS, ids=lambda abi: f"{abi.system}-{abi.since}")
ROOM = 5


def kevents(abi):
    """Any change or event of a system; its filter is one that pykq has a number for, or has not."""
    own = abi.filters
    bits = 16 if own else 32
    filters = st.sampled_from(sorted(own)) | st.integers(-(2**15), -20) if own else st.integers(0, 2**32 - 1)
    return st.builds(
        Kevent,
        ident=st.integers(0, 2**64 - 1),
        filter=filters,
        flags=st.integers(0, 2**bits - 1),
        fflags=st.integers(0, 2**32 - 1),
        data=st.integers(-(2**63), 2**63 - 1),
        udata=st.integers(0, 2**64 - 1),
    ).map(lambda one: one._replace(fflags=0) if own and one.filter == EVFILT.TIMER else one)


@ABIS
@given(data=st.data())
def test_a_change_is_what_c_reads(abi, data):
    assert abi.codec.size == ctypes.sizeof(abi.kevent)
    change = data.draw(kevents(abi))
    c = abi.kevent.from_buffer_copy(abi.pack(*change))
    assert (c.ident, c.filter, c.flags, c.data, c.udata) == change[:3] + change[4:]
    assert c.fflags == (abi.timer[0] if abi.filters and change.filter == EVFILT.TIMER else change.fflags)
    assert list(getattr(c, "ext", [])) in ([], [0, 0, 0, 0])


# What a timer's notes are on each system: milliseconds, SECONDS, USECONDS, NSECONDS; and ABSTIME.
TIMERS = {
    "NetBSD": ((0, 1, 2, 3), 0x10),
    "FreeBSD": ((2, 1, 4, 8), 0x10),
    "OpenBSD": ((0, 1, 2, 3), 0x10),
    "DragonFly": ((0, None, None, None), None),
    "Darwin": ((0, 1, 2, 4), 8),
    "libkqueue": ((0, 1, 2, 4), 8),
}


@ABIS
@pytest.mark.parametrize("unit", [0, NoteTimer.SECONDS, NoteTimer.USECONDS, NoteTimer.NSECONDS])
@pytest.mark.parametrize("absolute", [0, NoteTimer.ABSTIME])
def test_a_timers_notes_are_the_systems(abi, unit, absolute):
    units, systems_absolute = TIMERS[abi.system]
    systems = (units[unit], systems_absolute if absolute else 0)

    def packed():
        # A bit that is no note goes through.
        return abi.kevent.from_buffer_copy(abi.pack(1, EVFILT.TIMER, EV.ADD, unit | absolute | 0x800, 5, 0))

    if None in systems:
        with pytest.raises(ValueError, match="DragonFly's timers count milliseconds"):
            packed()
    else:
        assert packed().fflags == sum(systems) | 0x800


@ABIS
@given(data=st.data())
def test_events_are_what_c_wrote(abi, data):
    written = data.draw(st.lists(kevents(abi), max_size=ROOM))
    events = filled(abi, written)
    assert events.copy() == written
    assert [(c.ident, c.filter, c.flags, c.fflags, c.data, c.udata) for c in events] == written


@ABIS
@given(data=st.data())
def test_the_hidden_event_is_taken_out_and_no_other(abi, data):
    written = data.draw(st.lists(kevents(abi), min_size=1, max_size=ROOM))
    hidden = data.draw(st.sampled_from(written))
    events = filled(abi, written)
    assert events._remove(abi.pack(*hidden)[: abi.kevent.flags.offset])
    first = [(event.ident, event.filter) for event in written].index((hidden.ident, hidden.filter))
    assert events.copy() == written[:first] + written[first + 1 :]


@ABIS
@given(data=st.data())
def test_what_is_not_there_is_not_taken_out(abi, data):
    """Its bytes in the middle of other events are not it: here every event's udata is its ident."""
    ident = data.draw(st.integers(1, 2**64 - 1))
    written = [Kevent(0, EVFILT.READ, 0, 0, -1, ident)] * ROOM
    events = filled(abi, written)
    assert not events._remove(abi.pack(ident, EVFILT.READ, 0, 0, 0, 0)[: abi.kevent.flags.offset])
    assert events.copy() == written


def filled(abi, written):
    events = Events(abi, ROOM)
    for n, event in enumerate(written):
        c = event._replace(filter=abi.filters.get(event.filter, event.filter))
        ctypes.memmove(ctypes.byref(events._array[n]), abi.codec.pack(*c), abi.codec.size)
    events._count = len(written)
    return events


@given(event=kevents(_abi.ABIS[0]))
def test_every_event_has_a_repr(event):
    assert repr(event).startswith(f"Kevent(ident={event.ident}, filter=")


def test_what_has_the_six_numbers_is_a_change():
    other = types.SimpleNamespace(ident=1, filter=2, flags=3, fflags=4, data=5, udata=6)  # as select.kevent
    assert Kevent.of(other) == (1, 2, 3, 4, 5, 6)


def test_a_repr_names_the_constants():
    event = Kevent(5, EVFILT.VNODE, EV.ADD | EV.CLEAR, NoteVnode.WRITE | NoteVnode.RENAME, -1, 0xBEEF)
    names = "filter=EVFILT.VNODE, flags=EV.ADD|CLEAR, fflags=NoteVnode.WRITE|RENAME"
    assert repr(event) == f"Kevent(ident=5, {names}, data=-1, udata=0xbeef)"


@pytest.mark.parametrize(
    ("filter", "flags", "fflags", "shown"),
    [
        (EVFILT.READ, 0x1000, 0x10, "flags=0x1000, fflags=0x10"),
        (EVFILT.READ, EV.ADD | 0x1000, 0, "flags=EV.ADD|0x1000, fflags=0x0"),
        (EVFILT.USER, 0, NoteUser.COPY | NoteUser.TRIGGER, "fflags=NoteUser.COPY|TRIGGER"),
        (EVFILT.USER, 0, NoteUser.OR | 0xAB, "fflags=NoteUser.OR|0xab"),
        (EVFILT.TIMER, 0, NoteTimer.NSECONDS | NoteTimer.ABSTIME, "fflags=NoteTimer.NSECONDS|ABSTIME"),
        (EVFILT.SIGNAL, 0, 5, "fflags=0x5"),
    ],
)
def test_a_repr_shows_bits_without_a_name_as_a_number(filter, flags, fflags, shown):
    assert f"{shown}, data=" in repr(Kevent(1, filter, flags, fflags))


@pytest.mark.parametrize("kind", [EV, *dict.fromkeys(NOTES.values())])
@given(value=st.integers(0, 2**32 - 1))
def test_what_a_repr_shows_is_all_of_the_bits(kind, value):
    parts = _abi._flags(kind, value).removeprefix(f"{kind.__name__}.").split("|")
    assert sum(int(part, 16) if part.startswith("0x") else kind[part] for part in parts) == value


def test_kqueue_tickle_is_the_number_in_the_design():
    assert pykq.KQUEUE_TICKLE == 0x20006B02


def test_netbsd_release_numbers():
    assert [_kernel._release(number) for number in (1099001200, 1001000000, 799001000, 1100000000)] == [
        "10.99.12",
        "10.1",
        "7.99.10",
        "11.0",
    ]


# Against the headers that ziglang 0.17 has: NetBSD's of 11, FreeBSD's, OpenBSD's and macOS's of today.


def layout(abi):
    """What is the same question for every system: expressions of C and their values."""
    yield "sizeof(struct kevent)", abi.codec.size
    for field in ("ident", "filter", "flags", "fflags", "data", "udata"):
        name = "_filter" if field == "filter" and abi.filters else field
        yield f"offsetof(struct kevent, {field})", getattr(abi.kevent, name).offset
        yield f"sizeof(((struct kevent *)0)->{field})", getattr(abi.kevent, name).size
    yield "sizeof(struct timespec)", _abi.TIMESPEC.size
    yield "offsetof(struct timespec, tv_nsec)", 8
    for filter in abi.filters or EVFILT:
        yield f"EVFILT_{EVFILT(filter).name}", abi.filters.get(filter, int(filter))
    for flag in EV:
        yield f"EV_{flag.name}", flag
    for notes in (NoteReadWrite, NoteProc):
        for note in notes.__members__.values():
            yield f"NOTE_{note.name}", note
    for note in (note for note in NoteVnode if note <= NoteVnode.REVOKE):
        yield f"NOTE_{note.name}", note
    yield "NOTE_TRIGGER", NoteUser.TRIGGER
    for name in ("AND", "OR", "COPY"):
        yield f"NOTE_FF{name}", NoteUser[name]
    absolute = "ABSOLUTE" if abi.system == "Darwin" else "ABSTIME"
    units = ("MSECONDS", "SECONDS", "USECONDS", "NSECONDS")
    for name, number in zip((*units, absolute), abi.timer, strict=True):
        if name != "MSECONDS" or number:  # without a note it is milliseconds
            yield f"NOTE_{name}", number


def netbsd():
    """What is asked of NetBSD alone."""
    yield "sizeof(struct kfilter_mapping)", ctypes.sizeof(_abi.KfilterMapping)
    yield "KFILTER_BYFILTER", _abi.KFILTER_BYFILTER
    yield "KFILTER_BYNAME", _abi.KFILTER_BYNAME
    yield "_IO('k', 2)", pykq.KQUEUE_TICKLE
    yield "O_CLOEXEC", _abi.O_CLOEXEC
    yield "O_NONBLOCK", _abi.O_NONBLOCK
    for number, name in _kernel._NETBSD_ERRNO.items():
        yield name, number
    yield "ELAST", max(_kernel._NETBSD_ERRNO)
    for note in NoteVnode:
        yield f"NOTE_{note.name}", note


INCLUDES = """
#include <sys/types.h>
#include <sys/event.h>
#include <sys/ioctl.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <time.h>
"""

# zig's name of a target, and the row whose struct kevent is in its headers.
TARGETS = {
    "x86_64-netbsd": ("NetBSD", "11"),
    "x86_64-freebsd": ("FreeBSD", "12"),
    "x86_64-openbsd": ("OpenBSD", "5.5"),
    "aarch64-macos": ("Darwin", "7"),
}


@pytest.mark.skipif(find_spec("ziglang") is None, reason="needs PyPI's ziglang, for the systems' headers")
@pytest.mark.parametrize("target", TARGETS)
def test_all_numbers_are_those_of_the_headers(target, tmp_path):
    (abi,) = [abi for abi in _abi.ABIS if (abi.system, abi.since) == TARGETS[target]]
    numbers = [*layout(abi), *(netbsd() if abi.system == "NetBSD" else ())]
    compile_checks(target, numbers, tmp_path)


@pytest.mark.skipif(find_spec("ziglang") is None, reason="needs PyPI's ziglang, for NetBSD's headers")
def test_kevent50_is_kevent100_without_its_last_words(tmp_path):
    """10.1's header is not in ziglang any more; the two differ in ext alone (sys/event.h 1.54 and 1.55)."""
    short, long = _abi.Kevent50, _abi.Kevent100
    assert [(name, getattr(short, name).offset) for name, _ in short._fields_] == [
        (name, getattr(long, name).offset) for name, _ in long._fields_[:-1]
    ]
    compile_checks("x86_64-netbsd", [("offsetof(struct kevent, ext)", ctypes.sizeof(short))], tmp_path)


def compile_checks(target, numbers, folder):
    source = folder / "check.c"
    lines = [f'_Static_assert((long long)({c}) == {int(number)}LL, "{c}");' for c, number in numbers]
    source.write_text(INCLUDES + "\n".join(lines) + "\n")
    # No checks at run time, which some targets have no library for; BSDs hide kqueue from strict standards.
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-D_NETBSD_SOURCE"]
    command += ["-fno-sanitize=all", "-c", str(source), "-o", str(folder / "check.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
