"""The same kernel code as a library for this host: NetBSD's rump kernel, stock and patched."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import patches
from .build import COMPILED, JOBS, VARIANTS, Builder, Counter, build_tools, provenance, select
from .cache import digest, locked, read_json, write_whole
from .config import Settings
from .log import BuildFailed, Failure, say, step
from .run import need, run, side_by_side
from .source import KERN_EVENT, overlay

# The hypercalls, and the kernel: kqueue, descriptors, pipes and timers are in
# its base.  No faction (file systems, network, devices) is needed.
_LIBRARIES = ("librumpuser", "librump")

# What librumpuser's configure would find on a Linux host with glibc.
_HOST_HAS = (
    "ALIGNED_ALLOC CLOCKID_T CLOCK_GETTIME CLOCK_NANOSLEEP DLINFO GETSUBOPT INTTYPES_H PATHS_H "
    "POSIX_MEMALIGN PTHREAD_SETNAME2 REGISTER_T STDINT_H SYS_CDEFS_H SYS_PARAM_H UTIMENSAT"
)

# NetBSD's code must not believe that it is compiled for Linux.
_UNDEFINE = "-Ulinux -U__linux -U__linux__ -U__gnu_linux__"

# Clang's, because libFuzzer is (tests/c/fuzz.c).
# subr_percpu.c passes memcpy a null pointer with length 0, which the kernel's memcpy takes.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=nonnull-attribute"
_KMEM = Path(__file__).resolve().parent / "sanitize" / "kmem.h"


def rump_folder(settings: Settings, variant: str, *, sanitize: bool = False) -> Path:
    """Return where a variant's libraries and manifest.json are, built or not."""
    name = select(settings).source.name
    return settings.cache / "rump" / f"{name}{'-sanitized' if sanitize else ''}" / variant


def build_rump(
    settings: Settings, variants: Sequence[str] = VARIANTS, *, sanitize: bool = False, edit: bytes = b""
) -> dict[str, dict[str, Any]]:
    """Bring the rump kernels up to date and return their manifests; do nothing where nothing has changed.

    With sanitize they are built with AddressSanitizer and
    UndefinedBehaviorSanitizer.  edit is added to the end of kern_event.c in
    pykq's own copy, for measuring what an edit costs.  Raises as build_kernels does, and Failure for
    a source without rump and a host that is not x86_64 Linux.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Failure("rump kernels are built on x86_64 Linux only", hint="invoke test --guest needs none")
    builder = select(settings)
    for library in _LIBRARIES:
        if not (builder.source.top / "lib" / library).is_dir():
            raise Failure(f"{builder.source.top} has no lib/{library}", hint="unpack the release's src set")
    fit = patches.fit(builder.source)
    inputs = {
        "source": str(builder.source.top),
        "fingerprint": builder.source.fingerprint(),
        "sanitize": sanitize,
    }
    manifests: dict[str, dict[str, Any]] = {}
    with locked(builder.root):
        pending = {}
        for variant in variants:
            texts = dict(fit.texts(variant))
            texts[KERN_EVENT] += edit
            key = digest(inputs, {name: text.decode("latin-1") for name, text in texts.items()})
            folder = rump_folder(settings, variant, sanitize=sanitize)
            manifest = read_json(folder / "manifest.json")
            if manifest.get("key") == key and all((folder / f"{name}.so").exists() for name in _LIBRARIES):
                say(f"{variant} rump kernel: up to date ({folder})")
                manifests[variant] = manifest
            else:
                pending[variant] = (key, texts)
        if not pending:
            return manifests
        need("clang" if sanitize else "gcc", "ar", "objcopy")
        if sanitize:
            sanitizer_environment()  # for its Failure: they are a package of their own
        build_tools(builder)
        with step(f"{' and '.join(pending)} rump kernel, NetBSD {builder.source.version}") as work:
            for variant, (_, texts) in pending.items():
                overlay(builder.source, builder.tree(variant), texts)
            counter = Counter(work, COMPILED)
            side_by_side([partial(_make, builder, variant, sanitize, counter) for variant in pending])
            work.note = f"{counter.count} objects"
        for variant, (key, _) in pending.items():
            folder = rump_folder(settings, variant, sanitize=sanitize)
            manifests[variant] = {
                "key": key,
                **provenance(builder.source, fit, variant),
                "seconds": round(work.seconds, 1),
                **inputs,
            }
            (folder / "manifest.json").unlink(missing_ok=True)
            for name in _LIBRARIES:
                built = _library(builder, variant, name, sanitize)
                write_whole(folder / built.name, built.read_bytes(), 0o755)
            write_whole(folder / "manifest.json", json.dumps(manifests[variant], indent=1))
    return manifests


def sanitizer_environment() -> dict[str, str]:
    """Return the variables with which a Python can load a sanitized rump kernel.

    A Python that was not built with AddressSanitizer leaks by its lights.
    Raises Failure for a clang that came without its sanitizers.
    """
    find = ["clang", "-print-file-name=libclang_rt.asan-x86_64.so"]
    library = subprocess.run(find, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if not Path(library).is_absolute():
        raise Failure("clang has no sanitizers here", hint="apt-get install libclang-rt-dev, or compiler-rt")
    return {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run_module(settings: Settings, module: str, *arguments: str, show: bool = True) -> str:
    """Run a module of pykq on the patched rump kernel, built when it is not there; return what it prints.

    With show its output goes to the screen instead.
    """
    build_rump(settings, ["patched"])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYKQ_KERNEL": str(rump_folder(settings, "patched"))},
        stdout=None if show else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failure(f"{module} ended with status {done.returncode} on the rump kernel")
    return done.stdout or ""


def _obj(builder: Builder, variant: str, sanitize: bool) -> Path:
    """Return the folder for objects of a variant."""
    return builder.root / "obj" / f"rump-{variant}{'-sanitized' if sanitize else ''}"


def _library(builder: Builder, variant: str, name: str, sanitize: bool) -> Path:
    """Return the shared library that make left."""
    library = _obj(builder, variant, sanitize) / name / f"{name}.so"
    if not library.is_file():
        raise BuildFailed(f"make left no {library}")
    return library


def _make(builder: Builder, variant: str, sanitize: bool, on_line: Callable[[str], object]) -> None:
    """Build the libraries of a variant."""
    for name in _LIBRARIES:
        command = _make_command(builder, variant, name, sanitize)
        for target in ("depend", "realall"):
            run(
                [*command, target],
                cwd=builder.tree(variant) / "lib" / name,
                on_line=on_line,
            )


def _make_command(builder: Builder, variant: str, name: str, sanitize: bool) -> list[str]:
    """Return the command that runs NetBSD's make and makefiles to build a library for this host."""
    tree, obj = builder.tree(variant), _obj(builder, variant, sanitize)
    (obj / name).mkdir(parents=True, exist_ok=True)
    compiler = "gcc -Wa,--noexecstack -Wl,-z,defs"
    if sanitize:
        compiler = f"clang {SANITIZERS} -fno-omit-frame-pointer -Wa,--noexecstack"
    debug = "-O2 -g -w"
    if name == "librumpuser":
        debug += f" -DRUMPUSER_CONFIG=1 -I{_configure(tree, obj)} -I{tree}/sys/rump/include"
    command = ["env", "-i", "PATH=/usr/bin:/bin", "LC_ALL=C", f"MAKEOBJDIR={obj}/${{.CURDIR:T}}"]
    command += [str(builder.tools / "bin" / "nbmake")]
    command += ["-m", str(tree / "share/mk")]
    command += [JOBS]
    command += ["MACHINE=amd64", "MACHINE_ARCH=x86_64", "MAKECONF=/dev/null"]
    # The host's own compiler and linker, but NetBSD's config(1) and mkdep(1).
    command += ["USETOOLS=no", f"TOOLDIR={builder.tools}", f"TOOL_CONFIG={builder.tools}/bin/nbconfig"]
    command += ["MKDEP=CC=${CC:Q} ${TOOLDIR}/bin/nbmkdep", "LORDER=echo", "TSORT=cat"]
    command += [f"CC={compiler}"]
    command += [f"DBG={debug}"]
    command += [f"RUMPKERN_UNDEF={_UNDEFINE}"]
    # Makefile.rump renames the symbols of all objects when one has changed; this: of those that have.
    command += ["RUMPOBJ_NORENAME=rump_syscalls.pico ${.ALLSRC:${.OODATE:S/^/N/:ts:}:S/^/^/:S/$/$$/}"]
    command += ["MKPROFILE=no", "MKSTATICLIB=no", "USE_SSP=no"]
    # A library of the host needs none of NetBSD's start files, nor its libpthread.
    command += ["SHLIB_LDSTARTFILE=", "SHLIB_LDENDFILE=", "LIBDO.pthread=_external"]
    if sanitize:
        command += [f"CPPFLAGS.kern_event.c=-include {_KMEM} -fsanitize=fuzzer-no-link"]
    return command


def _configure(tree: Path, obj: Path) -> Path:
    """Write what librumpuser's configure would; return the folder to include it from."""
    include = obj / "include"
    text = "".join(f"#define HAVE_{name} 1\n" for name in _HOST_HAS.split())
    config = include / "rumpuser_config.h"
    if not config.exists() or config.read_text() != text:
        write_whole(config, text)
    link, target = include / "rump", tree / "lib/librumpuser"
    if not link.is_symlink():
        link.symlink_to(target)
    return include
