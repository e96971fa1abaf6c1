"""What needs a whole NetBSD: select.kqueue, select and poll, the kernel's view of signals, fork and exec."""

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest

import pykq
from pykq import EV, EVFILT, Kevent, NoteProc, NoteVnode
from pykq._abi import io

LONG_S = 30.0


@pytest.fixture(autouse=True)
def system(kernel, watchdog):
    if not kernel.shares_descriptors or kernel.abi.system != "NetBSD":
        pytest.skip(f"not NetBSD as the running system: {kernel.name}")


@pytest.fixture
def patched(tickling):
    if not tickling:
        pytest.skip("this kernel has no KQUEUE_TICKLE")


def test_select_kqueue_swallows_a_tickle(waiter, patched, short_s):
    with contextlib.closing(select.kqueue()) as kq:
        asleep = waiter(kq.control, None, 1, 5 * short_s).fall_asleep()
        pykq.tickle(kq)
        assert asleep.outcome() == []
        assert asleep.took_s >= 5 * short_s - 0.02, "it slept on for the time that remained"


def test_a_stock_kernel_is_named_whatever_is_tickled(kernel, tickling):
    if tickling:
        pytest.skip("this kernel has KQUEUE_TICKLE")
    with contextlib.closing(select.kqueue()) as kq:
        for it in (kq, kq.fileno()):
            with pytest.raises(pykq.TickleNotSupported, match="has no KQUEUE_TICKLE"):
                pykq.tickle(it)


def test_a_kqueue_object_is_found_by_its_descriptor(kq, patched):
    """So that its wait raises Tickled. A bare ioctl would pass for a signal there."""
    pykq.tickle(kq.fileno())
    with pytest.raises(pykq.Tickled):
        kq.kevent(timeout=LONG_S)


def test_a_bare_ioctl_passes_for_a_signal(kq, raw, patched, short_s):
    fcntl.ioctl(kq, pykq.KQUEUE_TICKLE)
    assert kq.kevent(timeout=short_s) == []


@pytest.mark.parametrize("what", ["a pipe", "no descriptor"])
def test_tickling_what_is_no_kqueue_is_an_os_error(pipe, what):
    with pytest.raises(OSError):
        pykq.tickle(pipe[0] if what == "a pipe" else 1 << 20)


def test_t8_a_tickle_does_not_make_it_readable_for_select_and_poll(
    kq, raw, tickle, waiter, patience, interrupted
):
    tickle(kq)
    assert select.select([kq], [], [], 0) == ([], [], [])
    poll = select.poll()
    poll.register(kq, select.POLLIN)
    assert poll.poll(0) == []
    assert waiter(raw, kq, timeout=patience).outcome() == interrupted


def test_t8_an_event_does(kq, pipe):
    kq.kevent([Kevent(pipe[0])], 0)
    os.write(pipe[1], b"x")
    assert select.select([kq], [], [], LONG_S) == ([kq], [], [])


def test_t9_a_tickle_allocates_no_memory(kq, tickle, tickling):
    """By the kernel's own count, to which the rest of the system adds a little. Any other ioctl, and so a
    tickle on a stock kernel, allocates room for a filter's name before the command is looked at."""
    times = 1000

    def allocated(body):
        before = kernel_allocations()
        for _ in range(times):
            body()
        return kernel_allocations() - before

    def unknown():
        with contextlib.suppress(OSError):
            fcntl.ioctl(kq, io("k", 99))

    if allocated(unknown) < times:
        pytest.skip("this kernel's count leaves out what its caches hand out")
    counted = allocated(lambda: tickle(kq))
    assert counted < times / 2 if tickling else counted >= times


def kernel_allocations():
    """How often kmem(9) has been asked for memory: struct pool_sysctl of sys/pool.h, a name and 26
    numbers, of
    which the last two count the requests to a pool's caches."""
    pool = struct.Struct("@16s26Q")
    buffer = ctypes.create_string_buffer(2000 * pool.size)
    size = ctypes.c_size_t(len(buffer))
    libc = ctypes.CDLL(None)
    assert libc.sysctlbyname(b"kern.pool", buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) == 0
    pools = pool.iter_unpack(buffer[: size.value])
    return sum(misses + hits for name, *_, misses, hits in pools if name.startswith(b"kmem-"))


def test_the_kernel_says_eintr_for_a_signal(kq, raw, once_asleep):
    ran = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: ran.append(number))
    try:
        once_asleep(lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1))
        with pytest.raises(InterruptedError):
            raw(kq)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ran == [signal.SIGUSR1]


def test_t10_the_child_of_a_fork_has_no_kqueue(kq, tickle):
    tickle(kq)
    fd = kq.fileno()
    pid = os.fork()
    if pid == 0:
        try:
            os.fstat(fd)
        except OSError as error:
            os._exit(0 if error.errno == errno.EBADF else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_child_of_a_fork_has_not_the_hidden_pipe(kernel, watchdog):
    with pykq.Kqueue(kernel, mechanism="pipe") as kq:
        fds = kq._waker._fds
        pid = os.fork()
        if pid == 0:
            try:
                for fd in fds:
                    with pytest.raises(OSError):
                        os.fstat(fd)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        kq.tickle()
        with pytest.raises(pykq.Tickled):
            kq.kevent(timeout=LONG_S)


def test_closing_closes_the_hidden_pipe(kernel):
    with pykq.Kqueue(kernel, mechanism="pipe") as kq:
        fds = kq._waker._fds
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_kqueue_is_closed_on_exec(kq):
    assert not os.get_inheritable(kq.fileno())


def test_t10_a_kqueue_that_is_not_closed_on_exec_can_be_tickled_after_it(tickling):
    program = """
import os, sys, pykq
if len(sys.argv) > 1:
    try:
        kq = pykq.Kqueue.from_fd(int(sys.argv[1]), mechanism="KQUEUE_TICKLE")
        kq.tickle()
        kq.kevent()
    except OSError as error:
        print(type(error).__name__)
else:
    kq = pykq.Kqueue()
    os.set_inheritable(kq.fileno(), True)
    os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[-1], str(kq.fileno())])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=4 * LONG_S)
    assert done.stdout == ("Tickled\n" if tickling else "TickleNotSupported\n"), done.stderr


def test_a_descriptor_closed_behind_its_back_is_an_os_error(kernel):
    kq = pykq.Kqueue(kernel)
    os.close(kq.fileno())
    with pytest.raises(OSError, match="kevent: ") as caught:
        kq.kevent(timeout=0)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:  # the ioctl's own: see tickle()
        kq.tickle()
    assert caught.value.errno == errno.EBADF
    kq._forget()


def test_no_descriptor_left_is_an_os_error(kernel):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1, hard))
    try:
        with pytest.raises(OSError, match="kqueue1: ") as caught:
            for _ in range(soft):
                taken.append(pykq.Kqueue(kernel))
        assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_objects_with_a_descriptor_can_be_watched(kq):
    left, right = socket.socketpair()
    with left, right:
        kq.kevent([Kevent(left), Kevent(left, EVFILT.WRITE)], 0)
        assert [event.filter for event in kq.kevent(timeout=LONG_S)] == [EVFILT.WRITE]
        right.send(b"abc")
        read = [event for event in kq.kevent(timeout=LONG_S) if event.filter == EVFILT.READ]
        assert [(event.ident, event.data) for event in read] == [(left.fileno(), 3)]


def test_a_file_is_watched(kq, tmp_path):
    with open(tmp_path / "file", "w") as file:
        kq.kevent([Kevent(file, EVFILT.VNODE, EV.ADD | EV.CLEAR, NoteVnode.WRITE | NoteVnode.DELETE)], 0)
        print("something", file=file, flush=True)
        (event,) = kq.kevent(timeout=LONG_S)
        assert event.fflags & NoteVnode.WRITE
        (tmp_path / "file").unlink()
        (event,) = kq.kevent(timeout=LONG_S)
        assert event.fflags & NoteVnode.DELETE


def test_a_process_is_watched(kq):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        kq.kevent([Kevent(process.pid, EVFILT.PROC, fflags=NoteProc.EXIT)], 0)
        process.stdin.close()
        (event,) = kq.kevent(timeout=LONG_S)
        assert event.fflags & NoteProc.EXIT


def test_a_signal_is_watched(kq):
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        kq.kevent([Kevent(signal.SIGUSR2, EVFILT.SIGNAL)], 0)
        os.kill(os.getpid(), signal.SIGUSR2)
        (event,) = kq.kevent(timeout=LONG_S)
        assert (event.ident, event.data) == (signal.SIGUSR2, 1)
    finally:
        signal.signal(signal.SIGUSR2, before)
