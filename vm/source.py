"""NetBSD source trees: what one is, and overlays in which a port may change it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .cache import digest
from .log import Failure

KERN_EVENT = "sys/kern/kern_event.c"

# What makes a folder a source tree: the sets syssrc, src and sharesrc each bring some of it.
_NEEDED = ("build.sh", "common", KERN_EVENT, "share/mk/bsd.own.mk", "sys/sys/param.h", "tools")

# What an overlay holds as files of its own.  A port changes sys; lib/librump*
# reaches sys by relative paths.  Everything else is a symbolic link.
_OWN = ("sys", "lib")

# What decides whether a kernel is up to date.
_INPUTS = ("sys", "common", "share/mk")


@dataclass(frozen=True)
class Source:
    """A NetBSD source tree: top is the folder that holds build.sh."""

    top: Path
    version: str  # "10.99.12"
    number: int  # __NetBSD_Version__, 1099001200
    revision: str  # of kern_event.c, "1.150"; "" where the RCS id is not expanded

    @property
    def name(self) -> str:
        """A folder name that tells this tree from every other."""
        return f"{self.version}-{digest(str(self.top.resolve()))[:6]}"

    def __str__(self) -> str:
        return f"NetBSD {self.version} (kern_event.c {self.revision or 'without a revision'})"

    def fingerprint(self) -> str:
        """Return a digest that changes when a file that a kernel is built from changes.

        It looks at names, sizes and modification times, as make does.
        """
        total = hashlib.sha256()
        for part in _INPUTS:
            for path, entry in sorted(_walk(self.top / part)):
                status = entry.stat(follow_symlinks=False)
                total.update(f"{part}/{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return total.hexdigest()


def identify(top: Path) -> Source:
    """Say which NetBSD a folder holds the source of; raise Failure when it is none."""
    if not top.is_dir():
        raise Failure(f"{top}: no such folder", hint="--source names the folder that holds build.sh and sys")
    for name in _NEEDED:
        if not (top / name).exists():
            raise Failure(
                f"{top} is not a NetBSD source tree: it has no {name}",
                hint="unpack the release's src, syssrc and sharesrc sets into one folder",
            )
    param = (top / "sys/sys/param.h").read_text(errors="replace")
    match = re.search(r"^#define\s+__NetBSD_Version__\s+(\d+)\s*/\*\s*NetBSD (\S+)", param, re.MULTILINE)
    if match is None:
        raise Failure(f"{top}/sys/sys/param.h defines no __NetBSD_Version__", hint="is the tree complete?")
    head = (top / KERN_EVENT).read_text(errors="replace")[:500]
    revision = re.search(r"[$]NetBSD: kern_event\.c,v (\S+) ", head)
    return Source(top.resolve(), match[2], int(match[1]), revision[1] if revision else "")


def overlay(source: Source, tree: Path, changed: Mapping[str, bytes]) -> None:
    """Make or refresh a copy of a source tree in which some files have other content.

    Unchanged files are hard links where the file system allows (a second for
    thirty thousand files, no room), else copies with their times; either way
    make sees the user's edits as edits and nothing else as one.  Nothing that
    is done to the overlay reaches the user's files: files to be changed are
    replaced, never written into.
    """
    tree.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(source.top):
        link = tree / entry.name
        if entry.name in _OWN or entry.name in (".git", ".hg", "CVS"):
            continue
        if not (link.is_symlink() and os.readlink(link) == entry.path):
            with suppress(FileNotFoundError):
                link.unlink()
            link.symlink_to(entry.path)
    for part in _OWN:
        if (source.top / part).is_dir():
            mirror(source.top / part, tree / part, {
                name.removeprefix(f"{part}/") for name in changed if name.startswith(f"{part}/")
            })
    for name, content in changed.items():
        path = tree / name
        if not path.is_file() or path.stat().st_nlink > 1 or path.read_bytes() != content:
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def _walk(top: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files below a folder, each with its path from there; order is as it comes."""
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(top / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                else:
                    yield path, entry


def mirror(source: Path, copy: Path, spared: set[str]) -> None:
    """Make copy hold the files of source and no others, but for those spared."""
    copy.mkdir(parents=True, exist_ok=True)
    there = dict(_walk(copy))
    linked = source.stat().st_dev == copy.stat().st_dev
    folders = {""}
    for path, entry in _walk(source):
        old = there.pop(path, None)
        if path in spared or (old is not None and _same(old, entry, linked)):
            continue
        target = f"{copy}/{path}"
        folder = path.rpartition("/")[0]
        if folder not in folders:
            os.makedirs(f"{copy}/{folder}", exist_ok=True)
            folders.add(folder)
        if old is not None:
            os.unlink(target)
        _link(entry.path, target)
    for path in there:
        os.unlink(f"{copy}/{path}")


def _same(old: os.DirEntry[str], new: os.DirEntry[str], linked: bool) -> bool:
    """Tell whether two files are one, which costs no look at them, or the one an unchanged copy."""
    if linked and old.inode() == new.inode():
        return True
    was, now = old.stat(follow_symlinks=False), new.stat(follow_symlinks=False)
    return (was.st_size, was.st_mtime_ns) == (now.st_size, now.st_mtime_ns)


def _link(source: str, target: str) -> None:
    """Make target the same file as source, or a copy where links do not reach."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target, follow_symlinks=False)
