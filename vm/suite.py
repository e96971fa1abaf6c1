"""All the tests there are: on this host, on the rump kernels, in the guests."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from rich.table import Table

import pykq

from . import guest, hosts, qemu
from .build import VARIANTS, build_kernels
from .cache import locked
from .config import RELEASE_PARTS, Settings
from .log import Failure, TestsFailed, printable, say, show, step
from .mirror import Missing, Unreachable
from .programs import build_for_guest, build_for_rump
from .release import resolve
from .rump import build_rump, rump_folder, sanitizer_environment
from .run import need, side_by_side, watch

# A test that waits for ever is a finding: this ends it, with a traceback.
_TEST_WITHIN_S = 600

# Of a failing run; the log has all of it.
_SHOWN_LINES = 60

# What came of a group of tests: the seconds it took, or what went wrong.
Outcome: TypeAlias = float | Failure

# All that --quick looks into.
_RULES = ("tests/rules/test_rules.py", "tests/rules/test_programs.py")

_NO_TESTS = 5  # pytest's exit status when a selection leaves nothing


@dataclass
class Results:
    """What came of the tests, and what was left out and why."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, other: Results, of: str) -> None:
        """Take over results, under names that begin with of."""
        self.outcomes |= {of + name: outcome for name, outcome in other.outcomes.items()}
        self.left_out |= {of + name: reason for name, reason in other.left_out.items()}

    def conclude(self) -> None:
        """Show all of it in a table; raise the first Failure, if there is one."""
        table = Table("tests", "result", box=None)
        for name, outcome in self.outcomes.items():
            failed = isinstance(outcome, Failure)
            table.add_row(name, f"failed: {outcome}" if failed else f"passed, {outcome:.1f} s")
        for name, reason in self.left_out.items():
            table.add_row(name, f"left out: {reason}")
        show(table)
        raise_failures(self.outcomes)


def run(
    matrix: Sequence[Settings],
    *,
    where: str = "",
    selection: str = "",
    quick: bool = False,
    sanitize: bool = False,
) -> None:
    """Run the tests, on the kernels of each of the settings, and say at the end what ran.

    where is 'host', 'guest', or '' for all there is: the host tests, the rules
    on the host's own kqueue, on the rump kernels and in the guests.  With quick
    only the rules, and no races; with sanitize the rump kernels are those with
    AddressSanitizer and UndefinedBehaviorSanitizer.

    With where='guest', a guest that cannot be had is a Failure; else it is left
    out with a line that says how to get it.  Raises TestsFailed when any failed.
    """
    chosen = _words(selection, quick)
    results = Results()
    kernels = matrix if where != "host" else ()
    for settings in kernels:
        missing = _missing_guest(settings)
        if where == "guest" and missing:
            raise Failure("there is no guest to test in", hint=missing)
    if where != "guest":
        if quick:
            results.left_out["host"] = "--quick"
        else:
            results.outcomes["host"] = _attempt(_host, chosen)
        _test_own_kqueue(results, chosen)
    if where == "host":
        results.left_out["kernels"] = "--host"
    for settings in kernels:
        of = f"{settings.release or settings.source}: " if len(kernels) > 1 else ""
        try:
            results.add(_test_kernels(settings, chosen, where == "guest", sanitize), of)
        except Failure as failure:  # of one release; the others have their turn
            results.outcomes[f"{of}kernels"] = failure
    results.conclude()


def _test_kernels(settings: Settings, chosen: Sequence[str], guests_only: bool, sanitize: bool) -> Results:
    """Run the tests on the rump kernels and in the guests of one source or release."""
    results = Results()
    settings, missing = _resolve(settings, _missing_guest(settings), guests_only)
    if settings.source is None:
        results.left_out["kernels"] = missing
        return results
    if not guests_only:
        build_rump(settings, sanitize=sanitize)
        results.outcomes |= test_rumps(settings, chosen, sanitize=sanitize)
    if missing:
        results.left_out["guests"] = missing
    else:
        results.add(_test_guests(settings, chosen), "")
    return results


def run_on_hosts(
    names: Sequence[str],
    settings: Settings,
    *,
    ssh_config: Path | None = None,
    selection: str = "",
    quick: bool = False,
) -> None:
    """Run the guest tests on the user's own NetBSD machines; raises TestsFailed when any failed."""
    reports, chosen = settings.cache / "hosts", _words(selection, quick)
    with step(f"tests on {', '.join(names)}") as work:
        done = hosts.test(names, reports, chosen, ssh_config=ssh_config)
    results = Results()
    for name, result in done.items():
        outcome = _attempt(_judge, name, result, chosen)
        results.outcomes[name] = outcome if isinstance(outcome, Failure) else work.seconds
    results.conclude()


def _words(selection: str, quick: bool) -> tuple[str, ...]:
    """Return the words for pytest that choose among the tests."""
    chosen = ("-k", selection) if selection else ()
    return (*chosen, "-m", "not stress", *_RULES) if quick else chosen


def test_rumps(
    settings: Settings, chosen: Sequence[str] = (), tests: str = "tests/rules", *, sanitize: bool = False
) -> dict[str, Outcome]:
    """Run tests on both rump kernels at the same time; return what came of each."""
    calls = [partial(_attempt, _rump, settings, variant, chosen, tests, sanitize) for variant in VARIANTS]
    with step("tests on the rump kernels"):
        outcomes = side_by_side(calls)
    return {f"rump kernel, {variant}": outcome for variant, outcome in zip(VARIANTS, outcomes, strict=True)}


def _test_guests(settings: Settings, chosen: Sequence[str]) -> Results:
    """Run the rules in a stock and a patched guest at the same time, then the tests of guests themselves."""
    results = Results()
    build_kernels(settings)
    try:
        programs = build_for_guest(settings)
    except Failure as failure:
        programs, results.left_out["C programs in guests"] = None, f"{failure}: {failure.hint}"
    calls = [partial(_attempt, _guest, settings, variant, chosen, programs) for variant in VARIANTS]
    with locked(settings.cache / "suite"), step("tests in the guests"):
        outcomes = side_by_side(calls)
    for variant, outcome in zip(VARIANTS, outcomes, strict=True):
        results.outcomes[f"guest, {variant}"] = outcome
    if not chosen:
        guests = _attempt(_pytest, "guests from outside", ["tests/vm"], (), settings.environment())
        results.outcomes["guests from outside"] = guests
    return results


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


def _resolve(settings: Settings, missing: str, insist: bool) -> tuple[Settings, str]:
    """Take what a release brings for the rump kernels, then for the guests; return what these still lack.

    With insist, a mirror that does not answer or has not the files is a Failure.
    """
    try:
        settings = resolve(settings, "source")
        if not missing:
            settings = resolve(settings)
    except (Missing, Unreachable) as failure:
        if insist:
            raise
        missing = f"{failure} ({failure.hint})"
    return settings, missing


def _missing_guest(settings: Settings) -> str:
    """Return what a guest lacks and how to get it, '' when it has everything, or a release brings it."""
    for name in RELEASE_PARTS:
        if getattr(settings, name) is None and not settings.release:
            return f"name --{name}, PYKQ_{name.upper()} or {name} in the configuration file"
    try:
        need(qemu.QEMU)
    except Failure as failure:
        return f"{failure}: {failure.hint}"
    return ""


def _host(chosen: Sequence[str]) -> None:
    """Run tests/host with this Python."""
    with step("tests on the host"):
        _pytest("host", ["tests/host"], chosen, {})


def _test_own_kqueue(results: Results, chosen: Sequence[str]) -> None:
    """Run the rules, and what a guest is tested with, on this host's kqueue, where there is one."""
    try:
        pykq.load_kernel("system")
    except pykq.KernelUnavailable as error:
        results.left_out["this host's kqueue"] = str(error)
        return
    with step("tests on this host's kqueue"):
        folders, environment = ["tests/rules", "tests/guest"], {"PYKQ_KERNEL": "system"}
        outcome = _attempt(_pytest, "kqueue of this host", folders, chosen, environment)
    results.outcomes["this host's kqueue"] = outcome


def _rump(settings: Settings, variant: str, chosen: Sequence[str], tests: str, sanitize: bool) -> None:
    """Run tests on a rump kernel, in a child process: a crash takes that down, and not this one."""
    folder = rump_folder(settings, variant, sanitize=sanitize)
    programs = build_for_rump(settings, variant, sanitize=sanitize)
    environment = {"PYKQ_KERNEL": str(folder), "PYKQ_EXPECT": variant, "PYKQ_PROGRAMS": str(programs)}
    if sanitize:
        environment |= sanitizer_environment()
    _pytest(f"{variant} rump kernel", [tests], chosen, environment)


def _guest(settings: Settings, variant: str, chosen: Sequence[str], programs: Path | None) -> None:
    """Run the guest tests on one kernel, in a guest of their own that is ended afterwards."""
    # There are two at a time: the few tests of --quick end sooner with a processor each, but races want two.
    cpus = 1 if chosen[-len(_RULES) :] == _RULES else 2
    with (
        qemu.fresh(settings, f"test-{variant}", variant, cpus=cpus) as machine,
        guest.connect(machine) as connection,
    ):
        report = Path(machine.folder) / "junit.xml"
        result = guest.run_tests(connection, report, chosen, programs, PYKQ_EXPECT=variant)
    _judge(f"the {variant} guest", result, chosen)


def _pytest(where: str, folders: list[str], chosen: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run pytest in a process of its own; raise TestsFailed when a test fails or the process dies."""
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q"]
    command += guest.pytest_words(chosen, *folders)
    command += ["-o", f"faulthandler_timeout={_TEST_WITHIN_S}", "-o", "faulthandler_exit_on_timeout=true"]
    shown: deque[str] = deque(maxlen=_SHOWN_LINES)
    status = watch(command, cwd=guest.ROOT, env=environment, on_line=shown.append)
    _judge(f"the {where}", (status, "\n".join(shown)), chosen)


def _judge(where: str, result: tuple[int, str] | Failure, chosen: Sequence[str]) -> None:
    """Say what pytest's status and output come to; raise TestsFailed, or the Failure it did not run for."""
    if isinstance(result, Failure):
        raise result
    status, output = result
    lines = printable(output).rstrip().splitlines()[-_SHOWN_LINES:]
    if status == 0 or (chosen and status == _NO_TESTS):
        say(f"tests on {where}: {lines[-1]}")
        for line in lines:
            if line.startswith("SKIPPED"):
                say(line)
        return
    how = f"died of {signal.Signals(-status).name}" if status < 0 else f"failed (pytest status {status})"
    raise TestsFailed(f"tests on {where} {how}", tail="\n".join(lines))
