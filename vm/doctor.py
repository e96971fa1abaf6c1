"""What this machine has of what pykq needs, and the one command that installs the rest."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from .config import RELEASE_PARTS, Settings
from .log import Failure, logger, say, show, step
from .mirror import WAYS_ON
from .packages import install_command
from .qemu import QEMU, accelerators
from .release import Release

# The commands that do not work without it; test needs what build-* and vm.* do.
_PROGRAMS = {
    "cc": "build-*",
    "c++": "build-*",
    "make": "build-*",
    "patch": "build-*",
    "objcopy": "build-*",
    "clang": "build-kernel",
    "clang++": "build-kernel",
    "ld": "build-kernel",
    "ar": "build-rump",
    "gcc": "build-rump",
    "ld.lld": "test",
    QEMU: "vm.*",
    "ssh": "vm.ssh",
    "gpg": "signatures",
}
_HEADERS = {"zlib.h": "build-*"}
_MAIN = ("build-*", "build-kernel")  # what the exit status is about

_ROOM_GIB = 4  # the build of one release

# A boot sector that writes K to the first serial port, and halts.
_BOOT_SECTOR = b"\xba\xf8\x03\xb0K\xee\xf4".ljust(510, b"\0") + b"\x55\xaa"
_RUNS_WITHIN_S = 4.0

# Of what installs packages: the last lines when it fails, and how much of a line while it works.
_TAIL_LINES = 15
_SHOWN_COLUMNS = 60


@dataclass(frozen=True)
class Need:
    """A program or header, and the commands that do not work without it."""

    what: str
    commands: str
    found: str  # where, '' when it is missing
    version: str


def needs() -> list[Need]:
    """Look for everything that pykq runs."""
    found = []
    for name, commands in _PROGRAMS.items():
        path = shutil.which(name) or ""
        found.append(Need(name, commands, path, _version(path) if path else ""))
    for name, commands in _HEADERS.items():
        paths = [Path(folder, name) for folder in ("/usr/include", "/usr/local/include")]
        found.append(Need(name, commands, next((str(path) for path in paths if path.exists()), ""), ""))
    return found


def examine(settings: Settings, *, install: bool = False, as_json: bool = False) -> bool:
    """Print what is here and what is missing; install it when asked; return whether build-kernel can run."""
    found = needs()
    command = install_command(need.what for need in found if not need.found)
    if install and command:
        _install(command)
        found = needs()
        command = install_command(need.what for need in found if not need.found)
    room_gib = shutil.disk_usage(_existing(settings.cache)).free / (1 << 30)
    inputs = {name: getattr(settings, name) for name in RELEASE_PARTS}
    mirror, has_source = _mirror(settings)
    kvm = _kvm(settings)
    lacking = [need.what for need in found if need.commands in _MAIN and not need.found]
    lacking += [] if has_source else [f"a source ({WAYS_ON})"]
    lacking += ["room"] if room_gib < _ROOM_GIB else []
    if as_json:
        print(json.dumps({
            "needs": [asdict(need) for need in found],
            "install": command,
            "release": settings.release,
            "inputs": {name: str(path) if path else None for name, path in inputs.items()},
            "mirror": mirror,
            "room_gib": round(room_gib, 1),
            "kvm": kvm,
            "lacking": lacking,
            "able": not lacking,
        }, indent=1))
        return not lacking
    table = Table("what", "for", "found", box=None)
    for need in found:
        here = f"{need.version or 'yes'}, {need.found}" if need.found else "missing"
        table.add_row(need.what, need.commands, here)
    for name, path in inputs.items():
        taken = f"that of NetBSD {settings.release}" if settings.release else "not named"
        table.add_row(f"--{name}", "build-*" if name == "source" else "vm.*", str(path or taken))
    table.add_row("mirror", "", mirror)
    table.add_row("disk", f"{_ROOM_GIB} GiB", f"{room_gib:.0f} GiB free for {settings.cache}")
    table.add_row("/dev/kvm", "speed", kvm)
    show(table)
    if command:
        say(f"to install what is missing: {shlex.join(command)}, or invoke doctor --install")
    say(f"build-kernel cannot run: it lacks {', '.join(lacking)}" if lacking else "build-kernel can run")
    return not lacking


def _install(command: list[str]) -> None:
    """Run the command that installs packages."""
    steps = [command]
    if "apt-get" in command:  # whose lists a fresh system does not have
        steps.insert(0, [*command[: command.index("apt-get") + 1], "update", "-q"])
    for words in steps:
        _watch(words)


def _watch(words: list[str]) -> None:
    """Run a program that installs, its output into the log, its last line on the screen.

    Unlike with vm.run.watch() it keeps the terminal, on which sudo asks for a
    password; so the step begins when it has said something.
    """
    say(shlex.join(words))
    recent: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        words,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process, ExitStack() as stack:
        assert process.stdout is not None
        work = None
        for line in process.stdout:
            work = work or stack.enter_context(step("packages"))
            recent.append(line.rstrip())
            logger.info("%s", recent[-1])
            work.update(recent[-1][:_SHOWN_COLUMNS])
        if process.wait():
            what = f"{shlex.join(words)} failed with status {process.returncode}"
            raise Failure(what, tail="\n".join(recent))


def _version(path: str) -> str:
    """Return the version that a program says it has, '' when it says none."""
    option = "-V" if path.endswith("/ssh") else "--version"
    try:
        done = subprocess.run([path, option], capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"\d+\.\d+[.\w]*", done.stdout + done.stderr)
    return match[0] if match else ""


def _mirror(settings: Settings) -> tuple[str, bool]:
    """Say whether a mirror is needed for a source, and answers; and whether a source can be had."""
    release = Release(settings)
    if settings.source is not None:
        return "not needed: a source is named", True
    if release.has("source"):
        return f"not needed: the source of NetBSD {release.name} is in the cache", True
    try:
        release.reach()
    except Failure as failure:
        return str(failure), False
    return f"answers, and has NetBSD {release.name}", True


def _kvm(settings: Settings) -> str:
    """Say what KVM is good for."""
    if not Path("/dev/kvm").exists():
        return "not there: software emulation"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there, not allowed: software emulation (add yourself to the group kvm)"
    if shutil.which(QEMU) is None:
        return f"there; {QEMU} is missing"
    if not runs_code("kvm"):
        return "there, but does not run a boot sector: software emulation"
    if "kvm" not in accelerators(settings):
        return "there, but no vmx or svm in /proc/cpuinfo, or NetBSD did not run: software emulation"
    return "works"


def runs_code(accelerator: str) -> bool:
    """Tell whether QEMU runs a boot sector with an accelerator."""
    with tempfile.NamedTemporaryFile(prefix="pykq-") as disk:
        disk.write(_BOOT_SECTOR)
        disk.flush()
        line = [QEMU, "-nodefaults", "-no-user-config", "-display", "none"]
        line += ["-accel", accelerator]
        line += ["-cpu", "host" if accelerator == "kvm" else "max"]
        line += ["-serial", "stdio"]
        line += ["-drive", f"format=raw,snapshot=on,file={disk.name}"]
        with subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                ready, _, _ = select.select([process.stdout], [], [], _RUNS_WITHIN_S)
                said = process.stdout.read(1) if ready else b""
            finally:
                process.kill()
    return said == b"K"


def _existing(path: Path) -> Path:
    """Return the nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return path
