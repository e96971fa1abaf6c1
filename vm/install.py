"""The patched kernel on a NetBSD machine of the user's, over ssh."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from fabric import Connection

from . import guest, hosts
from .build import MACHINE, kernel_folder, select
from .cache import read_json
from .config import Settings
from .log import Failure, say, step
from .run import uninterrupted

# Where a new kernel comes first.
NEW = "/netbsd.pykq"

# The old kernel stays, under the name that boot(8) tries as well; no moment is without a /netbsd, and the
# first sync is for a power cut that would leave the new name without all of the new content.
SWAP = f"ln -f /netbsd /onetbsd && sync && mv {NEW} /netbsd && sync"

# For what takes seconds, over a connection that may have died.
_WITHIN_S = 60

# What a machine is, a line each.
_LOOK = {
    "system": "uname -s",
    "machine": "uname -m",
    "netbsd": "uname -r",
    "version": "sysctl -n kern.version | head -n 1",
    # The kernel that runs has booted; what /netbsd is now may never have, and must not become /onetbsd.
    "runs": 'grep -qF "$(sysctl -n kern.version | head -n 1)" /netbsd && echo /netbsd',
    "user": "id -u",
    "sha256": "cksum -a SHA256 /netbsd",
    "free_kib": "df -kP / | awk 'END { print $4 }'",
}


def install(settings: Settings, host: str, *, ssh_config: Path | None = None, yes: bool = False) -> None:
    """Put the patched kernel in the place of a machine's /netbsd, which is kept as /onetbsd.

    host is a name of the user's ssh_config, or user@host:port.  Without yes
    this only says what it would do.  Raises Failure when the kernel is not of
    the release and the configuration that the machine runs, when the machine
    does not run its /netbsd, and where anything else speaks against it.  The
    machine is not rebooted.
    """
    folder = kernel_folder(select(settings), "patched")
    manifest = read_json(folder / "manifest.json")
    if not manifest:
        raise Failure("there is no patched kernel", hint="invoke build-kernel")
    kernel = (folder / "netbsd").read_bytes()
    with hosts.connect(host, ssh_config=ssh_config) as connection:
        there = _look(connection)
        if manifest["sha256"] in there["sha256"]:
            say("this kernel is its /netbsd already; shutdown -r now boots it, if it has not yet")
            return
        _check(host, there, manifest, len(kernel))
        say(f"{host}: {there['version']}")
        if not yes:
            say(f"would copy {folder / 'netbsd'} to {NEW}, then: {SWAP}; with --yes it does")
            return
        with step(f"patched kernel to {host}"):
            _put(connection, kernel, manifest["sha256"])
    say("shutdown -r now boots it")
    say("to go back: boot onetbsd at the boot prompt; then, or at once: mv /onetbsd /netbsd")


def _put(connection: Connection, kernel: bytes, sha256: str) -> None:
    """Make a kernel the machine's /netbsd, or leave nothing of it there."""
    try:
        guest.feed(connection, f"cat > {NEW} && chmod 755 {NEW}", kernel)
        if sha256 not in _run(connection, f"cksum -a SHA256 {NEW}"):
            raise Failure("the kernel did not arrive whole", hint="try again")
        _run(connection, SWAP)
    except BaseException:
        with uninterrupted(), suppress(Exception):  # the connection may be what failed
            connection.run(f"rm -f {NEW}", hide=True, warn=True, in_stream=False, timeout=_WITHIN_S)
        raise


def _look(connection: Connection) -> dict[str, str]:
    """Ask a machine what it is."""
    asked = "; ".join(f"echo {name}=$({command})" for name, command in _LOOK.items())
    return dict(line.split("=", 1) for line in _run(connection, asked).splitlines() if "=" in line)


def _check(host: str, there: dict[str, str], manifest: dict[str, Any], size_bytes: int) -> None:
    """Raise Failure where the machine must not get this kernel."""
    if (there["system"], there["machine"]) != ("NetBSD", MACHINE):
        raise Failure(f"{host} is {there['system']} {there['machine']}", hint=f"it takes NetBSD {MACHINE}")
    if there["netbsd"] != manifest["netbsd"]:
        raise Failure(
            f"{host} runs NetBSD {there['netbsd']}, the kernel is of {manifest['netbsd']}",
            hint="build and install with the --release, or the --source, that the machine runs",
        )
    config = re.search(r"\((.+?)(?:\.pykq-[\w-]+)?\)", there["version"])
    if config is None or config[1] != manifest["config"]:
        raise Failure(
            f"{host} runs {there['version']}, the kernel has the configuration {manifest['config']}",
            hint="build and install with the --config that the machine runs, such as GENERIC",
        )
    if there["user"] != "0":
        raise Failure(f"on {host} you are not root", hint=f"--host root@{host.rpartition('@')[2]}")
    if not there["runs"]:
        raise Failure(
            f"{host} does not run what is its /netbsd, and the kernel that does run could get lost",
            hint="reboot into /netbsd, or take the old one back first: mv /onetbsd /netbsd",
        )
    free = there["free_kib"]  # nothing, where df knows nothing
    if not free.isdecimal() or int(free) * 1024 < 2 * size_bytes:
        raise Failure(f"{host} has {free or 'unknown'} KiB free on /", hint="make room for two kernels")


def _run(connection: Connection, command: str) -> str:
    """Run a command of /bin/sh; return its output."""
    command_line = f"sh -c {shlex.quote(command)}"
    done = connection.run(command_line, hide=True, warn=True, in_stream=False, timeout=_WITHIN_S)
    if done.exited:
        what = f"on {connection.original_host}, {command!r} ended with status {done.exited}"
        raise Failure(what, tail=done.stderr[-2000:])
    output: str = done.stdout
    return output
