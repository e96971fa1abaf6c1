"""Kernels: the running system's, reached through libc, or a rump kernel loaded into this process.

Nothing here runs at import: ``load_kernel`` loads a kernel on first use and remembers it.
"""

import contextlib
import ctypes
import ctypes.util
import errno
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykq._abi import ABIS, KQUEUE_TICKLE, O_CLOEXEC, O_NONBLOCK, POLL, Abi
from pykq._mechanism import WAKERS, Mechanism

if TYPE_CHECKING:
    from pykq._kqueue import Kqueue


class KernelUnavailable(RuntimeError):
    """There is no kqueue to be had: the text says why, and what to do."""


class TickleNotSupported(OSError):
    """The kernel has no KQUEUE_TICKLE (``errno`` is ``ENOTTY``); the text names the kernel."""


# NetBSD's errno numbers (sys/errno.h): up to 34 all systems agree but for EDEADLK, and these follow, in
# order.
_ERRNO_NAMES = (
    "EAGAIN EINPROGRESS EALREADY ENOTSOCK EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT EPROTONOSUPPORT "
    "ESOCKTNOSUPPORT EOPNOTSUPP EPFNOSUPPORT EAFNOSUPPORT EADDRINUSE EADDRNOTAVAIL ENETDOWN ENETUNREACH "
    "ENETRESET ECONNABORTED ECONNRESET ENOBUFS EISCONN ENOTCONN ESHUTDOWN ETOOMANYREFS ETIMEDOUT "
    "ECONNREFUSED ELOOP ENAMETOOLONG EHOSTDOWN EHOSTUNREACH ENOTEMPTY EPROCLIM EUSERS EDQUOT ESTALE "
    "EREMOTE EBADRPC ERPCMISMATCH EPROGUNAVAIL EPROGMISMATCH EPROCUNAVAIL ENOLCK ENOSYS EFTYPE EAUTH "
    "ENEEDAUTH EIDRM ENOMSG EOVERFLOW EILSEQ ENOTSUP ECANCELED EBADMSG ENODATA ENOSR ENOSTR ETIME "
    "ENOATTR EMULTIHOP ENOLINK EPROTO EOWNERDEAD ENOTRECOVERABLE"
)
_NETBSD_ERRNO = {11: "EDEADLK"} | dict(enumerate(_ERRNO_NAMES.split(), start=35))

_ERESTART = -3  # sys/errno.h, inside the kernel only
_START_S = 1.0  # no thread takes longer to begin


class Kernel:
    """A kernel with a kqueue and the calls that pykq makes to it; get one from ``load_kernel``.

    Descriptors, in and out, are numbers that mean something to this kernel. What fails raises ``OSError``
    with the host's errno, and with the call's name where it is not Python's ``os`` or ``fcntl`` that made it.

    Attributes:
        name: for people: system, release, where the kernel is.
        abi: the layout of ``struct kevent`` in use.
        plain_ioctl: ``plain_ioctl(fd, request)``, an ioctl without an argument, the fastest there is.
        kevent: the bare call, ``kevent(fd, changes, nchanges, events, nevents, timespec)``: returns -1 on
            failure, then ``error("kevent")`` says what it was. For ``Kqueue`` and for tests of the
            kernel's own rules.
        look: the same call where it does not wait and errno is not looked at, if there is a faster one.
    """

    name: str
    plain_ioctl: Callable[[int, int], object]

    #: Whether its descriptors are the host's too, so that ``os`` and ``select`` can take them.
    shares_descriptors = True

    def __init__(self, library: ctypes.CDLL, abi: Abi, kevent: str) -> None:
        self._library = library
        self.abi = abi
        # No argtypes, here and below: they double the time of a call (2.2 us for 1.1, CPython 3.11). So
        # pointers are given as bytes, None or byref, and small numbers as int: a C int for ctypes, which
        # libffi widens to the register or stack slot that a size_t has.
        self.kevent: Callable[..., int] = getattr(library, kevent)
        self.look = self.kevent
        #: The open kqueues by descriptor, for ``pykq.tickle`` and for fork.
        self.kqueues: weakref.WeakValueDictionary[int, Kqueue] = weakref.WeakValueDictionary()
        os.register_at_fork(after_in_child=self._forked)

    def error(self, call: str) -> OSError:
        """The exception for what failed last in this thread.

        In the main thread a signal handler may have run in between: a ctypes call of its own that failed
        would be taken for ours.
        """
        number = ctypes.get_errno()
        return OSError(number, f"{call}: {os.strerror(number)}")

    def call(self, name: str, *args: Any) -> int:
        """Make a system call, by name."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_ssize_t if name.endswith(("read", "write")) else ctypes.c_int
        result: int = function(*args)
        if result == -1:
            raise self.error(name.rpartition("_")[2])
        return result

    def kqueue(self) -> int:
        """Open a kqueue, close-on-exec."""
        raise NotImplementedError

    def ioctl(self, fd: int, request: int, argument: Any = None) -> None:
        """An ioctl; ``argument`` is a ctypes pointer or None."""
        raise NotImplementedError

    def pipe(self, *, blocking: bool = True) -> tuple[int, int]:
        """A pipe, close-on-exec: reader, writer."""
        raise NotImplementedError

    def read(self, fd: int, size_bytes: int) -> bytes:
        """What is there to read, ``size_bytes`` at the most; b"" at the end."""
        raise NotImplementedError

    def write(self, fd: int, data: bytes) -> int:
        """How many bytes of ``data`` were written."""
        raise NotImplementedError

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        raise NotImplementedError

    @cached_property
    def has_tickle(self) -> bool:
        """Whether the kernel has KQUEUE_TICKLE: asked once, and of NetBSD only."""
        return self.offers(Mechanism.TICKLE)

    @cached_property
    def mechanism(self) -> Mechanism:
        """The best way to interrupt a wait that the kernel has: asked once."""
        if self.has_tickle:
            return Mechanism.TICKLE
        return Mechanism.USER if self.offers(Mechanism.USER) else Mechanism.PIPE

    def offers(self, mechanism: Mechanism) -> bool:
        """Whether this mechanism works here: tried on a kqueue of its own."""
        if mechanism == Mechanism.TICKLE and self.abi.system != "NetBSD":
            return False  # what another system would make of the number, nobody knows
        fd = self.kqueue()
        try:
            WAKERS[mechanism](self, fd).send(fd, KQUEUE_TICKLE)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.ENOENT):
                raise
            return False
        finally:
            self.close(fd)
        return True

    def _forked(self) -> None:
        """In the child of a fork: NetBSD hands no kqueue down, and the number may become another file's."""
        for kqueue in list(self.kqueues.values()):
            kqueue._forget()
        self.kqueues.clear()


class RunningSystem(Kernel):
    """The kernel this process runs on, through its libc; on Linux libkqueue, a library in its place."""

    def __init__(self) -> None:
        system, release = platform.system(), platform.release()
        path = None
        if system == "Linux":
            path = ctypes.util.find_library("kqueue")
            if path is None:
                raise KernelUnavailable(
                    "Linux has no kqueue: run NetBSD, or its kernel as a library: `invoke build-rump`, then"
                    " PYKQ_KERNEL=rump; or install libkqueue"
                )
        elif not any(abi.system == system for abi in ABIS):
            raise KernelUnavailable(
                f"pykq does not know {system}'s kqueue: run NetBSD, or its kernel as a library:"
                " `invoke build-rump`, then PYKQ_KERNEL=rump"
            )
        library = ctypes.CDLL(path, use_errno=True)
        abi = _abi_of("libkqueue" if path else system, release, library)
        super().__init__(library, abi, abi.entry)
        import fcntl  # here, because pykq can be imported where this cannot

        self.name = f"{system} {release} {platform.machine()}, the running system"
        self.plain_ioctl = fcntl.ioctl  # in a guest 1.9 us; ctypes takes 3.7 to 6.3
        if path:
            self.name = f"libkqueue ({path}) on {self.name}"
        else:
            # Without errno and without giving up the GIL: 5.3 us for 7.1 in the same guest.
            self.look = getattr(ctypes.PyDLL(None), abi.entry)

    def kqueue(self) -> int:
        if self.abi.system == "NetBSD":
            return self.call("kqueue1", O_CLOEXEC)
        fd = self.call("kqueue")
        os.set_inheritable(fd, False)
        return fd

    def ioctl(self, fd: int, request: int, argument: Any = None) -> None:
        self.call("ioctl", fd, ctypes.c_ulong(request), argument)

    def pipe(self, *, blocking: bool = True) -> tuple[int, int]:
        fds = os.pipe()
        for fd in fds:
            os.set_blocking(fd, blocking)
        return fds

    def read(self, fd: int, size_bytes: int) -> bytes:
        return os.read(fd, size_bytes)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def close(self, fd: int) -> None:
        os.close(fd)


def _abi_of(system: str, release: str, library: ctypes.CDLL, prefix: str = "") -> Abi:
    """The row of the table for a system whose C library this is."""
    rows = [abi for abi in ABIS if abi.system == system]
    for abi in rows:
        newer = system == "FreeBSD" and int(abi.since) > int(release.partition(".")[0])
        if not newer and hasattr(library, prefix + abi.entry.lstrip("_" if prefix else "")):
            return abi
    where = library._name or "libc"
    raise KernelUnavailable(f"{where} has no kevent that pykq knows: {system} {release}")


_RUMP = "rump___sysimpl_"  # what the names of a rump kernel's system calls begin with


class RumpKernel(Kernel):
    """NetBSD's kernel code as libraries in this process: librumpuser, librump and what lies beside them.

    What differs from a whole kernel. Descriptors are the rump kernel's own: ``Kqueue.fileno()`` refuses,
    and only ``pipe``, ``read``, ``write`` and ``close`` of this object open, use and close them. A socket
    or file of the host cannot be watched: its number would be taken for one of the rump kernel's. A host
    signal does not end a wait; Ctrl-C does, as told at ``_wait``. There is one rump kernel a process, and
    the child of a fork has none. Two variables in the environment, read when it starts: ``RUMP_NCPU``, its
    number of CPUs, and ``RUMP_VERBOSE=1``, to see on stderr what it prints.
    """

    shares_descriptors = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        libraries = {
            path.name.split(".so")[0]: path for path in sorted(directory.glob("librump*.so*"), reverse=True)
        }
        try:
            order = [libraries.pop("librumpuser"), libraries.pop("librump"), *libraries.values()]
        except KeyError as error:
            raise KernelUnavailable(
                f"no {error.args[0]}.so in {directory}: `invoke build-rump` makes it"
            ) from None
        try:
            # Global, because librump finds what it needs of the host in librumpuser that way.
            _, library, *_ = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL, use_errno=True) for path in order]
        except OSError as error:
            raise KernelUnavailable(f"cannot load the rump kernel: {error}") from None
        try:
            start, version = library.rump_init, library.rump_pub_getversion
        except AttributeError as error:
            raise KernelUnavailable(f"{order[1]} is no rump kernel: {error}") from None
        abi = _abi_of("NetBSD", "", library, _RUMP)
        super().__init__(library, abi, _RUMP + abi.entry.lstrip("_"))
        with _console_off_stdout():
            failed = start()
        if failed:
            raise KernelUnavailable(
                f"the rump kernel in {directory} does not start: rump_init returned {failed}"
            )
        self.name = f"NetBSD {_release(version())}, a rump kernel in {directory}"
        self.plain_ioctl = self.ioctl
        self._ioctl: Callable[..., int] = getattr(library, f"{_RUMP}ioctl")
        self._kevent, self.kevent = self.kevent, self._wait
        self._is_child = False
        self._main_thread = threading.main_thread().ident

    def call(self, name: str, *args: Any) -> int:
        """Make a system call, by name."""
        if self._is_child:
            raise KernelUnavailable("a rump kernel does not live on in the child of a fork: use spawn")
        return super().call(_RUMP + name, *args)

    def _forked(self) -> None:
        self._is_child = True  # its threads are gone, and a call may wait for one of them
        super()._forked()

    def kqueue(self) -> int:
        return self.call("kqueue1", O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: Any = None) -> None:
        if self._ioctl(fd, ctypes.c_ulong(request), argument) == -1:
            raise self.error("ioctl")

    def pipe(self, *, blocking: bool = True) -> tuple[int, int]:
        fds = (ctypes.c_int * 2)()
        self.call("pipe2", fds, O_CLOEXEC if blocking else O_CLOEXEC | O_NONBLOCK)
        return fds[0], fds[1]

    def read(self, fd: int, size_bytes: int) -> bytes:
        buffer = ctypes.create_string_buffer(size_bytes)
        count = self.call("read", fd, buffer, ctypes.c_size_t(size_bytes))
        return buffer.raw[:count]

    def write(self, fd: int, data: bytes) -> int:
        return self.call("write", fd, data, ctypes.c_size_t(len(data)))

    def close(self, fd: int) -> None:
        self.call("close", fd)

    def error(self, call: str) -> OSError:
        """What failed last in this thread, with NetBSD's errno turned into the host's by name."""
        number = ctypes.get_errno()
        if number == _ERESTART:
            # A kqueue was closed under the wait. A whole kernel makes the call again by itself; here the
            # caller does.
            number = errno.EINTR
        elif number in _NETBSD_ERRNO:
            name = _NETBSD_ERRNO[number]
            if not hasattr(errno, name):
                return OSError(errno.EIO, f"{call}: {name}, which this host does not have")
            number = getattr(errno, name)
        return OSError(number, f"{call}: {os.strerror(number)}")

    def _wait(
        self, fd: int, changes: Any, nchanges: int, events: Any, nevents: int, timeout: bytes | None
    ) -> int:
        """``kevent``, which in the main thread Ctrl-C can end.

        The rump kernel sleeps on a lock of the host's, and no signal ends that. So that Python can run
        its handlers while the main thread waits, a helper thread makes the call; should a handler raise,
        as Ctrl-C's does, the kqueue's mechanism brings the helper back, and what it brings is dropped.
        Other threads run no handlers and sleep in the kernel themselves.
        """
        if threading.get_ident() != self._main_thread or timeout == POLL or not nevents:
            return self._kevent(fd, changes, nchanges, events, nevents, timeout)
        outcome: list[tuple[int, int]] = []
        kqueue = self.kqueues.get(fd)
        waits: list[int] = [] if kqueue is None else kqueue._waits  # so that close() wakes the helper, too

        def call() -> None:
            waits.append(threading.get_ident())
            try:
                result = self._kevent(fd, changes, nchanges, events, nevents, timeout)
                outcome.append((result, ctypes.get_errno()))
            finally:
                waits.remove(threading.get_ident())

        helper = threading.Thread(target=call, name="pykq wait", daemon=True)
        try:
            helper.start()
            helper.join()
        except BaseException:
            deadline = time.monotonic() + _START_S
            while kqueue is not None and not kqueue.closed and not outcome:
                if helper.ident is None and time.monotonic() > deadline:
                    break  # it was not even started
                kqueue.tickle()  # again and again: another thread's wait may take it
                time.sleep(0.001)
            raise
        result, number = outcome[0]
        ctypes.set_errno(number)  # each thread has its own: hand the helper's on
        return result


@contextlib.contextmanager
def _console_off_stdout() -> Iterator[None]:
    """Keep what the kernel prints while it starts out of the program's output: librumpuser uses stdout."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    try:
        stdout = os.dup(1)
    except OSError:  # it is closed, and so there is nothing to be kept clean
        yield
        return
    with open("/dev/stderr" if os.environ.get("RUMP_VERBOSE") else os.devnull, "wb") as console:
        os.dup2(console.fileno(), 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def _release(version: int) -> str:
    """``__NetBSD_Version__`` as people write it: 1099001200 is 10.99.12, 1001000000 is 10.1 (sys/param.h)."""
    major, minor, patch = version // 100_000_000, version // 1_000_000 % 100, version // 100 % 10_000
    return f"{major}.{minor}.{patch}" if patch else f"{major}.{minor}"


_loading = threading.RLock()
_loaded: dict[str, Kernel] = {}  # a loaded library cannot be unloaded, so this is the state of the process

if hasattr(os, "register_at_fork"):  # pykq can be imported where this is not
    # A fork waits until another thread has loaded its kernel: half of one would be of no use to the child.
    os.register_at_fork(
        before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
    )


def load_kernel(kernel: Kernel | str | os.PathLike[str] | None = None) -> Kernel:
    """The kernel to use; loads it when it is asked for the first time.

    ``kernel`` is one of these; None means what ``PYKQ_KERNEL`` in the environment says, or else the
    running system.

    * ``"system"``: the running system, which has a kqueue, or on Linux libkqueue;
    * ``"rump"``, ``"rump:stock"``: the newest patched or stock rump kernel in pykq's cache folder;
    * a directory with ``librump.so`` and ``librumpuser.so``: that rump kernel;
    * a ``Kernel``: itself.

    Raises:
        KernelUnavailable: it is not there, does not fit this machine, or is a second rump kernel in one
            process.
    """
    if isinstance(kernel, Kernel):
        return kernel
    choice = os.fspath(kernel or os.environ.get("PYKQ_KERNEL") or "system")
    with _loading:
        if choice == "system":
            if "system" not in _loaded:
                _loaded["system"] = RunningSystem()
            return _loaded["system"]
        directory = _rump_directory(choice)
        rump = _loaded.get("rump")
        if rump is None:
            rump = _loaded["rump"] = RumpKernel(directory)
        elif isinstance(rump, RumpKernel) and rump.directory != directory:
            raise KernelUnavailable(f"one rump kernel a process: {rump.directory} runs, {directory} cannot")
        return rump


def _rump_directory(choice: str) -> Path:
    """The folder that holds the libraries of the rump kernel chosen."""
    if choice in ("rump", "rump:patched", "rump:stock"):
        variant = choice.partition(":")[2] or "patched"
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = Path(os.environ.get("PYKQ_CACHE") or user / "pykq") / "rump"
        built = sorted(cache.glob(f"*/{variant}/librump.so"), key=lambda path: path.stat().st_mtime)
        found = [path for path in built if not path.parts[-3].endswith("-sanitized")]
        if not found:
            raise KernelUnavailable(f"no {variant} rump kernel in {cache}: `invoke build-rump` makes one")
        return found[-1].parent.resolve()
    directory = Path(choice)
    if not directory.is_dir():
        raise KernelUnavailable(
            f"there is no kernel {choice!r}: give system, rump, rump:stock or a directory"
        )
    return directory.resolve()
