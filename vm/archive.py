"""Archives that came from elsewhere: no name in them leads out of the folder they are meant for."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .log import Failure

_REFUSED = "do not use this file"


@contextmanager
def opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive; what is wrong with it, at any time while it is read, is a Failure."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise Failure(f"{archive}: {error}", hint="is the file whole?") from error


def inside(name: str, archive: Path) -> str:
    """Return a member's name relative to the root; raise Failure when it leads elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Failure(f"{archive}: the member {name} leads out of the archive", hint=_REFUSED)
    return "/".join(parts) or "."


def unpack(
    archive: Path, target: Path, wanted: Callable[[str], str | None], *, links: bool = False
) -> None:
    """Unpack the files of an archive for which wanted, asked with a name, returns the name to give it.

    Owners and special mode bits are not taken over; times are.  Devices are a
    Failure, and so are links unless links is true.  Symbolic links are made
    last, so that nothing is ever written through one.
    """
    symlinks: dict[Path, str] = {}
    with opened(archive) as tar:
        for member in tar:
            name = wanted(inside(member.name, archive))
            if name is None or member.isdir():
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if member.isfile():
                content = tar.extractfile(member)
                assert content is not None
                with path.open("wb") as out:
                    shutil.copyfileobj(content, out, 1 << 20)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
                os.utime(path, (member.mtime, member.mtime))
            elif links and member.issym():
                symlinks[path] = member.linkname
            elif links and member.islnk():
                other = wanted(inside(member.linkname, archive))
                if other is not None:
                    os.link(target / other, path)
            else:
                raise Failure(f"{archive}: the member {member.name} is no plain file", hint=_REFUSED)
    for path, destination in symlinks.items():
        path.symlink_to(destination)
