"""What the cache holds, and what of it can go."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import qemu
from .cache import locked, read_json
from .config import RELEASE_PARTS, Settings
from .log import Failure, say
from .programs import sysroot_folder
from .release import Release
from .source import identify

# What the cache holds one folder of for each thing that was made, and how such
# a folder is called: PYKQ_CACHE may name a folder that holds other things, too.
_KINDS = {
    "build": r"\d[\w.]*-[0-9a-f]{6}-(clang|gcc)",
    "image": r"[0-9a-f]{12}(\.part)?",
    "programs": r"guest-[0-9a-f]{12}|rump-\d[\w.]*-[0-9a-f]{6}(-\w+)+",
    "release": r"\d[\w.]*|current",
    "rump": r"\d[\w.]*-[0-9a-f]{6}(-sanitized)?",
    "sysroot": r"[0-9a-f]{12}(\.part)?",
}

# What commands leave beside that, and how it is called.  Each is named: PYKQ_CACHE
# may be /var.  clean's own log is not there, it is being written.
_COMMANDS = (
    "bench|build-kernel|build-rump|console|demo|doctor|down|install|page|patches|regress|ssh|status|stress|test|up"
)
_RESULTS = {
    ".": r"(accelerators|bench|bench-host|pins)\.json|\.lock",  # bench's were here once
    "bench": r"(bench|full|host)\.json|cold|(round_trip|throughput)\.(png|svg)",
    "hosts": r".+-\d+\.xml",
    "image": r"\.lock",
    "log": rf"({_COMMANDS})\.log",
    "regress": r"config\.h|libkqueue-test|regress\.json",
    "stress": r"stress\.json|(stock|patched)-\d+\.xml|corpus|(crash|leak|oom|slow-unit|timeout)-[0-9a-f]+",
    "suite": r"\.lock",
    "sysroot": r"\.lock",
    "timings": rf"({_COMMANDS}|clean)\.json",
}


def clean(settings: Settings, *, everything: bool = False, dry_run: bool = False) -> None:
    """Remove what the settings do not use, or with everything all that pykq made; say what each part frees.

    The disk image of a guest that runs stays; with everything, a guest that
    runs is a Failure.
    """
    guests = _running(settings)
    if everything and guests:
        raise Failure(f"guest {guests[0].name} runs", hint=f"invoke vm.down --name {guests[0].name}")
    used = set() if everything else _used(settings) | {Path(guest.image) for guest in guests}
    verb = "would free" if dry_run else "freed"
    total = 0
    seen: Counter[tuple[int, int]] = Counter()
    parts = [
        part
        for path in _entries(settings.cache, _KINDS)
        for part in ([path] if path not in used else _leftovers(path))
    ]
    if everything:
        parts += [lock.parent for lock in sorted(settings.cache.glob("run/*/.lock"))]
        parts += _entries(settings.cache, _RESULTS)
    for part in parts:
        freed = _free(settings, part, seen, dry_run=dry_run)
        if freed is not None:
            total += freed
            say(f"{verb} {freed >> 20:5} MiB: {part}")
    say(f"{verb} {total >> 20:5} MiB of {settings.cache}")


def _entries(cache: Path, kinds: dict[str, str]) -> list[Path]:
    """Return what the cache holds one of for each thing that was made.

    Builds come first: who has waited for one can remove the release that it is
    made from, and its rump kernels.
    """
    return [
        path
        for kind, name in kinds.items()
        for path in sorted(cache.glob(f"{kind}/*"))
        if re.fullmatch(name, path.name) and (kinds is _RESULTS or path.is_dir())
    ]


def _free(settings: Settings, part: Path, seen: Counter[tuple[int, int]], *, dry_run: bool) -> int | None:
    """Remove a part when nobody is at work in it; return the bytes that frees, None when it stays."""
    folder = None if dry_run else _lock(settings.cache, part)
    with nullcontext() if folder is None else locked(folder):
        for guest in _running(settings):  # started since, while we waited
            if part in (Path(guest.folder), Path(guest.image)):
                say(f"guest {guest.name} runs: {part} stays (invoke vm.down --name {guest.name})")
                return None
        freed = freed_bytes(part, seen)
        if not dry_run:
            _remove(part)
    return freed


def _lock(cache: Path, part: Path) -> Path | None:
    """Return the folder that those hold who make a part, None for one that nobody holds."""
    kind, *below = part.relative_to(cache).parts
    if part.name == ".lock":
        return part.parent
    if kind in ("image", "sysroot"):  # one lock for all of them
        return cache / kind
    return cache / kind / below[0] if kind in (*_KINDS, "run") else None


def _remove(part: Path) -> None:
    """Remove a folder or a file, and what commands leave with the folder around it."""
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)
    if part.parent.name not in _KINDS:
        with suppress(OSError):  # there is something else in it
            part.parent.rmdir()


def _running(settings: Settings) -> list[qemu.Machine]:
    """Return the guests that run."""
    names = [path.parent.name for path in settings.cache.glob("run/*/machine.json")]
    guests = [qemu.last(settings, name) for name in names]
    return [guest for guest in guests if guest is not None and guest.alive()]


def _used(settings: Settings) -> set[Path]:
    """Return the folders of the cache that the settings use."""
    used = set()
    if settings.release:
        release = Release(settings)
        used.add(release.folder)
        missing = [part for part in RELEASE_PARTS if getattr(settings, part) is None]
        found: dict[str, Any] = {part: release.path(part) for part in missing if release.has(part)}
        settings = replace(settings, **found)
    if settings.source is None or not settings.source.is_dir():
        return used
    name = identify(settings.source).name
    build = settings.cache / "build" / f"{name}-{settings.toolchain}"
    used |= {build, settings.cache / "rump" / name, settings.cache / "rump" / f"{name}-sanitized"}
    used |= set(settings.cache.glob(f"programs/rump-{name}-*"))
    with suppress(Failure):  # sets without comp
        root = sysroot_folder(settings)
        used |= {root, settings.cache / "programs" / f"guest-{root.name}"}
    return used | _images(settings, build)


def _images(settings: Settings, build: Path) -> set[Path]:
    """Return the newest image of the sets and the Python for each kernel of a build, or for none."""
    newest: dict[str, Path] = {}
    manifests = settings.cache.glob("image/*/manifest.json")
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime):
        made_of = read_json(path)
        folders = {Path(name) for name, *_ in made_of.get("parts", ())}
        ours = all({part, part.parent} & {settings.sets, settings.python} for part in folders)
        kernel = str(made_of.get("kernel"))
        if ours and (kernel == "None" or build in Path(kernel).parents):
            newest[kernel] = path.parent
    return set(newest.values())


def _leftovers(release: Path) -> Iterator[Path]:
    """Yield the folders of a release that a command left which did not come to its end."""
    for name in ("download", "source.part"):
        if (release / name).is_dir():
            yield release / name


def freed_bytes(part: Path, seen: Counter[tuple[int, int]]) -> int:
    """Return what removing a part frees: a file with several names is freed with the last of them.

    seen counts the names that were removed before.
    """
    total = 0
    below = (os.path.join(top, name) for top, _, names in os.walk(part) for name in names)
    for path in below if part.is_dir() else [part]:
        with suppress(FileNotFoundError):  # somebody was quicker
            status = os.lstat(path)
            inode = (status.st_dev, status.st_ino)
            seen[inode] += 1
            if seen[inode] == status.st_nlink:
                total += status.st_blocks * 512
    return total
