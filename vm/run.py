"""Run other programs: output to a log, its tail on failure, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .log import BuildFailed, Failure

# Debian's package for each program that vm/ runs.
PACKAGES = {
    "cc": "gcc",
    "c++": "g++",
    "clang": "clang",
    "clang++": "clang",
    "clang-cpp": "clang",
    "ld": "binutils",
    "make": "make",
    "objcopy": "binutils",
    "patch": "patch",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "ssh": "openssh-client",
    "zlib.h": "zlib1g-dev",
}

FULL_DISK = "make room, or name another cache folder in PYKQ_CACHE"
_FULL_BYTES = 16 << 20
_TAIL_LINES = 15


def need(*programs: str) -> None:
    """Check that programs are on the PATH; raise Failure that names the packages that bring the missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = sorted({PACKAGES.get(program, program) for program in missing})
        raise Failure(f"{', '.join(missing)} not found", hint=f"apt-get install {' '.join(packages)}")


def run(
    argv: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], object] = lambda line: None,
) -> None:
    """Run a program to its end, all of its output into the file log.

    The program gets no terminal and a session of its own, so that Ctrl-C ends
    it in an orderly way: first SIGINT, on which make removes what is half made.

    on_line is called with every line of output.  env is added to the
    environment.  Raises BuildFailed with the last lines of output.
    """
    command = [str(word) for word in argv]
    recent: deque[str] = deque(maxlen=_TAIL_LINES)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        out.write(f"\n$ {subprocess.list2cmdline(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for raw in process.stdout:
                out.write(raw)
                line = raw.decode(errors="replace").rstrip()
                recent.append(line)
                on_line(line)
            status = process.wait()
        finally:
            _end(process)
    if status != 0:
        what = f"{Path(command[0]).name} failed with status {status}"
        if shutil.disk_usage(log.parent).free < _FULL_BYTES:
            raise BuildFailed(f"{what}: the disk of {log.parent} is full", hint=FULL_DISK)
        raise BuildFailed(what, hint=f"the whole output is in {log}", tail="\n".join(recent))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children; do nothing when it has ended."""
    for signum, patience_s in ((signal.SIGINT, 5.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
