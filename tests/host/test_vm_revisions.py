"""The ports on NetBSD's own files: the revisions they are listed with, and the header in ziglang."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pykq
from vm import patches
from vm.source import KERN_EVENT, Source

# A folder with a tree a revision of kern_event.c: 1.146/sys/kern/kern_event.c and the like.
REVISIONS = os.environ.get("PYKQ_REVISIONS", "")

THERE = [
    pytest.param(port, Path(REVISIONS, revision), id=f"{port.path.parent.name}-{revision}")
    for port in patches.ports()
    for revision in port.revisions
    if Path(REVISIONS, revision, KERN_EVENT).is_file()
]
NONE = pytest.mark.skip(f"PYKQ_REVISIONS names no folder with 1.146/{KERN_EVENT} and the like")
on_revisions = pytest.mark.parametrize(
    ("port", "tree"),
    THERE or [pytest.param(None, None, marks=NONE)],
)


def fit(tree: Path) -> patches.Fit:
    return patches.fit(Source(tree, tree.name, 0, tree.name))


@on_revisions
def test_port_applies_to_its_revisions_without_fuzz(port: patches.Port, tree: Path) -> None:
    assert f"kern_event.c,v {tree.name} ".encode() in (tree / KERN_EVENT).read_bytes()
    found = fit(tree)
    assert found.port == port
    assert not found.already


@pytest.mark.parametrize("variant", ["stock", "patched"])
@on_revisions
def test_revision_compiles_without_a_warning(
    port: patches.Port, tree: Path, variant: str, tmp_path: Path
) -> None:
    """With -Wall -Werror, as a kernel's object is compiled. Stock, too: so a warning would be the port's."""
    if not all((tree / part).is_dir() for part in ("common/include", "sys/arch/amd64/include")):
        pytest.skip(f"{tree} is no whole tree")
    for name, text in fit(tree).texts(variant).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    for link, machine in {"machine": "amd64", "amd64": "amd64", "x86": "x86", "i386": "i386"}.items():
        (tmp_path / link).symlink_to(tree / "sys/arch" / machine / "include")
    command = ["clang", "--target=x86_64--netbsd", "-c", "-o", "/dev/null", "-O2"]
    command += ["-ffreestanding", "-nostdinc"]
    command += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]  # #pragma GCC push_options
    command += ["-D_KERNEL", "-mcmodel=kernel", "-mno-red-zone", "-mno-sse"]
    folders = (tmp_path / "sys", tmp_path, tree / "sys", tree / "common/include")
    command += [f"-I{folder}" for folder in folders]
    command += [str(tmp_path / KERN_EVENT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_driver_and_header_agree_on_the_number(tmp_path: Path) -> None:
    """The port's hunk applies to the event.h of the release that ziglang's headers are from."""
    zig = pytest.importorskip("ziglang")
    headers = Path(zig.__file__).parent / "lib/libc/include/generic-netbsd"
    port = next(port for port in patches.ports() if port.path.parent.name == "netbsd-10")
    hunk = re.search(r"^--- a/sys/sys/event\.h\n(?:.*\n)*?(?=--- |\Z)", port.path.read_text(), re.MULTILINE)
    assert hunk is not None
    header = tmp_path / "include/sys/event.h"
    header.parent.mkdir(parents=True)
    header.write_bytes((headers / "sys/event.h").read_bytes())
    patch = ["patch", "-F0", "-u", "-f", str(header)]
    done = subprocess.run(patch, input=hunk[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    program = tmp_path / "number.c"
    program.write_text(
        "#include <sys/event.h>\n#include <sys/ioctl.h>\n"
        f"_Static_assert(KQUEUE_TICKLE == {pykq.KQUEUE_TICKLE:#x}, \"the driver's number\");\n"
        "_Static_assert(KQUEUE_TICKLE != KFILTER_BYFILTER && KQUEUE_TICKLE != KFILTER_BYNAME, \"taken\");\n"
    )
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-netbsd.10.1", "-Wall", "-Werror"]
    compiler += ["-I", str(tmp_path / "include"), "-c", "-o", str(tmp_path / "number.o"), str(program)]
    done = subprocess.run(compiler, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
