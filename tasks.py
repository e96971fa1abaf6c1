"""The way in: `invoke --list` shows what there is, `invoke COMMAND --help` how."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from math import inf
from pathlib import Path
from typing import Any

from invoke import Collection, Context, Exit, task

from pykq import demo as demo_
from vm import bench as bench_
from vm import build, console, guest, log, native, qemu, rump, suite, upstream
from vm import install as install_
from vm import page as page_
from vm import patches as patches_
from vm import regress as regress_
from vm import run as run_
from vm import stress as stress_
from vm.clean import clean as clean_
from vm.config import Settings, load
from vm.doctor import examine
from vm.release import resolve, show

BUILD = {
    "release": "a NetBSD release, such as 10.1, or current (default: the newest, unless a source is named)",
    "mirror": "an URL or a folder laid out like cdn.NetBSD.org/pub, to take the release from",
    "source": "a NetBSD source tree in place of the release's",
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

_SETTING = {"config": "kernel_config"}  # options that are called otherwise among the settings


_NAMED_ONLY = inspect.Parameter.KEYWORD_ONLY


def command(
    *, help: dict[str, str], chosen: dict[str, str] | None = None, **options: Any
) -> Callable[[Callable[..., None]], Any]:
    """Make a task of which a failure in vm/ is one line and an exit status, with a log file, and with -q.

    A body with a parameter named settings is given these, merged from the
    environment, the configuration file and the options chosen (BUILD, TREE or
    GUEST), which the task has before those of its body.  What is no number for
    an option that takes one is such a failure, too, and not a traceback of Invoke's.
    """
    chosen = chosen or {}

    def decorate(body: Callable[..., None]) -> Any:
        parameters = dict(inspect.signature(body).parameters)
        wants_settings = parameters.pop("settings", None) is not None
        more = {"quiet": "say nothing but errors", "timings": "say where the seconds went"}
        quiet, timings = (inspect.Parameter(name, _NAMED_ONLY, default=False) for name in more)
        kinds = {name: type(one.default) for name, one in parameters.items()}
        numbers = {name: kind for name, kind in kinds.items() if kind in (int, float)}

        @functools.wraps(body)
        def run(*arguments: Any, quiet: bool, timings: bool, **options: Any) -> None:
            log.console.quiet = quiet
            log.console.stderr = options.get("json", False)
            words = {_SETTING.get(name, name): options.pop(name) for name in chosen}

            def work() -> None:
                settings = {"settings": load(**words)} if wants_settings else {}
                given = {name: _number(name, options.pop(name), kind) for name, kind in numbers.items()}
                body(*arguments, **settings, **options, **given)

            _run(work, body.__name__.strip("_").replace("_", "-"), timings)

        context, *own = (
            one.replace(kind=_NAMED_ONLY, default=str(one.default) if one.name in numbers else one.default)
            for one in parameters.values()
        )
        of_settings = [inspect.Parameter(name, _NAMED_ONLY, default="") for name in chosen]
        run.__signature__ = inspect.Signature([context, quiet, *of_settings, *own, timings])  # -q is quiet
        return task(run, help=help | chosen | more, **options)

    return decorate


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    """Return the number that an option is given, from 0 up; raise Failure for anything else."""
    with suppress(ValueError):
        if 0 <= (number := kind(text)) < inf:
            return number
    raise log.Failure(f"--{name} {text}: not a number", hint="such as 1")


def _run(body: Callable[[], None], name: str, timings: bool) -> None:
    """Run a command; end with its exit status."""
    for number in run_.INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    path = None
    with ExitStack() as stack:
        try:
            path = load().cache / "log" / f"{name}.log"
            stack.enter_context(log.kept(path))
            if timings:
                stack.enter_context(log.timings(load().cache / "timings" / f"{name}.json"))
            body()
        except log.Failure as failure:
            log.report(failure, path if failure.status > 1 else None)
            raise Exit(code=failure.status) from None
        except KeyboardInterrupt:
            for number in run_.INTERRUPTS:
                signal.signal(number, signal.SIG_IGN)
            log.report(log.Failure("interrupted", hint="the same command goes on where it stopped"))
            raise Exit(code=130) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            hint = run_.FULL_DISK if error.errno == errno.ENOSPC else ""
            log.report(log.Failure(f"{where}{error.strerror or error}", hint=hint), path)
            raise Exit(code=1) from None
        except Exit:
            raise
        except Exception:
            log.logger.exception("not foreseen")
            raise


@command(
    chosen=GUEST,
    help={
        "in_guest": "build the patched one in a guest, with NetBSD's own compiler, install and boot it there",
        "cpus": "with --in-guest, number of virtual processors (default 2)",
        "dry_run": "print the commands, run none",
    },
)
def build_kernel(
    c: Context, settings: Settings, in_guest: bool = False, cpus: int = 2, dry_run: bool = False
) -> None:
    """Build a stock and a patched NetBSD kernel, from a release or a source tree."""
    if in_guest:
        if dry_run:
            raise log.Failure("--in-guest has no --dry-run", hint="vm/native.py has the few commands")
        native.build_in_guest(resolve(settings), cpus=cpus)
    elif not dry_run:
        build.build_kernels(resolve(settings, "source"))
    elif not show(settings):
        build.show(resolve(settings, "source"))


@command(
    chosen=TREE,
    help={
        "host": "a name of your ssh_config, or user@host:port",
        "ssh_config": "in place of your own ssh_config",
        "yes": "do it; else only what would be done is said",
    },
    auto_shortflags=False,
)
def install(
    c: Context, settings: Settings, host: str = "", ssh_config: str = "", yes: bool = False
) -> None:
    """Put the patched kernel on a NetBSD machine over ssh; the old one stays as /onetbsd."""
    if not host:
        raise log.Failure("no machine to install on", hint="--host names one of your ssh_config")
    install_.install(resolve(settings, "source"), host, ssh_config=_path(ssh_config), yes=yes)


@command(chosen=BUILD, help={"sanitize": "with AddressSanitizer and UndefinedBehaviorSanitizer"})
def build_rump(c: Context, settings: Settings, sanitize: bool = False) -> None:
    """Build the same kernel code, stock and patched, as libraries for this host."""
    rump.build_rump(resolve(settings, "source"), sanitize=sanitize)


@command(
    help=GUEST
    | {
        "guest": "the tests in guests only; a missing guest is an error",
        "host": "host tests only, no kernels",
        "hosts": "run the guest tests on these NetBSD machines instead: names or user@host:port, with commas",
        "ssh_config": "an ssh_config(5) for --hosts (default ~/.ssh/config)",
        "quick": "only the rules T1 to T10 on the ioctl itself, without those that race thousands of times",
        "sanitize": "take the rump kernels with AddressSanitizer and UndefinedBehaviorSanitizer",
        "select": "run the tests whose names match, as pytest -k",
        "release": GUEST["release"] + "; more than one makes a matrix",
        "source": GUEST["source"] + "; more than one makes a matrix",
    },
    iterable=["release", "source"],
)
def test(
    c: Context,
    release: list[str],
    source: list[str],
    mirror: str = "",
    sets: str = "",
    python: str = "",
    toolchain: str = "",
    config: str = "",
    guest: bool = False,
    ssh_config: str = "",
    host: bool = False,
    hosts: str = "",
    quick: bool = False,
    sanitize: bool = False,
    select: str = "",
) -> None:
    """Run the tests on the host, on the rump kernels and in the guests."""
    each = {"mirror": mirror, "sets": sets, "python": python, "toolchain": toolchain, "kernel_config": config}
    pairs = [(one, tree) for one in release or [""] for tree in source or [""]]
    matrix = [load(**each, release=one, source=tree) for one, tree in pairs]
    if hosts:
        names, file = hosts.split(","), _path(ssh_config)
        suite.run_on_hosts(names, matrix[0], ssh_config=file, selection=select, quick=quick)
        return
    where = "host" if host else "guest" if guest else ""
    suite.run(matrix, where=where, selection=select, quick=quick, sanitize=sanitize)


@command(help={"install": "install what is missing, with sudo when not root", "json": "print it as JSON"})
def doctor(c: Context, settings: Settings, install: bool = False, json: bool = False) -> None:
    """Say what is here, what is missing, and the one command that installs it."""
    if not examine(settings, install=install, as_json=json) and not install:
        raise Exit(code=1)


@command(
    chosen=BUILD,
    help={
        "format": "upstream: write the patch as NetBSD would commit it, and a letter to tech-kern, as mails",
        "output": "the folder to write them to (default kqueue-tickle)",
    },
)
def patches(c: Context, settings: Settings, format: str = "", output: str = "kqueue-tickle") -> None:
    """Say which port of the patch fits a source, and why the others do not."""
    if not format:
        patches_.show(build.select(resolve(settings, "source")).source)
    elif format == "upstream":
        upstream.write(Path(output))
    else:
        raise log.Failure(f"there is no format {format!r}", hint="upstream")


@command(
    chosen=GUEST, help={"all": "everything in the cache", "dry_run": "say what would go, remove nothing"}
)
def clean(c: Context, settings: Settings, all: bool = False, dry_run: bool = False) -> None:
    """Remove from the cache what the settings do not use, and say what that frees."""
    clean_(settings, everything=all, dry_run=dry_run)


@command(chosen=BUILD, help=NAMED | {"here": "on this host's own kqueue, with the mechanism that it has"})
def demo(c: Context, settings: Settings, name: str = "pykq", here: bool = False) -> None:
    """Interrupt a real kevent while you watch: in the guest when it is up, else on a rump kernel."""
    if here:
        raise Exit(code=demo_.main(["--kernel", "system"]))
    machine = qemu.find(settings, name)
    if machine is not None:
        guest.run_module(machine, "pykq.demo")
    else:
        rump.run_module(resolve(settings, "source"), "pykq.demo")


@command(
    chosen=BUILD,
    help=NAMED
    | {
        "loop": "also time an edit of kern_event.c to the verdict of the rules on both rump kernels",
        "host": "instead, time boots, an edit to the first test in a guest, and a build of nothing",
        "full": "both kernels, in guests of their own with 1, 2 and 4 CPUs, and as rump kernels; with --host,"
        " a build from nothing, too",
        "json": "print it as JSON",
    },
)
def bench(
    c: Context,
    settings: Settings,
    name: str = "pykq",
    loop: bool = False,
    host: bool = False,
    full: bool = False,
    json: bool = False,
) -> None:
    """Measure a tickle beside its rivals, in the guest when it is up and on the rump kernel."""
    if host:
        bench_.run_host(resolve(settings), full=full, as_json=json)
    else:
        bench_.run(settings, name=name, loop=loop, full=full, as_json=json)


@command(
    chosen={name: text for name, text in GUEST.items() if name != "config"},
    help={
        "rounds": "tickles to be accounted for on the rump kernel (default 6 million), a tenth in"
        " each guest, a thirtieth with LOCKDEBUG",
        "minutes": "how long each fuzzer runs (default 5)",
        "resume": "what passed in the last run is not tried again",
    },
)
def stress(
    c: Context, settings: Settings, rounds: int = 6_000_000, minutes: float = 5.0, resume: bool = False
) -> None:
    """Race and fuzz on every kernel, one with LOCKDEBUG too; test the rules with 1, 2 and 4 CPUs."""
    stress_.run(settings, rounds=rounds, minutes=minutes, resume=resume)


@command(chosen=GUEST, help={"libkqueue": "a folder with libkqueue's source, for its tests"})
def regress(c: Context, settings: Settings, libkqueue: str = "") -> None:
    """Run NetBSD's, CPython's and libkqueue's tests of kqueue on both kernels, and compare."""
    regress_.run(settings, Path(libkqueue).absolute() if libkqueue else None)


@command(help={})
def page(c: Context, settings: Settings) -> None:
    """Write tests/RESULTS.md and its plots from what bench --full, stress and regress measured last."""
    page_.write(settings)


@command(
    chosen=GUEST,
    help=NAMED
    | {
        "kernel": "stock or patched (default)",
        "cpus": "number of virtual processors (default 2)",
        "memory": "MiB of memory (default 512)",
        "port": "TCP port on 127.0.0.1 that leads to the guest's ssh (default: a free one)",
        "dry_run": "print the QEMU command, do not start it",
    },
)
def up(
    c: Context,
    settings: Settings,
    kernel: str = "patched",
    name: str = "pykq",
    cpus: int = 2,
    memory: int = 512,
    port: int = 0,
    dry_run: bool = False,
) -> None:
    """Start the guest and return when its ssh answers."""
    if dry_run and show(settings):
        return
    qemu.up(
        resolve(settings),
        variant=kernel,
        name=name,
        cpus=cpus,
        memory_mib=memory,
        ssh_port=port,
        dry_run=dry_run,
    )


@command(help=NAMED | {"command": "run this instead of a login shell"})
def ssh(c: Context, settings: Settings, command: str = "", name: str = "pykq") -> None:
    """Log in to the guest as root."""
    machine = qemu.must_find(settings, name)
    line = guest.ssh_command(machine, *([command] if command else []))
    run_.need(line[0])
    sys.stdout.flush()
    os.execvp(line[0], line)


@command(name="console", help=NAMED)
def console_(c: Context, settings: Settings, name: str = "pykq") -> None:
    """Talk to the guest's serial console; Ctrl-] leaves it."""
    console.attach(qemu.must_find(settings, name))


@command(help=NAMED | {"json": "print it as JSON"})
def status(c: Context, settings: Settings, name: str = "pykq", json: bool = False) -> None:
    """Say whether the guest runs, on which kernel, and where its ssh is."""
    if not qemu.status(settings, name, as_json=json):
        raise Exit(code=1)


@command(help=NAMED)
def down(c: Context, settings: Settings, name: str = "pykq") -> None:
    """End the guest; its disk goes back to the image."""
    ended = qemu.down(settings, name)
    log.say(f"guest {name} is down" if ended else f"there is no guest {name}")


def _path(name: str) -> Path | None:
    """Return the path of an option that names a file, None where it is not given."""
    return Path(name).expanduser() if name else None


namespace = Collection(
    build_kernel, build_rump, install, test, demo, bench, stress, regress, page, patches, clean, doctor
)
namespace.add_collection(Collection("vm", up, ssh, console_, status, down))
