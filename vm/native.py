"""The patched kernel, built by NetBSD: in a guest, with the guest's own patch, config, make and compiler."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import time
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fabric import Connection

from . import guest, install, patches, qemu
from .build import (
    COMPILED,
    MACHINE,
    Builder,
    Counter,
    build_kernels,
    config_path,
    keep,
    kernel_folder,
    key_of,
    provenance,
    pvh,
    select,
)
from .cache import digest, file_digest, locked, read_json
from .config import Settings
from .image import SETS, build_image, image_tools
from .log import BuildFailed, Failure, GuestDied, logger, say, step
from .run import run, uninterrupted
from .source import mirror

NAME = "build"  # the guest's
ID = "pykq-in-guest"  # in the kernel's version

_SETS = (*SETS, "comp")
_MEMORY_MIB = 1024
_TOP = "/usr/src"
_OBJ = f"{_TOP}/obj"
_FREE_MIB = 400
_FREE_INODES = 10000

# An estimate needs so many objects; the first ones are assembler and small.
_FIRST = 20

# Emulated, the largest object takes minutes, and so does the link, of which make says nothing meanwhile.
_SILENT_S = 1800
_RUN_WITHIN_S = 600
# These two are waited for without a way out: for a guest to take a command, and to put its disk away.
_ANSWERS_WITHIN_S = 15
_UNMOUNT_WITHIN_S = 60

# The disk's mark that it is in use, or was when the guest died.
_OPEN = f"{_TOP}/.open"

# What was written last may be lost or cut short after a crash: 20 objects are more than a minute's work.
_MOUNT = f"""
fsck_ffs -f -y /dev/rld1d > /dev/null && mount -o noatime /dev/ld1d {_TOP} || exit 1
if [ -e {_OPEN} ]; then
    find {_OBJ} -name '*.[oa]' -print | xargs ls -t 2>/dev/null | head -n 20 | xargs rm -f {_OBJ}/netbsd
fi
touch {_OPEN}
"""
# make that is interrupted removes what it was making.
_UNMOUNT = f"""
pkill -INT -x make; n=0
while pgrep -x make > /dev/null && [ $n -lt 50 ]; do sleep 0.2; n=$((n + 1)); done
rm -f {_OPEN}; umount {_TOP} || {{ touch {_OPEN}; exit 1; }}
"""


def build_in_guest(settings: Settings, *, cpus: int = 2) -> None:
    """Build, install and boot the patched kernel in a guest that runs the stock one, and bring it here.

    It takes the place of the one that was built here.  An interrupted build
    goes on where it stopped: the sources and the objects are on a disk of their
    own in the cache.  Raises Failure where the comp set has no compiler,
    BuildFailed when the build in the guest fails, GuestDied.
    """
    builder = select(settings)
    fit = patches.fit(builder.source)
    stock = build_kernels(settings, ["stock"])["stock"]
    inputs = {name: stock[name] for name in ("source", "fingerprint", "config_sha256", "variables")}
    key = key_of(inputs, fit.patched)
    folder = kernel_folder(builder, "patched")
    before = read_json(folder / "manifest.json")
    if before.get("key") == key and before.get("in_guest"):
        say(f"patched kernel, built in a guest: up to date ({folder / 'netbsd'})")
        return
    with locked(qemu.folder_of(settings, f"{NAME}-lock")):  # for all sources: the guest has one name
        disk = _disk(builder, digest(inputs, file_digest(fit.port.path)))
        built, about = _in_guest(builder, fit, disk, stock["objects"], cpus)
        path = disk.with_name("netbsd")
        path.write_bytes(built)
        manifest = {
            "key": key,
            **provenance(builder.source, fit, "patched"),
            "config": config_path(builder).name,
            "in_guest": True,
            **about,
            "pvh": pvh(path),
            "sha256": file_digest(path),
            **inputs,
        }
        keep(folder, built, manifest)
        path.unlink()
    say(f"patched kernel, built in a guest: {folder / 'netbsd'}")


def _in_guest(
    builder: Builder, fit: patches.Fit, disk: Path, expected: int, cpus: int
) -> tuple[bytes, dict[str, Any]]:
    """Build on a disk, install and boot; return the kernel, and what its manifest says of the build."""
    kernel = kernel_folder(builder, "stock") / "netbsd"
    wanted = qemu.Machine(
        name=NAME,
        variant="stock",
        netbsd=builder.source.version,
        kernel=str(kernel),
        boot="disk",  # only then is the kernel that boots the one that is installed
        folder=str(qemu.folder_of(builder.settings, NAME)),
        disk=str(disk),
        cpus=cpus,
        memory_mib=_MEMORY_MIB,
    )
    qemu.down(builder.settings, NAME)  # of a command that was killed; it would write to the same disk
    image = partial(build_image, builder, kernel, sets=_SETS)
    machine = qemu.start(builder.settings, wanted, image, saved=False)
    began = time.monotonic()
    try:
        with guest.connect(machine) as connection:
            compiler = _compiler(connection)
            _run(connection, f"mkdir -p {_TOP}; {_MOUNT}")
            try:
                objects = _build(connection, fit, config_path(builder), expected, cpus)
                seconds = round(time.monotonic() - began, 1)
                built = guest.fetch(connection, f"{_OBJ}/netbsd")
                _run(connection, f"install -m 755 {_OBJ}/netbsd {install.NEW} && {install.SWAP}")
            finally:
                with uninterrupted(), suppress(Exception):  # the guest may be dead
                    connection.transport.channel_timeout = _ANSWERS_WITHIN_S  # an hour is paramiko's own
                    _run(connection, _UNMOUNT, within_s=_UNMOUNT_WITHIN_S)
        qemu.reboot(machine, partial(_order, machine, "reboot"))
        _check(machine)
    finally:
        with uninterrupted():
            qemu.down(builder.settings, NAME)
    return built, {"compiler": compiler, "objects": objects, "seconds": seconds}


def _disk(builder: Builder, key: str) -> Path:
    """Make the disk with the kernel's sources, or find the one on which a build has begun."""
    folder = builder.root / "in-guest"
    disk = folder / f"{key}.img"
    if disk.exists():
        say("the build in the guest goes on with what is on its disk")
        return disk
    makefs = image_tools(builder) / "nbmakefs"
    for path in folder.glob("*.img"):
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    staging, part = folder / "src", disk.with_suffix(".part")
    try:
        with step("disk with the sources"):
            for name in ("sys", "common"):
                mirror(builder.source.top / name, staging / name, set())
            command: list[str | Path] = [makefs, "-t", "ffs", "-B", "le"]
            command += ["-o", "version=2,bsize=16384,fsize=2048"]
            command += ["-b", f"{_FREE_MIB}m"]
            command += ["-f", str(_FREE_INODES)]
            run([*command, part, staging])
        part.rename(disk)
    finally:
        with uninterrupted():
            shutil.rmtree(staging, ignore_errors=True)
            part.unlink(missing_ok=True)
    return disk


def _compiler(connection: Connection) -> str:
    """Return the first line of the guest's cc --version."""
    asked = "command -v cc make config patch ld && cc --version"
    done = connection.run(asked, hide=True, warn=True, in_stream=False)
    lines: list[str] = done.stdout.splitlines()
    if done.exited or len(lines) < 6:
        raise Failure("the guest has no compiler", hint="--sets names a comp set with NetBSD's own toolchain")
    return lines[5]


def _patch(connection: Connection, fit: patches.Fit) -> None:
    """Apply the port, unless the files on the disk are as the port makes them."""
    names = shlex.join(sorted(fit.patched))
    wanted = {hashlib.sha256(text).hexdigest() for text in fit.patched.values()}

    def done() -> bool:
        return wanted <= set(_run(connection, f"cd {_TOP} && cksum -a SHA256 {names} || true").split())

    if done():
        return
    with step(f"patch(1) in the guest: {fit.port.name}"):
        # A crash may have left some files patched, or none of their content: begin with the stock ones.
        for name, text in fit.stock.items():
            guest.feed(connection, f"cat > {shlex.quote(f'{_TOP}/{name}')}", text)
        guest.feed(connection, f"cd {_TOP} && patch -s -f -p1", fit.port.path.read_bytes())
        if not done():
            raise BuildFailed(f"the guest's patch(1) makes of {fit.port.name} what this host's does not")


def _build(connection: Connection, fit: patches.Fit, config: Path, expected: int, cpus: int) -> int:
    """Apply the port, configure and make; return how many objects the kernel has."""
    _patch(connection, fit)
    conf, name = f"{_TOP}/sys/arch/{MACHINE}/conf", shlex.quote(config.name)
    guest.feed(connection, f"cat > {conf}/{name}", config.read_bytes())
    command = f"cd {conf} && config -b {_OBJ} -s {_TOP}/sys {name}"
    configured = connection.run(command, hide=True, warn=True, in_stream=False, timeout=_RUN_WITHIN_S)
    if configured.exited:
        raise BuildFailed(
            f"the guest's config(1) does not take {config.name}",
            hint="are the sets older than the source? --source, or --sets, names another",
            tail=configured.stderr[-2000:],
        )
    done = int(_run(connection, f"find {_OBJ} -name '*.o' | wc -l"))
    with step(f"kernel {config.name} in the guest, {cpus} processors") as work:
        compiled = Counter(work, COMPILED, max(0, expected - done))
        _make(connection, compiled, max(0, expected - done), cpus)
        work.note = f"{compiled.count} objects"
    return done + compiled.count


def _make(connection: Connection, compiled: Counter, expected: int, cpus: int) -> None:
    """Make the kernel; say early how long that will take."""
    recent: deque[str] = deque(maxlen=15)
    began = time.monotonic()
    # Without make depend, which reads every file once more: nothing is built yet that could be stale.
    # And without Fabric, whose run() goes on after a Ctrl-C.
    command = f"cd {_OBJ} && BUILDID={ID} make -j {cpus} netbsd 2>&1"
    try:
        _, stdout, _ = connection.client.exec_command(command, timeout=_SILENT_S)
        for line in stdout:
            recent.append(line.rstrip())
            logger.info("%s", recent[-1])
            before = compiled.count
            compiled(line)
            if before < compiled.count == _FIRST < expected:
                _estimate((time.monotonic() - began) / _FIRST * expected, expected, cpus)
        if not stdout.channel.status_event.wait(_SILENT_S):
            raise TimeoutError
    except TimeoutError:
        raise GuestDied(
            f"make in the guest has said nothing for {_SILENT_S / 60:.0f} minutes",
            hint="the same command goes on where it stopped",
            tail="\n".join(recent),
        ) from None
    status = stdout.channel.exit_status
    if status < 0:
        raise EOFError("it closed")
    if status:
        raise BuildFailed(f"make ended in the guest with status {status}", tail="\n".join(recent))


def _estimate(seconds: float, objects: int, cpus: int) -> None:
    """Say how long a build will take by its first objects."""
    host = os.cpu_count() or 1
    more = f"; this host has {host} processors: --cpus {host}" if host > cpus else ""
    say(f"by the first {_FIRST} of {objects} objects: some {seconds / 60:.0f} min{more}")


def _order(machine: qemu.Machine, command: str) -> None:
    """Start a command in the guest, and do not wait for its end."""
    with guest.connect(machine) as connection:
        connection.client.exec_command(command)


def _check(machine: qemu.Machine) -> None:
    """Raise Failure unless a guest runs the kernel that was built in it, and that has the ioctl."""
    with guest.connect(machine) as connection, guest.installed(connection) as folder:
        version = _run(connection, "uname -v").strip()
        asked = f"{guest.python(folder)} -c 'import pykq; print(pykq.load_kernel().has_tickle)'"
        has_tickle = _run(connection, asked).strip()
    say(f"booted: {version}; has KQUEUE_TICKLE: {has_tickle}")
    if ID not in version or has_tickle != "True":
        where = f"the console is in {machine.console_log}"
        raise Failure("that is not the kernel that was built", hint=where)


def _run(connection: Connection, command: str, *, within_s: int = _RUN_WITHIN_S) -> str:
    """Run a command in the guest; return its output."""
    result: Any = connection.run(command, hide=True, in_stream=False, timeout=within_s)
    return str(result.stdout)
