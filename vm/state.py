"""Saved states: a guest that has booted, in a file from which any number of others start.

vm/guest/rc does what is the same in every guest, and then asks for random
bytes.  To the answer "state" it reads what the start of sshd will read, and asks
again.  There the state is taken: nothing has been written to the disk yet, and no
service runs.  Guests that start from one state are alike up to the line that
they are given then, with random bytes and the time, and differ from there on.

A state holds the guest's memory, its host key included: its mode is 0600.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from .cache import digest
from .log import Failure, say, timed

_SUFFIX = ".state"
_WITHIN_S = 10.0
_CANCEL_WITHIN_S = 1.0
_UNLIMITED = 1 << 40  # bytes a second; QEMU's default is made for a network


class StateFailed(Failure):
    """A state could not be saved, or a guest could not be started from it."""


def can_be_shared(top: Path) -> bool:
    """Tell whether guests of a kernel from this source tree may start from one state.

    From NetBSD 10 on, every random generator of the kernel is seeded anew when
    random bytes are written to /dev/urandom (sys/kern/kern_entropy.c).  Those
    of older kernels are not, and would give the same bytes in all guests.
    """
    return (top / "sys/kern/kern_entropy.c").exists()


def path_of(kernel: Path, disk: Path, line: Sequence[str], accelerator: str) -> Path:
    """Return where the state of guests that QEMU starts with line is, or is to be.

    line must hold nothing that tells one guest from another.
    """
    files = [kernel, disk, Path(shutil.which(line[0]) or line[0])]
    made_of = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    processor = Path("/proc/cpuinfo").read_text() if accelerator == "kvm" else ""
    features = sorted(set(re.findall(r"^(?:model name|microcode|flags)\s*:.*", processor, re.MULTILINE)))
    return kernel.parent / f"{digest(made_of, features)}-{digest(line)}{_SUFFIX}"


@contextmanager
def saving(control: Path, path: Path) -> Iterator[None]:
    """Save the state of a guest; what comes in the context decides whether the state is good and kept.

    control is the QMP socket of its QEMU.  After what QEMU writes, and reads,
    comes the SHA256 of that.  A state that cannot be saved is said, and missed
    by nobody.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        try:
            with timed("the state saved"), open(part, "w+b", opener=_for_its_owner) as file:
                _run(_write(control, file.fileno()))
                file.seek(0)
                file.write(hashlib.file_digest(file, "sha256").digest())
        except (StateFailed, OSError) as error:
            say(f"the state of the guest is not saved: {error}")
            part.unlink(missing_ok=True)
        yield
        if part.exists():
            made_of = path.name.partition("-")[0]
            for other in path.parent.glob(f"*{_SUFFIX}"):
                if not other.name.startswith(f"{made_of}-"):  # nothing can start from it now
                    other.unlink(missing_ok=True)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


async def _write(control: Path, fd: int) -> None:
    """Have QEMU write the state to an open file."""
    async with _connected(control) as qemu:
        qemu.send_fd_scm(fd)
        await qemu.execute("getfd", {"fdname": "state"})
        await qemu.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})
        await qemu.execute("migrate", {"uri": "fd:state"})
        how: Any = {}
        try:
            while how.get("status") not in ("completed", "failed"):
                await asyncio.sleep(0.005)
                how = await qemu.execute("query-migrate")
        finally:  # the guest goes on, however it went, and when it took too long
            async with asyncio.timeout(_CANCEL_WITHIN_S):
                await qemu.execute("migrate_cancel")
                await qemu.execute("cont")
        if how["status"] == "failed":
            raise StateFailed(how.get("error-desc", "QEMU does not say why"))


def load(process: subprocess.Popen[bytes], control: Path, path: Path) -> None:
    """Return when a QEMU that was started with -incoming runs; raise StateFailed for a damaged state."""

    async def wait() -> None:
        how: Any = {}
        while how.get("status") != "running":
            if process.poll() is not None:
                raise StateFailed(f"QEMU refuses {path}")
            await asyncio.sleep(0.005)
            if not control.exists():
                continue
            with suppress(QMPError, EOFError, OSError):
                async with _connected(control) as qemu:
                    how = await qemu.execute("query-status")

    state = memoryview(path.read_bytes())
    if hashlib.sha256(state[:-32]).digest() != state[-32:]:
        raise StateFailed(f"{path} is damaged")
    _run(wait())


@asynccontextmanager
async def _connected(control: Path) -> AsyncIterator[QMPClient]:
    """Connect to a QMP socket."""
    client = QMPClient("pykq")
    await client.connect(str(control))
    try:
        yield client
    finally:
        with suppress(QMPError, EOFError, OSError):
            await client.disconnect()


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a conversation with QEMU to its end, but not for long."""
    try:
        return asyncio.run(asyncio.wait_for(work, _WITHIN_S))
    except (QMPError, OSError, EOFError, TimeoutError) as error:
        raise StateFailed(f"QEMU does not answer: {error}") from error
