"""Kernels: NetBSD's build.sh, unprivileged, out of tree, stock and patched."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import patches
from .cache import digest, file_digest, locked, read_json, write_whole
from .config import Settings
from .log import BuildFailed, Failure, Step, say, step, timed
from .run import need, run, side_by_side
from .source import KERN_EVENT, Source, identify, overlay

MACHINE = "amd64"
PLATFORM = "x86_64--netbsd"
VARIANTS = ("stock", "patched")
CONFIGS = Path(__file__).resolve().parent / "kernel"

JOBS = f"-j{os.cpu_count() or 1}"

# How make's output says that an object is compiled.
COMPILED = re.compile(r"^\s*#?\s*compile\s")

# What a kernel, a rump kernel and an image do not need.
_LESS = dict.fromkeys(
    ["MKCTF", "MKDOC", "MKDTRACE", "MKGROFF", "MKHTML", "MKINFO", "MKLINT", "MKMAN", "MKNLS", "MKX11"],
    "no",
)

# The host's LLVM in place of NetBSD's own toolchain (share/mk/bsd.README,
# EXTERNAL_TOOLCHAIN), and of build.sh's tools the part that such a build needs.
# A compiler newer than the tree has new warnings; they must not be errors.
_CLANG = {
    "TOOLS_BUILDRUMP": "yes",
    "HAVE_LLVM": "yes",
    "MKLLVM": "no",
    "MKGCC": "no",
    "MKBINUTILS": "no",
    "NOGCCERROR": "yes",
}

# What that part lacks: the code that wakes a machine up from sleep (genwakecode.sh) is empty without it.
_CLANG_TOOLS = ["hexdump"]

# NetBSD's name for a tool, and what the host runs for it.  The kernel's linker
# script goes through the preprocessor, which must take it for assembler.
_BINUTILS = ["ar", "nm", "objcopy", "objdump", "ranlib", "readelf", "size", "strings", "strip"]
_HOST_TOOLS = {
    "clang": f"clang --target={PLATFORM}",
    "clang++": f"clang++ --target={PLATFORM}",
    "clang-cpp": f"clang --target={PLATFORM} -E -x assembler-with-cpp",
    "as": f"clang --target={PLATFORM} -c -x assembler",
    "ld": "ld -m elf_x86_64",
    **{name: name for name in _BINUTILS},
}


@dataclass(frozen=True)
class Builder:
    """The build of one source tree with one toolchain: where its parts are, and how to call build.sh."""

    settings: Settings
    source: Source

    @property
    def root(self) -> Path:
        """The folder in the cache that holds all of this build."""
        return self.settings.cache / "build" / f"{self.source.name}-{self.settings.toolchain}"

    @property
    def tools(self) -> Path:
        """TOOLDIR."""
        return self.root / "tools"

    def tree(self, variant: str) -> Path:
        """The overlay that a variant is built from."""
        return self.root / "tree" / variant

    def variables(self) -> dict[str, str]:
        """What build.sh is given with -V."""
        ours = dict(_LESS)
        if self.settings.toolchain == "clang":
            ours |= _CLANG | {"EXTERNAL_TOOLCHAIN": str(self.root / "llvm")}
        return ours | self.settings.variables(self.source.version)

    def build_sh(self, top: Path, obj: str, *words: str) -> list[str]:
        """Return the build.sh command for a source tree and an object folder."""
        command = [str(top / "build.sh"), "-U", "-u", "-N1", JOBS]
        command += ["-m", MACHINE]
        command += ["-O", str(self.root / "obj" / obj)]
        command += ["-T", str(self.tools)]
        for name, value in self.variables().items():
            command += ["-V", f"{name}={value}"]
        return [*command, *words]


    def kernel_words(self, variant: str, config: Path) -> list[str]:
        """Return what build.sh is told for a kernel; the build id shows in uname -v."""
        return ["-B", _build_id(variant), f"kernel={config}"]


def select(settings: Settings) -> Builder:
    """Return the builder for the source that the settings name; raise Failure when they name none."""
    if settings.source is None:
        raise Failure(
            "no NetBSD source",
            hint="--source DIR, PYKQ_SOURCE or the configuration file names a source tree",
        )
    source = identify(settings.source)
    for path, remedy in (
        (source.top, "--source names another"),
        (settings.cache, "PYKQ_CACHE names another"),
        (CONFIGS, "move this checkout"),
    ):
        odd = re.search(r"[^\w./+,@%~=-]", str(path))
        if odd is not None:
            what = "space" if odd[0].isspace() else odd[0]
            raise Failure(f"{path}: NetBSD's make takes no {what} in a path", hint=remedy)
    if source.top == settings.cache or source.top in settings.cache.parents:
        raise Failure(f"the cache {settings.cache} lies inside the source", hint="set PYKQ_CACHE")
    return Builder(settings, source)


def config_path(builder: Builder) -> Path:
    """Find a kernel configuration: a file, one of pykq's own, or one of the tree's."""
    name = builder.settings.kernel_config
    own, theirs = CONFIGS / name, builder.source.top / "sys/arch" / MACHINE / "conf" / name
    candidates = [own, theirs]
    if "/" in name:
        candidates = [Path(name).expanduser().absolute()]
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIGS.iterdir()))
    raise Failure(f"no kernel configuration {name}", hint=f"there is {known}; the tree has GENERIC")


def kernel_folder(builder: Builder, variant: str) -> Path:
    """Return where a variant's kernel and its manifest.json are, built or not."""
    return builder.root / "kernel" / config_path(builder).name / variant


def build_tools(builder: Builder) -> None:
    """Build the host tools, once for a tree, a toolchain and a set of variables."""
    also = _CLANG_TOOLS if builder.settings.toolchain == "clang" else []
    also = [name for name in also if (builder.source.top / "usr.bin" / name).is_dir()]  # not in every tree
    stamp, wanted = builder.tools / "pykq.json", {"variables": builder.variables(), "also": also}
    if read_json(stamp) == wanted:
        return
    need("cc", "c++", "make")
    if stamp.exists():
        shutil.rmtree(builder.tools)
        shutil.rmtree(builder.root / "obj" / "tools", ignore_errors=True)
    if builder.settings.toolchain == "clang":
        _wrap_llvm(builder.root / "llvm" / "bin")
    with step(f"host tools for NetBSD {builder.source.version}") as work:
        seen = Counter(work, re.compile(r"^\S*\s*(?:install|create|compile|link|build)\s+\S*/"))
        run(
            builder.build_sh(builder.source.top, "tools", "tools"),
            cwd=builder.source.top,
            on_line=seen,
        )
        for name in also:
            make_tool(builder, name)
        write_whole(stamp, json.dumps(wanted, indent=1))


def make_tool(builder: Builder, name: str) -> None:
    """Build one more of the host tools, with the wrapper of make that build.sh left."""
    for target in ("obj", "dependall", "install"):
        run(
            [builder.tools / "bin" / f"nbmake-{MACHINE}", "-C", builder.source.top / "tools" / name, target],
            cwd=builder.source.top,
        )


def build_kernels(
    settings: Settings, variants: Sequence[str] = VARIANTS, *, edit: bytes = b""
) -> dict[str, dict[str, Any]]:
    """Bring the kernels up to date and return their manifests; do nothing where nothing has changed.

    edit is added to the end of kern_event.c in pykq's own copy, for measuring
    what an edit costs.  Raises Failure for a source that is none, that no port fits, or a missing
    program; BuildFailed when build.sh ends with an error.  An interrupted
    build goes on where it stopped the next time.
    """
    builder = select(settings)
    with timed("looking at the source"):
        fit = patches.fit(builder.source)
        fingerprint = builder.source.fingerprint()
    if fit.already:
        say(f"{builder.source} has the patch already; stock is made by taking {fit.port.name} out")
    config = config_path(builder)
    inputs = {
        "source": str(builder.source.top),
        "fingerprint": fingerprint,
        "config_sha256": file_digest(config),
        "variables": builder.variables(),
    }
    manifests, pending = {}, {}
    with locked(builder.root):
        for variant in variants:
            texts = dict(fit.texts(variant))
            texts[KERN_EVENT] += edit
            key = key_of(inputs, texts)
            folder = kernel_folder(builder, variant)
            manifests[variant] = read_json(folder / "manifest.json")
            if manifests[variant].get("key") == key and (folder / "netbsd").exists():
                say(f"{variant} kernel: up to date ({folder / 'netbsd'})")
            else:
                pending[variant] = (key, texts)
        if not pending:
            return manifests
        if settings.toolchain == "clang":
            need("clang", "clang++", "ld", "objcopy")
        build_tools(builder)
        expected = sum(manifests[variant].get("objects", 0) for variant in pending)
        with step(f"{' and '.join(pending)} kernel {config.name}, NetBSD {builder.source.version}") as work:
            for variant, (_, texts) in pending.items():
                with timed(f"{variant} tree"):
                    overlay(builder.source, builder.tree(variant), texts)
            compiled = Counter(work, COMPILED, expected)
            calls = [
                partial(_make_kernel, builder, variant, config, compiled, manifests[variant].get("variables"))
                for variant in pending
            ]
            kernels = dict(zip(pending, side_by_side(calls), strict=True))
            work.note = f"{compiled.count} objects"
        for variant, built in kernels.items():
            folder = kernel_folder(builder, variant)
            manifests[variant] = {
                "key": pending[variant][0],
                **provenance(builder.source, fit, variant),
                "config": config.name,
                "compiler": _compiler(builder),
                "objects": max(compiled.count // len(pending), manifests[variant].get("objects", 0)),
                "seconds": round(work.seconds, 1),
                "pvh": pvh(built),
                "sha256": file_digest(built),
                **inputs,
            }
            keep(folder, built.read_bytes(), manifests[variant])
    return manifests


def key_of(inputs: dict[str, Any], texts: Mapping[str, bytes]) -> str:
    """Return what tells a kernel that is up to date from one that is not."""
    return digest(inputs, {name: text.decode("latin-1") for name, text in texts.items()})


def keep(folder: Path, kernel: bytes, manifest: dict[str, Any]) -> None:
    """Put a kernel and its manifest where the other commands find them."""
    (folder / "manifest.json").unlink(missing_ok=True)
    write_whole(folder / "netbsd", kernel, 0o755)
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1))


def provenance(source: Source, fit: patches.Fit, variant: str) -> dict[str, Any]:
    """Say for a manifest what a kernel, or a rump kernel, is made from."""
    patched = variant == "patched"
    return {
        "variant": variant,
        "netbsd": source.version,
        "kern_event": source.revision,
        "port": fit.port.name if patched else None,
        "port_sha256": file_digest(fit.port.path) if patched else None,
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def show(settings: Settings) -> None:
    """Print the commands that a build would run, whole and ready to be pasted."""
    builder = select(settings)
    port = patches.fit(builder.source).port
    print(f"# {builder.source}; the patched tree has patches/{port.name}")
    print(shlex.join(builder.build_sh(builder.source.top, "tools", "tools")))
    for variant in VARIANTS:
        words = builder.kernel_words(variant, config_path(builder))
        print(shlex.join(builder.build_sh(builder.tree(variant), variant, *words)))


def _build_id(variant: str) -> str:
    """Return the build id of a variant, which build.sh names its wrapper of make after."""
    return f"pykq-{variant}"


# The head of an ELF note: the sizes of its name and of its content, and Xen's number for PHYS32_ENTRY
# (xen/include/public/elfnote.h).
_PHYS32_ENTRY = re.compile(rb"\x04\0\0\0[\x04\x08]\0\0\0\x12\0\0\0Xen\0")
_PT_NOTE = 4


def pvh(kernel: Path) -> bool:
    """Tell whether QEMU can start a kernel by itself: whether it has Xen's PHYS32_ENTRY note.

    The note has to be where a program header says so: QEMU looks nowhere else,
    and the kernels of NetBSD 10 have it in a section only.
    """
    image = kernel.read_bytes()
    wide = image[4] == 2  # ELFCLASS64
    table = ("<Q14xHH", 32) if wide else ("<I10xHH", 28)  # e_phoff, e_phentsize, e_phnum
    header = "<I4xQ16xQ" if wide else "<II8xI"  # p_type, p_offset, p_filesz
    start, size, count = struct.unpack_from(table[0], image, table[1])
    for at in range(start, start + size * count, size):
        kind, offset, length = struct.unpack_from(header, image, at)
        if kind == _PT_NOTE and _PHYS32_ENTRY.search(image, offset, offset + length):
            return True
    return False


def _make_kernel(
    builder: Builder, variant: str, config: Path, compiled: Counter, built_with: dict[str, str] | None
) -> Path:
    """Make one kernel; built_with are the build.sh variables that it was last made with.

    When these are the same, what build.sh does for a kernel is done directly:
    without finding out afresh, by 60 starts of make, what its wrapper of make knows.
    """
    tree = builder.tree(variant)
    folder = builder.root / "obj" / variant / "sys/arch" / MACHINE / "compile" / config.name
    make = builder.tools / "bin" / f"nbmake-{MACHINE}-{_build_id(variant)}"
    commands = [builder.build_sh(tree, variant, *builder.kernel_words(variant, config))]
    if built_with == builder.variables() and make.exists() and folder.exists():
        nbconfig = str(builder.tools / "bin/nbconfig")
        configure = [nbconfig, "-b", str(folder), "-s", str(tree / "sys"), str(config)]
        in_folder = [str(make), "-C", str(folder), JOBS]
        commands = [configure, [*in_folder, "depend"], [*in_folder, "all"]]
    for command in commands:
        with timed(f"{variant} kernel: {Path(command[0]).name} {command[-1]}"):
            run(command, cwd=tree, on_line=compiled)
    built = folder / "netbsd"
    if not built.is_file():
        raise BuildFailed(f"build.sh left no kernel at {built}", hint="does its config(5) file name another?")
    return built


class Counter:
    """Counts the lines of output that match, and shows the count and how long the rest may take."""

    def __init__(self, work: Step, pattern: re.Pattern[str], expected: int = 0) -> None:
        self.count = 0
        self._work, self._pattern, self._expected = work, pattern, expected
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        if self._pattern.match(line):
            self.count += 1
            total = ""
            if self._expected >= self.count:
                each_s = (time.monotonic() - self._began) / self.count
                total = f" of {self._expected}, some {each_s * (self._expected - self.count):.0f} s more"
            self._work.update(f"{self.count}{total}")


def _wrap_llvm(folder: Path) -> None:
    """Give the host's programs the names that EXTERNAL_TOOLCHAIN wants."""
    for name, command in _HOST_TOOLS.items():
        write_whole(folder / f"{PLATFORM}-{name}", f'#!/bin/sh\nexec {command} "$@"\n', 0o755)


def _compiler(builder: Builder) -> str:
    """Return the first line of the compiler's --version."""
    clang = builder.settings.toolchain == "clang"
    program = "clang" if clang else str(builder.tools / "bin" / f"{PLATFORM}-gcc")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]
