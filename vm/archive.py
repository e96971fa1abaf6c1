"""Archives that came from elsewhere: no name in them leads out of the folder they are meant for."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .log import Failure, Step

_REFUSED = "do not use this file"

# What is raised for a broken archive; the last two for a NUL in a name, and a time that no file can have.
_BROKEN = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError, OverflowError)


@contextmanager
def opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive; what is wrong with it, at any time while it is read, is a Failure."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except _BROKEN as error:
        # A link to what is not there, or a file where a folder is; all else with an errno is the disk's.
        clash = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
        of_a_member = isinstance(error, clash) and error.filename != str(archive)
        if isinstance(error, OSError) and error.errno is not None and not of_a_member:
            raise
        raise Failure(f"{archive}: {error}", hint="is the file whole?") from error


def inside(name: str, archive: Path) -> str:
    """Return a member's name relative to the root; raise Failure when it leads elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Failure(f"{archive}: the member {name} leads out of the archive", hint=_REFUSED)
    return "/".join(parts) or "."


def unpack(
    archives: Sequence[Path],
    target: Path,
    wanted: Callable[[str], str | None],
    work: Step,
    *,
    links: bool = False,
) -> None:
    """Unpack the files of archives for which wanted, asked with a name, returns the name to give it.

    Owners and special mode bits are not taken over; times are.  Devices are a
    Failure, and so are links unless links is true.  Symbolic links are made
    after the last archive, so that nothing of any is ever written through one.
    """
    symlinks: dict[Path, str] = {}
    for archive in archives:
        work.update(f"unpacking {archive.name}")
        _unpack_files(archive, target, wanted, symlinks if links else None)
    for path, destination in symlinks.items():
        try:
            path.symlink_to(destination)
        except FileExistsError:
            raise Failure(f"{path}: a link here, and a folder, in {archives[-1]}", hint=_REFUSED) from None


def _unpack_files(
    archive: Path, target: Path, wanted: Callable[[str], str | None], symlinks: dict[Path, str] | None
) -> None:
    """Unpack all but symbolic links, which are put down in symlinks; None: there may be no links."""
    with opened(archive) as tar:
        for member in tar:
            name = wanted(inside(member.name, archive))
            if name is None or member.isdir():
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if symlinks is not None:
                symlinks.pop(path, None)
            if member.isfile():
                content = tar.extractfile(member)
                assert content is not None
                with path.open("wb") as out:
                    shutil.copyfileobj(content, out, 1 << 20)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
                os.utime(path, (member.mtime, member.mtime))
            elif symlinks is not None and member.issym():
                symlinks[path] = member.linkname
            elif symlinks is not None and member.islnk():
                other = wanted(inside(member.linkname, archive))
                if other is not None:
                    os.link(target / other, path)
            else:
                raise Failure(f"{archive}: the member {member.name} is no plain file", hint=_REFUSED)
