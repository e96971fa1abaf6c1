"""What this machine has of what pykq needs, and the one command that installs the rest."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from .config import Settings, config_file
from .log import Failure, console, say
from .run import PACKAGES


class Need(NamedTuple):
    """A program or header, and the commands that do not work without it."""

    what: str
    commands: str
    found: str  # where, '' when it is missing


_PROGRAMS = {
    "cc": "build-kernel",
    "c++": "build-kernel",
    "make": "build-kernel",
    "patch": "build-kernel",
    "clang": "build-kernel",
    "ld": "build-kernel",
    "objcopy": "build-kernel",
    "qemu-system-x86_64": "vm.up test demo",
    "ssh": "vm.ssh",
}
_HEADERS = {"zlib.h": "build-kernel"}
_ROOM_GIB = 4  # the build of one release


def needs() -> list[Need]:
    """Look for everything that pykq runs."""
    found = [Need(name, commands, shutil.which(name) or "") for name, commands in _PROGRAMS.items()]
    for name, commands in _HEADERS.items():
        path = Path("/usr/include", name)
        found.append(Need(name, commands, str(path) if path.exists() else ""))
    return found


def install_command(missing: list[Need]) -> list[str]:
    """Return the command that installs what is missing; raise Failure where pykq knows no package manager."""
    packages = sorted({PACKAGES[need.what] for need in missing})
    if shutil.which("apt-get") is None:
        raise Failure("pykq knows Debian's packages only", hint=f"install {', '.join(packages)}")
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    return command if os.geteuid() == 0 else ["sudo", *command]


def examine(settings: Settings, *, install: bool = False, as_json: bool = False) -> bool:
    """Print what is here and what is missing; install it when asked; return whether build-kernel can run."""
    missing = [need for need in needs() if not need.found]
    if install and missing:
        command = install_command(missing)
        say(shlex.join(command))
        prefix = command[: command.index("apt-get")]
        for words in ([*prefix, "apt-get", "update", "-q"], command):
            if subprocess.run(words, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}).returncode:
                raise Failure(f"{shlex.join(words)} failed", hint="its output is above")
        missing = [need for need in needs() if not need.found]
    room_gib = shutil.disk_usage(_existing(settings.cache)).free / (1 << 30)
    inputs = {name: getattr(settings, name) for name in ("source", "sets", "python")}
    able = not any("build-kernel" in need.commands for need in missing) and settings.source is not None
    if as_json:
        print(json.dumps({
            "needs": {need.what: need.found for need in needs()},
            "inputs": {name: str(path) if path else None for name, path in inputs.items()},
            "room_gib": round(room_gib, 1),
            "able": able,
        }, indent=1))
        return able
    table = Table("what", "for", "found", box=None)
    for need in needs():
        table.add_row(need.what, need.commands, need.found or "missing")
    for name, path in inputs.items():
        table.add_row(f"--{name}", "build-kernel test demo" if name == "source" else "test demo",
                      str(path) if path else f"not named (PYKQ_{name.upper()}, {config_file()})")
    table.add_row("disk", f"some {_ROOM_GIB} GiB", f"{room_gib:.0f} GiB free for {settings.cache}")
    table.add_row("/dev/kvm", "speed", _kvm())
    console.print(table)
    if missing:
        say(f"to install what is missing: {shlex.join(install_command(missing))}, or invoke doctor --install")
    return able


def _kvm() -> str:
    """Say what is known of KVM without running anything."""
    if not Path("/dev/kvm").exists():
        return "not there: software emulation"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there, not allowed: software emulation (add yourself to the group kvm)"
    return "there; the first vm.up finds out whether it runs NetBSD"


def _existing(path: Path) -> Path:
    """Return the nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return path
