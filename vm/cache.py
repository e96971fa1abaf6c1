"""Where pykq keeps what it makes, and the lock that keeps two commands apart."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .log import Failure, say
from .run import uninterrupted


def digest(*parts: object) -> str:
    """Return a short name (12 hex digits) for a combination of values."""
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """Return the SHA256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file so that it is there with all of its content or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.chmod(mode)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield the name of a folder to make, which takes this one's place when it is whole, or goes."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        with uninterrupted():
            shutil.rmtree(part, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; {} when it is not there or was cut short."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; wait, and say so, while another command has it.

    The kernel drops the lock when its holder ends, however it ends.
    """
    while True:
        handle = _open_lock(folder)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another pykq command that works in {folder}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, folder / ".lock"):
                yield
                return
        finally:
            os.close(handle)


def _open_lock(folder: Path) -> int:
    """Return a handle of the file that is locked for a folder; make both where they are not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Failure(
            f"cannot write to {folder}: {error.strerror}", hint="name another cache folder in PYKQ_CACHE"
        ) from error


def _is_at(handle: int, path: Path) -> bool:
    """Tell whether an open file is still the one at a path: whoever held the lock may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
