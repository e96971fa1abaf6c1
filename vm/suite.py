"""All the tests there are: on this host, and in the guests."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable

from rich.table import Table

from . import guest, qemu
from .build import VARIANTS, build_kernels
from .config import Settings
from .log import Failure, TestsFailed, console, say, step


def run(settings: Settings, *, kernels: bool, insist: bool, selection: str = "") -> None:
    """Run the host tests, then the rules on every kernel there is, and say at the end what ran.

    With insist, a guest that cannot be had is a Failure; else it is left out
    with a line that says how to get it.  Raises TestsFailed when any failed.
    """
    results: dict[str, str] = {}
    failures: list[Failure] = []

    def record(name: str, body: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            body()
        except TestsFailed as failure:
            failures.append(failure)
            results[name] = f"failed, {time.monotonic() - began:.1f} s"
        else:
            results[name] = f"passed, {time.monotonic() - began:.1f} s"

    if not insist:
        record("host", functools.partial(_host, selection))
    if kernels:
        missing = _missing(settings)
        if missing and insist:
            raise Failure("there is no guest to test in", hint=missing)
        if missing:
            results["guests"] = f"left out: {missing}"
        else:
            build_kernels(settings)
            for variant in VARIANTS:
                body = functools.partial(_guest, settings, variant, selection)
                record(f"guest, {variant} kernel", body)
    table = Table("tests", "result", box=None)
    for name, result in results.items():
        table.add_row(name, result)
    console.print(table)
    if failures:
        raise failures[0]


def _missing(settings: Settings) -> str:
    """Return what a guest lacks and how to get it, '' when it has everything."""
    for value, option in ((settings.source, "source"), (settings.sets, "sets"), (settings.python, "python")):
        if value is None:
            return f"name --{option}, PYKQ_{option.upper()} or {option} in the configuration file"
    return ""


def _host(selection: str) -> None:
    """Run tests/host with this Python."""
    chosen = ["-k", selection] if selection else []
    command = [sys.executable, "-m", "pytest", "-q", "tests/host", *chosen]
    done = subprocess.run(command, cwd=guest.ROOT, check=False)
    if done.returncode != 0:
        raise TestsFailed(f"tests failed on the host (pytest status {done.returncode})")


def _guest(settings: Settings, variant: str, selection: str) -> None:
    """Run the guest tests on one kernel, in a guest of their own that is ended afterwards."""
    name = f"test-{variant}"
    machine = qemu.up(settings, variant=variant, name=name)
    try:
        with step(f"tests in the {variant} guest"):
            guest.run_tests(machine, settings.cache / "run" / name / "junit.xml", selection)
    finally:
        if qemu.down(settings, name):
            say(f"guest {name} is down")
