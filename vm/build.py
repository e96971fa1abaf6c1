"""Kernels: NetBSD's build.sh, unprivileged, out of tree, stock and patched."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import patches
from .cache import digest, file_digest, locked, read_json, write_whole
from .config import Settings
from .log import BuildFailed, Failure, Step, say, step
from .run import need, run
from .source import Source, identify, overlay

MACHINE = "amd64"
PLATFORM = "x86_64--netbsd"
VARIANTS = ("stock", "patched")
CONFIGS = Path(__file__).resolve().parent / "kernel"

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

    def log(self, name: str) -> Path:
        """The file that holds the output of one step, from all its runs."""
        return self.root / "log" / f"{name}.log"

    def variables(self) -> dict[str, str]:
        """What build.sh is given with -V."""
        ours = dict(_LESS)
        if self.settings.toolchain == "clang":
            ours |= _CLANG | {"EXTERNAL_TOOLCHAIN": str(self.root / "llvm")}
        return ours | self.settings.variables(self.source.version)

    def build_sh(self, top: Path, obj: str, *words: str) -> list[str]:
        """Return the build.sh command for a source tree and an object folder."""
        command = [str(top / "build.sh"), "-U", "-u", "-N1", f"-j{os.cpu_count() or 1}"]
        command += ["-m", MACHINE]
        command += ["-O", str(self.root / "obj" / obj)]
        command += ["-T", str(self.tools)]
        for name, value in self.variables().items():
            command += ["-V", f"{name}={value}"]
        return [*command, *words]


    def kernel_words(self, variant: str, config: Path) -> list[str]:
        """Return what build.sh is told for a kernel; the build id shows in uname -v."""
        return ["-B", f"pykq-{variant}", f"kernel={config}"]


def select(settings: Settings) -> Builder:
    """Return the builder for the source that the settings name; raise Failure when they name none."""
    if settings.source is None:
        raise Failure(
            "no NetBSD source",
            hint="--source DIR, PYKQ_SOURCE or the configuration file names a source tree",
        )
    source = identify(settings.source)
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
    stamp, wanted = builder.tools / "pykq.json", {"variables": builder.variables()}
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
            log=builder.log("tools"),
            on_line=seen,
        )
        write_whole(stamp, json.dumps(wanted, indent=1))


def build_kernels(settings: Settings, variants: Sequence[str] = VARIANTS) -> dict[str, dict[str, Any]]:
    """Bring the kernels up to date and return their manifests; do nothing where nothing has changed.

    Raises Failure for a source that is none, that no port fits, or a missing
    program; BuildFailed when build.sh ends with an error.  An interrupted
    build goes on where it stopped the next time.
    """
    builder = select(settings)
    fit = patches.fit(builder.source)
    if fit.already:
        say(f"{builder.source} has the patch already; stock is made by taking {fit.port.name} out")
    config = config_path(builder)
    inputs = {
        "source": str(builder.source.top),
        "fingerprint": builder.source.fingerprint(),
        "config_sha256": file_digest(config),
        "variables": builder.variables(),
    }
    manifests = {}
    with locked(builder.root):
        for variant in variants:
            texts = fit.texts(variant)
            key = digest(inputs, {name: text.decode("latin-1") for name, text in texts.items()})
            folder = kernel_folder(builder, variant)
            manifest = read_json(folder / "manifest.json")
            if manifest.get("key") == key and (folder / "netbsd").exists():
                say(f"{variant} kernel: up to date ({folder / 'netbsd'})")
                manifests[variant] = manifest
                continue
            if settings.toolchain == "clang":
                need("clang", "clang++", "ld", "objcopy")
            build_tools(builder)
            with step(f"{variant} kernel {config.name}, NetBSD {builder.source.version}") as work:
                overlay(builder.source, builder.tree(variant), texts)
                built, objects = _make_kernel(builder, variant, config, work, manifest.get("objects", 0))
            manifests[variant] = {
                "key": key,
                **provenance(builder.source, fit, variant),
                "config": config.name,
                "compiler": _compiler(builder),
                "objects": max(objects, manifest.get("objects", 0)),
                "seconds": round(work.seconds, 1),
                "pvh": pvh(built),
                "sha256": file_digest(built),
                **inputs,
            }
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").unlink(missing_ok=True)
            write_whole(folder / "netbsd", built.read_bytes(), 0o755)
            write_whole(folder / "manifest.json", json.dumps(manifests[variant], indent=1))
    return manifests


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


def pvh(kernel: Path) -> bool:
    """Tell whether QEMU can start a kernel by itself: whether it has Xen's PHYS32_ENTRY note.

    An ELF note whose name is "Xen" and whose type is 18 (xen/include/public/elfnote.h).
    """
    note = b"\x04\x00\x00\x00" + b"\x04\x00\x00\x00" + b"\x12\x00\x00\x00" + b"Xen\x00"
    wide = b"\x04\x00\x00\x00" + b"\x08\x00\x00\x00" + b"\x12\x00\x00\x00" + b"Xen\x00"
    image = kernel.read_bytes()
    return note in image or wide in image


def _make_kernel(
    builder: Builder, variant: str, config: Path, work: Step, expected: int
) -> tuple[Path, int]:
    """Run build.sh for one kernel; return the kernel and how many objects were compiled."""
    tree = builder.tree(variant)
    compiled = Counter(work, COMPILED, expected)
    run(
        builder.build_sh(tree, variant, *builder.kernel_words(variant, config)),
        cwd=tree,
        log=builder.log(variant),
        on_line=compiled,
    )
    work.note = f"{compiled.count} objects"
    built = builder.root / "obj" / variant / "sys/arch" / MACHINE / "compile" / config.name / "netbsd"
    if not built.is_file():
        raise BuildFailed(f"build.sh left no kernel at {built}", hint=f"see {builder.log(variant)}")
    return built, compiled.count


class Counter:
    """Counts the lines of output that match, and shows the count."""

    def __init__(self, work: Step, pattern: re.Pattern[str], expected: int = 0) -> None:
        self.count = 0
        self._work, self._pattern, self._expected = work, pattern, expected

    def __call__(self, line: str) -> None:
        if self._pattern.match(line):
            self.count += 1
            total = f" of {self._expected}" if self._expected >= self.count else ""
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
