"""The C programs of tests/c, and NetBSD's test: built for a guest, and with a rump kernel for this host."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from . import upstream
from .archive import unpack
from .build import PLATFORM, select
from .cache import digest, file_digest, locked, read_json, whole_folder, write_whole
from .config import Settings
from .image import set_archives
from .log import Failure, step
from .rump import SANITIZERS, rump_folder
from .run import need, run

SOURCES = Path(__file__).resolve().parent.parent / "tests" / "c"

# The sets with NetBSD's libraries and headers, and what of them a compiler reads.
SETS = ("base", "comp")
_READ = ("lib/", "usr/lib/", "usr/include/")

_FLAGS = ["-std=gnu99", "-O2", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
_FLAGS += ["-Wno-unused-result", "-Wno-missing-field-initializers"]


def build_for_guest(settings: Settings) -> Path:
    """Compile for the userland that the sets bring, with the host's clang; return the folder of the programs.

    Raises Failure without a comp set, BuildFailed when the compiler does.
    """
    compiler = _guest_compiler(settings)
    command = [*compiler, *_FLAGS]
    extra: dict[str, list[str | Path]] = {}
    if (_sysroot(settings) / "usr/include/atf-c.h").exists():
        define = "-DKQUEUE_TICKLE=_IO('k', 2)"  # the userland's headers may have no patch
        extra["t_tickle"] = [*command, define, upstream.PARTS / "t_tickle.c", "-latf-c"]
    return _build(settings, f"guest-{digest(compiler)}", command, [], extra)


def compile_for_guest(settings: Settings, words: Sequence[str | Path], target: Path) -> None:
    """Compile one program of somebody else's."""
    run([*_guest_compiler(settings), "-pthread", *words, "-o", target])


def _guest_compiler(settings: Settings) -> list[str]:
    """Return the command that compiles and links for the guest's userland."""
    need("clang", "ld.lld")
    sysroot = _sysroot(settings)
    command = ["clang", f"--target={PLATFORM}", f"--sysroot={sysroot}", "-fuse-ld=lld"]
    return [*command, f"-L{sysroot}/usr/lib"]  # clang leaves this to NetBSD's own ld


def build_for_rump(settings: Settings, variant: str, *, sanitize: bool = False) -> Path:
    """Compile against a rump kernel that is built; return the folder of the programs.

    NetBSD's headers come after the host's, from the tree that the kernel is
    built from.  With sanitize there is fuzz.c as a target of libFuzzer, too,
    named libfuzzer.
    """
    builder = select(settings)
    kernel = rump_folder(settings, variant, sanitize=sanitize)
    tree = builder.tree(variant) / "sys"
    command = ["clang", *SANITIZERS.split()] if sanitize else ["gcc"]
    need(command[0])
    command += [*_FLAGS, "-DRUMP", "-D_GNU_SOURCE"]
    command += [f"-I{tree / 'rump/include'}", "-idirafter", str(tree)]
    libraries = [f"-L{kernel}", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", "-lrumpuser", "-lrump"]
    extra: dict[str, list[str | Path]] = {}
    if sanitize:
        extra["libfuzzer"] = [*command, "-fsanitize=fuzzer", "-DLIBFUZZER", SOURCES / "fuzz.c"]
    folder = _build(settings, f"rump-{kernel.parent.name}-{variant}", command, libraries, extra)
    for name in ("librumpuser", "librump"):
        link = folder / f"{name}.so.0"  # as they call themselves
        if not link.is_symlink():
            link.symlink_to(kernel / f"{name}.so")
    return folder


def _build(
    settings: Settings,
    where: str,
    command: list[str],
    libraries: list[str],
    extra: dict[str, list[str | Path]],
) -> Path:
    """Compile all programs, and extra ones by name, when a source or a command has changed."""
    folder = settings.cache / "programs" / where
    jobs = {path.stem: [*command, path] for path in sorted(SOURCES.glob("*.c"))} | extra
    sources = {word for job in jobs.values() for word in job if isinstance(word, Path)}
    key = digest(jobs, libraries, [file_digest(path) for path in sorted({*sources, *SOURCES.glob("*.h")})])
    with locked(folder):
        if read_json(folder / "manifest.json").get("key") == key:
            return folder
        with step(f"C programs, {where}"):
            for name, job in jobs.items():
                part = folder / f".{name}"
                run([*job, "-o", part, *libraries])
                part.replace(folder / name)
        write_whole(folder / "manifest.json", json.dumps({"key": key}))
    return folder


def sysroot_folder(settings: Settings) -> Path:
    """Return where the libraries and headers of the sets are, unpacked or not: a DESTDIR is unpacked."""
    if settings.sets is None:
        raise Failure("no binary sets", hint="--sets names a folder with base and comp")
    archives = set_archives(settings.sets, SETS)
    if archives[0].name == "METALOG":
        return settings.sets
    parts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in archives]
    return settings.cache / "sysroot" / digest(parts)


def _sysroot(settings: Settings) -> Path:
    """Return a folder with the libraries and headers of the sets."""
    folder = sysroot_folder(settings)
    if folder == settings.sets:
        return folder
    with locked(folder.parent):
        if folder.exists():
            return folder
        assert settings.sets is not None
        archives = set_archives(settings.sets, SETS)
        with step("NetBSD's libraries and headers") as work, whole_folder(folder) as part:
            unpack(archives, part, _read, work, links=True)
    return folder


def _read(name: str) -> str | None:
    """Return the name of a set's member, None for what no compiler reads."""
    return name if name.startswith(_READ) else None
