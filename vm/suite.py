"""All the tests there are: on this host, on the rump kernels, in the guests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from rich.table import Table

from . import guest, qemu
from .build import VARIANTS, build_kernels
from .config import Settings
from .log import Failure, TestsFailed, console, say, step
from .rump import build_rump, rump_folder, sanitizer_environment
from .run import need

# A test that waits for ever is a finding: this ends it, with a traceback.
_RUMP_WITHIN_S = 600

# What came of a group of tests: the seconds it took, or what went wrong.
Outcome: TypeAlias = float | Failure

_NO_TESTS = 5  # pytest's exit status when a selection leaves nothing


def run(
    settings: Settings, *, kernels: bool, insist: bool, selection: str = "", sanitize: bool = False
) -> None:
    """Run the host tests, then the rules on every kernel there is, and say at the end what ran.

    With sanitize the rump kernels are those with AddressSanitizer and
    UndefinedBehaviorSanitizer.

    With insist, a guest that cannot be had is a Failure; else it is left out
    with a line that says how to get it.  Raises TestsFailed when any failed.
    """
    missing = _missing_guest(settings)
    if kernels and insist and missing:
        raise Failure("there is no guest to test in", hint=missing)
    outcomes = {"host": _attempt(_host, selection)}
    left_out = {}
    if not kernels:
        left_out["kernels"] = "--host"
    elif settings.source is None:
        left_out["kernels"] = missing
    else:
        build_rump(settings, sanitize=sanitize)
        outcomes |= test_rumps(settings, selection, sanitize=sanitize)
        if missing:
            left_out["guests"] = missing
        else:
            build_kernels(settings)
            for variant in VARIANTS:
                outcomes[f"guest, {variant}"] = _attempt(_guest, settings, variant, selection)
    table = Table("tests", "result", box=None)
    for name, outcome in outcomes.items():
        failed = isinstance(outcome, Failure)
        table.add_row(name, f"failed: {outcome}" if failed else f"passed, {outcome:.1f} s")
    for name, reason in left_out.items():
        table.add_row(name, f"left out: {reason}")
    console.print(table)
    raise_failures(outcomes)


def test_rumps(
    settings: Settings, selection: str = "", tests: str = "tests/rules", *, sanitize: bool = False
) -> dict[str, Outcome]:
    """Run tests on both rump kernels at the same time; return what came of each."""
    with ThreadPoolExecutor(len(VARIANTS)) as pool:
        futures = {
            f"rump kernel, {variant}": pool.submit(
                _attempt, _rump, settings, variant, selection, tests, sanitize
            )
            for variant in VARIANTS
        }
        return {name: future.result() for name, future in futures.items()}


def raise_failures(outcomes: Mapping[str, Outcome]) -> None:
    """Raise the first Failure among outcomes, if there is one."""
    for outcome in outcomes.values():
        if isinstance(outcome, Failure):
            raise outcome


def _attempt(body: Callable[..., None], *arguments: object) -> Outcome:
    """Run something; return the seconds it took, or its Failure."""
    began = time.monotonic()
    try:
        body(*arguments)
    except Failure as failure:
        return failure
    return time.monotonic() - began


def _missing_guest(settings: Settings) -> str:
    """Return what a guest lacks and how to get it, '' when it has everything."""
    for name in ("source", "sets", "python"):
        if getattr(settings, name) is None:
            return f"name --{name}, PYKQ_{name.upper()} or {name} in the configuration file"
    try:
        need(qemu.QEMU)
    except Failure as failure:
        return f"{failure}: {failure.hint}"
    return ""


def _host(selection: str) -> None:
    """Run tests/host with this Python."""
    _pytest("host", ["tests/host"], selection, {})


def _rump(settings: Settings, variant: str, selection: str, tests: str, sanitize: bool) -> None:
    """Run tests on a rump kernel, in a child process: a crash takes that down, and not this one.

    The output is shown at the end, in one piece: both variants are tested at
    the same time.  Raises TestsFailed.
    """
    folder = rump_folder(settings, variant, sanitize=sanitize)
    environment = {"PYKQ_KERNEL": str(folder), "PYKQ_EXPECT": variant}
    if sanitize:
        environment |= sanitizer_environment()
    _pytest(f"{variant} rump kernel", [tests], selection, environment, _RUMP_WITHIN_S)


def _guest(settings: Settings, variant: str, selection: str) -> None:
    """Run the guest tests on one kernel, in a guest of their own that is ended afterwards."""
    name = f"test-{variant}"
    machine = qemu.up(settings, variant=variant, name=name)
    try:
        with step(f"tests in the {variant} guest"):
            guest.run_tests(machine, settings.cache / "run" / name / "junit.xml", selection)
    finally:
        qemu.down(settings, name)


def _pytest(
    where: str,
    folders: list[str],
    selection: str,
    environment: Mapping[str, str],
    within_s: float | None = None,
) -> None:
    """Run pytest in a process of its own; raise TestsFailed when a test fails or the process dies."""
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", *folders]
    command += ["-k", selection] if selection else []
    try:
        done = subprocess.run(
            command,
            cwd=guest.ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=within_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        shown = error.output.decode(errors="replace") if isinstance(error.output, bytes) else ""
        what = f"tests on the {where} did not end within {within_s:.0f} s"
        raise TestsFailed(what, tail=shown) from error
    say(f"tests on the {where}:\n{done.stdout.rstrip()}")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise TestsFailed(f"tests on the {where} died of {name}", hint="the traceback is above")
    if done.returncode and not (selection and done.returncode == _NO_TESTS):
        raise TestsFailed(f"tests on the {where} failed (pytest status {done.returncode})")
