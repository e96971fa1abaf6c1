"""The way in: `invoke --list` shows what there is, `invoke COMMAND --help` how."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from invoke import Collection, Context, Exit, task

from vm import bench as bench_
from vm import build, config, console, guest, log, qemu, rump, suite
from vm import run as run_
from vm.doctor import examine

BUILD = {
    "source": "a NetBSD source tree (else PYKQ_SOURCE or the configuration file)",
    "toolchain": "clang, the host's LLVM (default), or gcc, NetBSD's own",
}
TREE = BUILD | {
    "config": "kernel configuration: one of pykq's, the tree's, or a file (default PYKQ)",
}
GUEST = TREE | {
    "sets": "a folder with base and etc (.tgz or .tar.xz), or a DESTDIR with its METALOG",
    "python": "Python for the guest: a tarball rooted at usr/pkg, or a folder of pkgsrc packages",
}
NAMED = {"name": "the guest's name (default pykq)"}


def command(body: Callable[..., None]) -> Callable[..., None]:
    """Turn the failures of vm/ into one line and an exit status."""

    @functools.wraps(body)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            body(*arguments, **options)
        except log.Failure as failure:
            log.report(failure)
            raise Exit(code=failure.status) from None
        except KeyboardInterrupt:
            log.report(log.Failure("interrupted", hint="the same command goes on where it stopped"))
            raise Exit(code=130) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            hint = run_.FULL_DISK if error.errno == errno.ENOSPC else ""
            log.report(log.Failure(f"{where}{error.strerror or error}", hint=hint))
            raise Exit(code=1) from None

    return run


@task(help=TREE | {"dry_run": "print the commands, run none"})
@command
def build_kernel(
    c: Context, source: str = "", toolchain: str = "", config: str = "", dry_run: bool = False
) -> None:
    """Build a stock and a patched NetBSD kernel from a source tree."""
    settings = _settings(source=source, toolchain=toolchain, kernel_config=config)
    if dry_run:
        build.show(settings)
    else:
        build.build_kernels(settings)


@task(help=BUILD | {"sanitize": "with AddressSanitizer and UndefinedBehaviorSanitizer"})
@command
def build_rump(c: Context, source: str = "", toolchain: str = "", sanitize: bool = False) -> None:
    """Build the same kernel code, stock and patched, as libraries for this host."""
    rump.build_rump(_settings(source=source, toolchain=toolchain), sanitize=sanitize)


@task(
    help=GUEST
    | {
        "guest": "a missing guest is an error",
        "host": "host tests only, no kernels",
        "sanitize": "take the rump kernels with AddressSanitizer and UndefinedBehaviorSanitizer",
        "select": "run the tests whose names match, as pytest -k",
    }
)
@command
def test(
    c: Context,
    source: str = "",
    sets: str = "",
    python: str = "",
    toolchain: str = "",
    config: str = "",
    guest: bool = False,
    host: bool = False,
    sanitize: bool = False,
    select: str = "",
) -> None:
    """Run the tests on the host, on the rump kernels and in the guests."""
    settings = _settings(
        source=source, sets=sets, python=python, toolchain=toolchain, kernel_config=config
    )
    suite.run(settings, kernels=not host, insist=guest, selection=select, sanitize=sanitize)


@task(help={"install": "install what is missing (apt-get, sudo when not root)", "json": "print it as JSON"})
@command
def doctor(c: Context, install: bool = False, json: bool = False) -> None:
    """Say what is here, what is missing, and the one command that installs it."""
    if not examine(_settings(), install=install, as_json=json) and not install:
        raise Exit(code=1)


@task(help=BUILD | NAMED)
@command
def demo(c: Context, source: str = "", toolchain: str = "", name: str = "pykq") -> None:
    """Interrupt a real kevent while you watch: in the guest when it is up, else on a rump kernel."""
    settings = _settings(source=source, toolchain=toolchain)
    machine = qemu.find(settings, name)
    if machine is not None:
        guest.run_module(machine, "pykq.demo")
    else:
        rump.run_module(settings, "pykq.demo")


@task(
    help=BUILD
    | NAMED
    | {
        "loop": "also time an edit of kern_event.c to the verdict of the rules on both rump kernels",
        "json": "print it as JSON",
    }
)
@command
def bench(
    c: Context,
    source: str = "",
    toolchain: str = "",
    name: str = "pykq",
    loop: bool = False,
    json: bool = False,
) -> None:
    """Measure a tickle beside its rivals, in the guest when it is up and on the rump kernel."""
    bench_.run(_settings(source=source, toolchain=toolchain), name=name, loop=loop, as_json=json)


@task(
    help=GUEST
    | NAMED
    | {
        "kernel": "stock or patched (default)",
        "cpus": "number of virtual processors (default 2)",
        "memory": "MiB of memory (default 512)",
        "port": "TCP port on 127.0.0.1 that leads to the guest's ssh (default: a free one)",
        "dry_run": "print the QEMU command, do not start it",
    }
)
@command
def up(
    c: Context,
    kernel: str = "patched",
    name: str = "pykq",
    source: str = "",
    sets: str = "",
    python: str = "",
    toolchain: str = "",
    config: str = "",
    cpus: int = 2,
    memory: int = 512,
    port: int = 0,
    dry_run: bool = False,
) -> None:
    """Start the guest and return when its ssh answers."""
    settings = _settings(
        source=source, sets=sets, python=python, toolchain=toolchain, kernel_config=config
    )
    qemu.up(
        settings, variant=kernel, name=name, cpus=cpus, memory_mib=memory, ssh_port=port, dry_run=dry_run
    )


@task(help=NAMED | {"command": "run this instead of a login shell"})
@command
def ssh(c: Context, command: str = "", name: str = "pykq") -> None:
    """Log in to the guest as root."""
    machine = qemu.must_find(_settings(), name)
    line = guest.ssh_command(machine, *([command] if command else []))
    sys.stdout.flush()
    os.execvp(line[0], line)


@task(name="console", help=NAMED)
@command
def console_(c: Context, name: str = "pykq") -> None:
    """Talk to the guest's serial console; Ctrl-] leaves it."""
    console.attach(qemu.must_find(_settings(), name))


@task(help=NAMED | {"json": "print it as JSON"})
@command
def status(c: Context, name: str = "pykq", json: bool = False) -> None:
    """Say whether the guest runs, on which kernel, and where its ssh is."""
    if not qemu.status(_settings(), name, as_json=json):
        raise Exit(code=1)


@task(help=NAMED)
@command
def down(c: Context, name: str = "pykq") -> None:
    """End the guest; its disk goes back to the image."""
    ended = qemu.down(_settings(), name)
    log.say(f"guest {name} is down" if ended else f"there is no guest {name}")


def _settings(**chosen: str) -> config.Settings:
    """Merge the options of a command with the environment and the configuration file."""
    return config.load(**chosen)


namespace = Collection(build_kernel, build_rump, test, demo, bench, doctor)
namespace.add_collection(Collection("vm", up, ssh, console_, status, down))
