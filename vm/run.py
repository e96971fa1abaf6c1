"""Run other programs: output to the log, its tail on failure, nothing left behind."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from .log import BuildFailed, Failure, logger
from .packages import install_command

Result = TypeVar("Result")

# What a user, or the system at its shutdown, ends a command with.
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

FULL_DISK = "make room, or name another cache folder in PYKQ_CACHE"
_FULL = (os.strerror(errno.ENOSPC), "Writing inode")  # makefs has other words for a write cut short
_TAIL_LINES = 15


def need(*programs: str) -> None:
    """Check that programs are on the PATH; raise Failure that says how to install the missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        command = install_command(missing)
        hint = shlex.join(command) if command else "install it, and see invoke doctor"
        raise Failure(f"{', '.join(missing)} not found", hint=hint)


@contextmanager
def uninterrupted(and_then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Put Ctrl-C, SIGTERM and SIGHUP off while something is started, or put in order within seconds.

    and_then is called at once for the first of them; KeyboardInterrupt is raised at the end.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone they interrupt
        yield
        return
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        if len(came) == 1:
            and_then()

    before = {
        number: signal.signal(number, note)
        for number in INTERRUPTS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt


class _Group:
    """The programs that several threads run at the same time."""

    def __init__(self) -> None:
        self._programs: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def add(self, program: subprocess.Popen[bytes]) -> None:
        """Add a program; raise BuildFailed when it comes too late."""
        self._programs.add(program)
        if self._stopped:
            raise BuildFailed("stopped")

    def forget(self, program: subprocess.Popen[bytes]) -> None:
        """Leave a program alone that has ended: its number may be another's by now."""
        self._programs.discard(program)

    def stop(self) -> None:
        """End all of them, and those to come."""
        self._stopped = True
        for program in tuple(self._programs):
            _end(program)


_group: ContextVar[_Group | None] = ContextVar("_group", default=None)


def side_by_side(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Make calls in threads and return their results.

    When one raises, or on Ctrl-C, the programs that the others run are ended at once.
    """
    group = _Group()

    def each(call: Callable[[], Result]) -> Result:
        _group.set(group)
        return call()

    # From the start: an interrupt that only unwound would wait for the threads, and these for their programs.
    with uninterrupted(group.stop), ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(each, call) for call in calls]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            group.stop()
            raise


def end_with_others(process: subprocess.Popen[bytes]) -> None:
    """Have a program that leads a session ended when the calls are that side_by_side() makes."""
    if (group := _group.get()) is not None:
        group.add(process)


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], object] = lambda line: None,
) -> None:
    """Run a program to its end, as watch() does; raise BuildFailed with the last lines of its output."""
    recent: deque[str] = deque(maxlen=_TAIL_LINES)

    def each(line: str) -> None:
        recent.append(line)
        on_line(line)

    status = watch(argv, cwd=cwd, env=env, on_line=each)
    if status != 0:
        what = f"{Path(argv[0]).name} failed with status {status}"
        hint = FULL_DISK if any(words in line for line in recent for words in _FULL) else ""
        raise BuildFailed(what, hint=hint, tail="\n".join(recent))


def watch(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], object],
) -> int:
    """Run a program to its end, all of its output into the log (vm.log.kept); return its status.

    The program gets no terminal and a session of its own, so that Ctrl-C ends
    it in an orderly way: first SIGINT, on which make removes what is half made.

    on_line is called with every line of output.  env is added to the environment.
    """
    command = [str(word) for word in argv]
    logger.info("$ %s", shlex.join(command))
    process = None
    try:
        with uninterrupted():
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end_with_others(process)
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            logger.info("%s", line)
            on_line(line)
        return process.wait()
    finally:
        with uninterrupted():
            if process is not None:
                _end(process)
                if (group := _group.get()) is not None:
                    group.forget(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and whatever it has left there."""
    for signum, patience_s in ((signal.SIGINT, 5.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with suppress(ProcessLookupError):  # a shell's background jobs ignore SIGINT, and hold the pipe open
        os.killpg(process.pid, signal.SIGKILL)
