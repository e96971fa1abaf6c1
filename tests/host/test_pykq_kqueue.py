"""What Kqueue makes of a kernel's answers, in an order that a real kernel gives only once in a long while."""

import ctypes
import errno
import math
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pykq
from pykq import Kevent, _abi


class ScriptedKernel(pykq.Kernel):
    """Answers kevent with one of its answers after the other: a number of events, or the name of an error."""

    name = "scripted"
    abi = _abi.ABIS[0]

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = []  # (number of changes, timespec, buffer) of each kevent
        self.during_ioctl = lambda: None
        self.kqueues = weakref.WeakValueDictionary()
        self.plain_ioctl = self.ioctl
        self.look = self.kevent

    def kqueue(self):
        return 77

    def close(self, fd):
        assert fd == 77

    def ioctl(self, fd, request, argument=None):
        assert (fd, request) == (77, pykq.KQUEUE_TICKLE)
        self.during_ioctl()

    def kevent(self, fd, changes, nchanges, events, nevents, timespec):
        self.calls.append((nchanges, timespec, events))
        answer = self.answers.pop(0)
        if isinstance(answer, int):
            return answer
        ctypes.set_errno(getattr(errno, answer))
        return -1


def seconds(timespec):
    whole, nanoseconds = _abi.TIMESPEC.unpack(timespec)
    return whole + nanoseconds / 1e9


def test_after_a_signal_the_wait_goes_on_without_the_changes_and_with_the_time_that_remains():
    kernel = ScriptedKernel("EINTR", "EINTR", 1)
    assert len(pykq.Kqueue(kernel).kevent([Kevent(5)], timeout=10)) == 1
    assert [changes for changes, *_ in kernel.calls] == [1, 0, 0]
    first, second, third = (seconds(timespec) for _, timespec, _ in kernel.calls)
    assert first == 10 > second > third > 0


def test_after_a_signal_a_wait_without_a_timeout_has_none():
    kernel = ScriptedKernel("EINTR", 1)
    pykq.Kqueue(kernel).kevent()
    assert [timespec for _, timespec, _ in kernel.calls] == [None, None]


def test_after_a_signal_a_wait_whose_time_is_over_returns():
    kernel = ScriptedKernel("EINTR")
    assert pykq.Kqueue(kernel).kevent(timeout=1e-9) == []


def test_one_tickle_is_reported_once():
    kernel = ScriptedKernel("EINTR", "EINTR", 0)
    kq = pykq.Kqueue(kernel)
    kq.tickle()
    with pytest.raises(pykq.Tickled):
        kq.kevent(timeout=10)
    assert kq.kevent(timeout=10) == [], "the next EINTR is a signal's"


def test_a_tickle_is_not_lost_when_a_wait_returns_before_its_ioctl():
    kernel = ScriptedKernel(1, "EINTR")
    kq = pykq.Kqueue(kernel)
    kernel.during_ioctl = lambda: kq.kevent(timeout=10)
    kq.tickle()
    kernel.during_ioctl = lambda: None
    with pytest.raises(pykq.Tickled):
        kq.kevent(timeout=10)


def test_a_tickle_that_events_consumed_turns_the_next_signal_into_one():
    """The price of the rule above, as the docstring says."""
    kernel = ScriptedKernel(1, "EINTR")
    kq = pykq.Kqueue(kernel)
    kq.tickle()
    kq.kevent()
    with pytest.raises(pykq.Tickled):
        kq.kevent()


def test_a_tickle_that_the_kernel_refuses_leaves_signals_alone():
    kernel = ScriptedKernel("EINTR", 0)
    kq = pykq.Kqueue(kernel)

    def refuse():
        raise OSError(errno.ENOTTY, "no such ioctl")

    kernel.during_ioctl = refuse
    with pytest.raises(pykq.TickleNotSupported, match="scripted"):
        kq.tickle()
    assert kq.kevent(timeout=10) == []


def test_an_error_has_the_name_of_the_call():
    with pytest.raises(OSError, match="kevent: ") as caught:
        pykq.Kqueue(ScriptedKernel("EFAULT")).kevent()
    assert caught.value.errno == errno.EFAULT


def test_a_wait_that_is_closed_meanwhile_is_a_value_error():
    kernel = ScriptedKernel("EBADF")
    with pykq.Kqueue(kernel) as kq:
        wait, kq._kevent = kq._kevent, lambda *args: (kq.close(), wait(*args))[1]
        with pytest.raises(ValueError, match="closed"):
            kq.kevent()


def test_waits_share_a_buffer_unless_they_overlap():
    kernel = ScriptedKernel(0, "EINTR", 0, 0)
    kq = pykq.Kqueue(kernel)
    kq.kevent(timeout=0)
    kq.tickle()
    with pytest.raises(pykq.Tickled):
        kq.kevent(timeout=1)
    kq.kevent(timeout=0)
    kq.kevent(max_events=3, timeout=0)
    first, second, third, of_three = (buffer for *_, buffer in kernel.calls)
    assert first is second is third is not of_three


def test_a_buffer_is_empty_after_a_tickle():
    kq = pykq.Kqueue(ScriptedKernel(1, "EINTR"))
    events = kq.buffer()
    assert len(kq.kevent(into=events)) == 1
    kq.tickle()
    with pytest.raises(pykq.Tickled):
        kq.kevent(into=events)
    assert len(events) == 0


def test_a_buffer_for_another_struct_kevent_is_refused():
    other = ScriptedKernel()
    other.abi = _abi.ABIS[1]
    with pytest.raises(ValueError, match="another struct kevent"):
        pykq.Kqueue(ScriptedKernel()).kevent(into=pykq.Kqueue(other).buffer())


@given(timeout=st.floats(0, 1e8, exclude_min=True))
def test_a_timeout_is_rounded_up(timeout):
    kernel = ScriptedKernel(0)
    pykq.Kqueue(kernel).kevent(timeout=timeout)
    whole, nanoseconds = _abi.TIMESPEC.unpack(kernel.calls[0][1])
    assert 0 <= nanoseconds < 10**9
    assert whole * 10**9 + nanoseconds == math.ceil(timeout * 1e9) > 0


@pytest.mark.parametrize("timeout", [1.0000001e8, 1e300, math.inf])
def test_a_huge_timeout_is_none(timeout):
    kernel = ScriptedKernel(0)
    pykq.Kqueue(kernel).kevent(timeout=timeout)
    assert kernel.calls[0][1] is None


@pytest.mark.parametrize("timeout", [0, 0.0, -0.0, False])
def test_no_timeout_at_all_is_a_look(timeout):
    kernel = ScriptedKernel(0)
    pykq.Kqueue(kernel).kevent(timeout=timeout)
    assert kernel.calls[0][1] == _abi.POLL
