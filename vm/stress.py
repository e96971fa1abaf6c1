"""Hours in minutes: races and fuzzing on every kernel there is, and all rules with 1, 2 and 4 processors."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import guest, qemu
from .build import VARIANTS, build_kernels, kernel_folder, select
from .cache import read_json, write_whole
from .config import Settings
from .log import Failure, TestsFailed, report, say, step
from .programs import build_for_guest, build_for_rump
from .release import resolve
from .rivals import compact, this_machine
from .rump import build_rump, rump_folder

CPUS = (1, 2, 4)
DEBUG = "PYKQ_DEBUG"  # vm/kernel

# A round takes some 0.05 ms on a rump kernel, in an emulated guest 0.3 to 1 ms, with LOCKDEBUG more.
_IN_GUEST = 10
_WITH_LOCKDEBUG = 30
CORPUS = guest.ROOT / "tests" / "c" / "corpus"

# A program that hangs says so itself after a minute or two; this is for one that cannot.
_SLOWEST_ROUND_S = 0.01
_PATIENCE_S = 600

# What one of the kernel's pools may have handed out for an input of the fuzzer, and not got back, or as
# many as its caches hold: two groups of at most 63 a processor, and those behind them.
_LEAK = 0.01
_CACHED = 1000


def run(settings: Settings, *, rounds: int, minutes: float, resume: bool = False) -> Path:
    """Run it all, one after the other; return the JSON file in the cache that says what ran.

    rounds is how many tickles are accounted for on the rump kernel (races.c),
    of which each guest gets a tenth, and the one with LOCKDEBUG a thirtieth.
    minutes is how long each fuzzer runs.  The file is written after each
    attempt; with resume, what the file has of a run that was cut off, or found
    something, is not tried again where it passed, unless a kernel is newer.
    Raises TestsFailed when anything was found, at the end.
    """
    settings = resolve(settings)
    debug = replace(settings, kernel_config=DEBUG)
    programs = build_for_guest(settings)
    build_kernels(settings)
    build_kernels(debug, ["patched"])
    build_rump(settings)
    build_rump(settings, ["patched"], sanitize=True)
    path = settings.cache / "stress" / "stress.json"
    before = _before(path, settings, debug) if resume else []
    machine = this_machine()
    ran: list[dict[str, Any]] = []
    failures: list[Failure] = []

    def attempt(body: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        last = before[len(ran) : len(ran) + 1]  # the attempts come in the same order each time
        if last and "failed" not in last[0]:
            ran.extend(last)
        else:
            began = time.monotonic()
            try:
                ran.append(body(*arguments))
            except Failure as failure:
                report(failure)
                failures.append(failure)
                ran.append({"what": described(body, arguments), "failed": str(failure)})
            ran[-1]["seconds"] = round(time.monotonic() - began, 1)
        write_whole(path, compact({"machine": machine, "ran": [*ran, *before[len(ran) :]]}))

    attempt(_races_on_rump, settings, rounds)
    attempt(_fuzz_rump, settings, minutes)
    for variant in VARIANTS:
        for cpus in CPUS:
            attempt(_rules, settings, variant, cpus, programs)
    for cpus in CPUS:
        attempt(_in_guest, settings, cpus, programs, f"races -n {rounds // _IN_GUEST}", rounds)
    attempt(_in_guest, debug, 4, programs, f"races -n {rounds // _WITH_LOCKDEBUG}", rounds)
    attempt(_in_guest, debug, 4, programs, f"fuzz -t {minutes * 60:.0f}", 0)
    for one in ran:
        say(", ".join(f"{key} {value}" for key, value in one.items()))
    say(f"numbers: {path}")
    if failures:
        raise failures[0]
    return path


def _before(path: Path, *kinds: Settings) -> list[dict[str, Any]]:
    """Return what the last run has found, or nothing when there is a kernel that it cannot have seen."""
    folders = [kernel_folder(select(settings), variant) for settings in kinds for variant in VARIANTS]
    folders += [rump_folder(kinds[0], "patched", sanitize=sanitize) for sanitize in (False, True)]
    manifests = [folder / "manifest.json" for folder in folders]
    made = max((one.stat().st_mtime for one in manifests if one.exists()), default=0.0)
    if not path.exists() or path.stat().st_mtime < made:
        return []
    found: list[dict[str, Any]] = read_json(path)["ran"]
    return found


def described(body: Callable[..., object], arguments: Sequence[object]) -> str:
    """Name an attempt that failed: what and where."""
    words = [word for word in arguments if isinstance(word, str | int) and not isinstance(word, bool)]
    return " ".join([body.__name__.strip("_").replace("_", " "), *map(str, words)])


def _races_on_rump(settings: Settings, rounds: int) -> dict[str, Any]:
    """Run races.c on the patched rump kernel."""
    with step("races on the patched rump kernel"):
        done = _run([str(build_for_rump(settings, "patched") / "races"), "-n", str(rounds)])
    netbsd = _netbsd_of_rump(settings)
    return {
        "where": "rump kernel",
        "netbsd": netbsd,
        "cpus": os.cpu_count(),
        "program": "races",
        **numbers(done),
    }


def _netbsd_of_rump(settings: Settings, *, sanitize: bool = False) -> str:
    """Return the version of the source of the patched rump kernel."""
    manifest = read_json(rump_folder(settings, "patched", sanitize=sanitize) / "manifest.json")
    return str(manifest["netbsd"])


def _fuzz_rump(settings: Settings, minutes: float) -> dict[str, Any]:
    """Run libFuzzer on the sanitized rump kernel, from the corpus in tests/c and what it found since."""
    fuzzer = build_for_rump(settings, "patched", sanitize=True) / "libfuzzer"
    found = settings.cache / "stress" / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    command = [str(fuzzer), f"-max_total_time={minutes * 60:.0f}", "-max_len=600", "-print_final_stats=1"]
    command += ["-len_control=0", "-timeout=60"]  # an input is for three threads: short ones try little
    command += ["-detect_leaks=0"]  # not after each input, that takes a second; at the end it is done
    command += [f"-artifact_prefix={found.parent}/", str(found), str(CORPUS)]
    with step("libFuzzer on the sanitized rump kernel"):
        text = _run(command, UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1")
    covered = re.findall(r" cov: (\d+)", text)
    return {
        "where": "sanitized rump kernel",
        "netbsd": _netbsd_of_rump(settings, sanitize=True),
        "program": "libFuzzer",
        "inputs": int(re.findall(r"number_of_executed_units: (\d+)", text)[-1]),
        "edges_covered": int(covered[-1]) if covered else 0,
    }


def _rules(settings: Settings, variant: str, cpus: int, programs: Path) -> dict[str, Any]:
    """Run the rules, in Python and C, in a guest."""
    junit = settings.cache / "stress" / f"{variant}-{cpus}.xml"
    with (
        qemu.fresh(settings, f"stress-{variant}", variant, cpus=cpus) as machine,
        step(f"rules in the {variant} guest, {cpus} CPUs"),
        guest.connect(machine) as connection,
    ):
        status, output = guest.run_tests(connection, junit, [], programs, PYKQ_EXPECT=variant)
    if status:
        raise TestsFailed(f"tests failed in the {variant} guest with {cpus} CPUs", tail=output[-3000:])
    counts = {key: int(re.findall(rf'{key}="(\d+)"', junit.read_text())[0]) for key in ("tests", "skipped")}
    return {**_where(settings, machine, cpus), "program": "pytest", **counts}


def _where(settings: Settings, machine: qemu.Machine, cpus: int) -> dict[str, Any]:
    """Say what was tested, for the page."""
    return {
        "where": f"guest, {settings.kernel_config}",
        "netbsd": machine.netbsd,
        "accelerator": machine.accelerator,
        "variant": machine.variant,
        "cpus": cpus,
    }


def _in_guest(
    settings: Settings, cpus: int, programs: Path, command: str, rounds: int
) -> dict[str, Any]:
    """Run one of the programs in a guest with the patched kernel."""
    with (
        qemu.fresh(settings, "stress", "patched", cpus=cpus) as machine,
        step(f"{command} in a guest, kernel {settings.kernel_config}, {cpus} CPUs"),
        guest.connect(machine) as connection,
        guest.installed(connection, programs) as folder,
    ):
        within_s = _PATIENCE_S + rounds * _SLOWEST_ROUND_S
        result = connection.run(f"{folder}/programs/{command}", hide=True, warn=True, timeout=within_s)
        machine.raise_if_dead()  # before the guest is asked to tidy up
    if result.exited:
        raise TestsFailed(f"{command} ended with status {result.exited}", tail=result.stdout + result.stderr)
    found = numbers(result.stdout)
    kept = leaks(found)
    if kept:
        raise TestsFailed(f"{command}: pools of the kernel lack objects: {kept}", tail=result.stdout)
    return {**_where(settings, machine, cpus), "program": command.partition(" ")[0], **found}


def _run(command: list[str], **variables: str) -> str:
    """Run a program on this host; return its output, raise TestsFailed with the end of it when it fails."""
    done = subprocess.run(
        command,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        program = Path(command[0]).name
        raise TestsFailed(f"{program} ended with status {done.returncode}", tail=done.stdout[-3000:])
    return done.stdout


def numbers(text: str) -> dict[str, Any]:
    """Read what races.c and fuzz.c print."""
    found: dict[str, Any] = {}
    patterns = {
        "seed": r"^seed (\d+)",
        "rounds": r"^(\d+) rounds accounted for",
        "tickles": r"(\d+) tickles, none lost",
        "eintr": r"(\d+) waits ended by EINTR",
        "events": r"(\d+) by events",
        "timeouts_raced": r"(\d+) timeouts raced",
        "signals": r"(\d+) signals",
        "forks": r"(\d+) forks",
        "waits_closed": r"(\d+) waits closed",
        "inputs": r"^(\d+) inputs",
    }
    for name, pattern in patterns.items():
        match = re.search(pattern, text, re.MULTILINE)
        if match:
            found[name] = int(match[1])
    if abi := re.search(r"^seed \d+, (.*)$", text, re.MULTILINE):
        found["abi"] = abi[1]
    if pool := re.search(r"^kqueues come from the pool (\S+)", text, re.MULTILINE):
        found["pool_of_kqueues"] = pool[1]
        pools = re.findall(r"^pool (.+): (\d+) objects out after .*, (\d+) at the end", text, re.MULTILINE)
        found["kept"] = {name: int(after) - int(before) for name, before, after in pools}
    return found


def leaks(found: dict[str, Any]) -> dict[str, int]:
    """Return the pools that have handed out more than they got back, and how much; raise without numbers.

    Files and the pool that kqueues come from have to be among those looked at.
    """
    if "inputs" not in found:
        return {}
    kept: dict[str, int] = found.get("kept", {})
    unknown = {"file", found.get("pool_of_kqueues", "kqueue's")} - set(kept)
    if unknown:
        raise TestsFailed(f"fuzz does not tell of the pools {', '.join(sorted(unknown))}")
    most = max(_CACHED, _LEAK * found["inputs"])
    return {name: count for name, count in kept.items() if count > most}
