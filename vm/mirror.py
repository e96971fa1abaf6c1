"""Files from mirrors: tried in turn, gone on with after a cut, checked, and the same the next time."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .cache import locked, read_json, write_whole
from .log import Failure, Step

WAYS_ON = "--mirror URL|DIR names another; --source DIR and --sets DIR take what you have, without a network"

_CONNECT_WITHIN_S = 3.0
_PATIENCE_S = 10.0  # in which one mirror has to answer, else the others are not tried
_STALLED_AFTER_S = 20.0  # with not a byte, or with less than _CHUNK_BYTES
_TRIES = 5  # on one mirror, each of which brought something
_CHUNK_BYTES = 1 << 14  # read at once, at most
_LIST_BYTES = 64 << 20  # no list of files is larger

_AGAIN = "try another --mirror; this one may be in the middle of an update"

# What a web page begins with: a network's log-in page comes in the place of any file.
_PAGE = re.compile(rb"\s*<(?:!doctype html|html)", re.IGNORECASE)
_PAGE_BYTES = 256  # in which it does so


class Missing(Failure):
    """The mirror answers, and does not have the file."""


class Unreachable(Failure):
    """The mirror does not answer, or stopped in the middle."""


class Offline(Unreachable):
    """Not even the mirror's name is known: the other mirrors need not be tried."""


@dataclass(frozen=True)
class Mirrors:
    """Places that hold the same files: URLs or folders, in the order in which they are tried."""

    roots: tuple[str, ...]
    pins: Path  # JSON: the SHA512 of each file when it was first taken

    def index(self, path: str) -> str:
        """Return the list of what a folder holds, which on a web server is a page with links."""
        folders = [root for root in self.roots if not is_url(root)]
        if folders:
            try:
                return "\n".join(name for root in folders for name in os.listdir(f"{root}/{path}"))
            except FileNotFoundError as error:
                raise _not_there(error.filename) from None
        return self.read(f"{path}/", page=True).decode("utf-8", "replace")

    def read(self, path: str, *, page: bool = False) -> bytes:
        """Return a small file from the first mirror that has it; raise Failure when none has.

        A web page is no file, unless page is true.
        """
        errors: list[Failure] = []
        began = time.monotonic()
        for root in self.roots:
            try:
                with _opened(f"{root}/{path}", page=page) as (_, _, chunks):
                    content = bytearray()
                    for chunk in chunks:
                        content += chunk
                        if len(content) > _LIST_BYTES:
                            raise Failure(f"{root}/{path} does not end", hint="try another --mirror")
                    return bytes(content)
            except Failure as error:
                errors.append(error)
                late = time.monotonic() - began > _PATIENCE_S
                if isinstance(error, Offline) or (isinstance(error, Unreachable) and late):
                    break
        raise self._all_failed(errors)

    def fetch(
        self,
        path: str,
        folder: Path,
        work: Step,
        *,
        sha512: str | None = None,
        size: int = 0,
        cksum: str | None = None,
    ) -> Path:
        """Bring a file into a folder and return its path; at once when it is there.

        sha512, size in bytes (0: not known) and cksum (such as "sha1:" and
        the digits) are what the mirror's list says of it.  What came before a
        cut stays in a .part file, with which the next attempt goes on; without
        sha512 the next command begins anew.  Raises Failure when no mirror
        gives the right file, and when it has changed since it was first taken.
        """
        import pooch  # takes time, with requests, for which most commands have no use

        pin = read_json(self.pins).get(path)
        if pin is not None and sha512 not in (None, pin):
            raise self._changed(f"{self.roots[0]}/{path}")
        known = sha512 or pin
        name = path.rpartition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{name}.{known[:12] if known else 'new'}.part"
        if known is None:
            part.unlink(missing_ok=True)
        pooch.get_logger().setLevel("ERROR")
        errors: list[Failure] = []
        for root in self.roots:
            url = f"{root}/{path}"
            resume = _Resume(part, work, name)
            try:
                pooch.retrieve(url, known and f"sha512:{known}", name, folder, downloader=resume)
            except Failure as error:
                errors.append(error)
            except ValueError:  # the hash is wrong, and pooch has removed the file
                if sha512 is None:
                    raise self._changed(url) from None
                errors.append(Failure(f"{url} is not what the mirror's SHA512 list says", hint=_AGAIN))
            else:
                target = folder / name
                if size not in (0, target.stat().st_size) or not pooch.hashes.hash_matches(target, cksum):
                    target.unlink()
                    errors.append(Failure(f"{url} has not the size or checksum that is listed", hint=_AGAIN))
                    continue
                self._pin(path, known or pooch.file_hash(str(target), "sha512"))
                return target
        raise self._all_failed(errors)

    def _pin(self, path: str, sha512: str) -> None:
        with locked(self.pins.parent):  # two releases share the file
            pins = read_json(self.pins)
            if path not in pins:
                write_whole(self.pins, json.dumps({**pins, path: sha512}, indent=1, sort_keys=True))

    def _all_failed(self, errors: list[Failure]) -> Failure:
        """Return one Failure for those of all mirrors, which is the most telling of them."""
        telling = [error for error in errors if not isinstance(error, Unreachable)]
        if telling or len(self.roots) == 1:
            return (telling or errors)[-1]
        names = ", ".join(urlsplit(root).netloc or root for root in self.roots)
        return Unreachable(f"no mirror answers ({names}); the last said: {errors[-1]}", hint=WAYS_ON)

    def _changed(self, url: str) -> Failure:
        return Failure(
            f"{url} is not the file that it was when it was first taken",
            hint=f"try another --mirror; if the change is known, remove its line from {self.pins}",
        )


class _Resume:
    """A pooch downloader that keeps what came before a cut, and goes on from there."""

    def __init__(self, part: Path, work: Step, name: str) -> None:
        self._part, self._work, self._name = part, work, name

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        for attempt in range(1, _TRIES + 1):
            before = self._size()
            try:
                self._go_on(url, before)
                break
            except Unreachable as error:
                if attempt == _TRIES or self._size() <= before:
                    if self._size():
                        error.hint = f"the same command goes on after {self._size()} bytes; or {WAYS_ON}"
                    raise
            finally:
                if not self._size():
                    self._part.unlink(missing_ok=True)
        self._part.replace(output_file)

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _go_on(self, url: str, start: int) -> None:
        with _opened(url, start) as (begin, size, chunks), self._part.open("r+b" if start else "wb") as out:
            out.truncate(begin)
            out.seek(begin)
            for chunk in chunks:
                out.write(chunk)
                self._work.update(f"{self._name}, {out.tell() >> 20} of {size >> 20} MiB")


@contextmanager
def _opened(url: str, start: int = 0, *, page: bool = False) -> Iterator[tuple[int, int, Iterator[bytes]]]:
    """Open a file of a mirror: where its bytes begin (start, or 0), its size (0: not said), the bytes.

    Raises Missing, Unreachable, also while the bytes are read, or Failure for a web page.
    """
    import requests
    from urllib3.exceptions import HTTPError, NameResolutionError

    try:
        if not is_url(url):
            with open(url, "rb") as file:
                file.seek(start)
                yield start, os.fstat(file.fileno()).st_size, iter(lambda: file.read(_CHUNK_BYTES), b"")
            return
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        timeout = (_CONNECT_WITHIN_S, _STALLED_AFTER_S)
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as reply:
            if reply.status_code == 416:  # nothing is left to send
                yield start, start, iter(())
                return
            reply.raise_for_status()
            begin = start if reply.status_code == 206 else 0
            length = reply.headers.get("Content-Length", "")
            size = begin + (int(length) if re.fullmatch(r"[0-9]{1,15}", length) else 0)
            chunks = _as_they_come(url, reply.raw)
            yield begin, size, chunks if page else _no_page(url, chunks)
    except FileNotFoundError:
        raise _not_there(url) from None
    except requests.HTTPError as error:
        what = f"{url}: HTTP {error.response.status_code} {error.response.reason}"
        kind = Missing if error.response.status_code in (404, 410) else Unreachable
        raise kind(what, hint=WAYS_ON) from None
    except requests.ConnectTimeout:
        raise Unreachable(f"{url}: no answer in {_CONNECT_WITHIN_S:.0f} s", hint=WAYS_ON) from None
    except (requests.RequestException, HTTPError) as error:  # the second while the bytes are read
        cause = getattr(error.args[0] if error.args else None, "reason", None)
        if isinstance(cause, NameResolutionError):
            raise Offline(f"{url}: the name does not resolve", hint=WAYS_ON) from None
        stalled = "timed out" in str(error)
        what = f"nothing came for {_STALLED_AFTER_S:.0f} s" if stalled else "the connection failed or was cut"
        raise Unreachable(f"{url}: {what}", hint=WAYS_ON) from None


def is_url(root: str) -> bool:
    """Tell a web server from a folder."""
    return "://" in root


def _not_there(path: str) -> Missing:
    return Missing(f"{path}: no such file", hint="--mirror names a folder laid out like cdn.NetBSD.org/pub")


def _as_they_come(url: str, raw: Any) -> Iterator[bytes]:
    """Pass on the bytes of an urllib3 response at once; raise Unreachable when they only trickle in.

    The timeout of the connection is for each byte, and would wait for ever.
    """
    due, came = time.monotonic() + _STALLED_AFTER_S, 0
    while chunk := raw.read1(_CHUNK_BYTES):
        yield chunk
        came += len(chunk)
        if came >= _CHUNK_BYTES:
            due, came = time.monotonic() + _STALLED_AFTER_S, 0
        elif time.monotonic() > due:
            raise Unreachable(f"{url}: {came} bytes came in {_STALLED_AFTER_S:.0f} s", hint=WAYS_ON)


def _no_page(url: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass chunks on; raise Failure when they are those of a web page."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _PAGE_BYTES:
            break
    if _PAGE.match(head):
        raise Failure(f"{url} gives a web page, not the file", hint="log in to this network first?")
    yield head
    yield from chunks
