"""Hours in minutes: races and fuzzing on every kernel there is, and all rules with 1, 2 and 4 processors."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import guest, qemu
from .build import VARIANTS, build_kernels
from .cache import write_whole
from .config import Settings
from .log import Failure, TestsFailed, report, say, step
from .programs import build_for_guest, build_for_rump
from .release import resolve
from .rivals import compact, this_machine
from .rump import build_rump
from .run import uninterrupted

CPUS = (1, 2, 4)
DEBUG = "PYKQ_DEBUG"  # vm/kernel
CORPUS = guest.ROOT / "tests" / "c" / "corpus"

# A program that hangs says so itself after a minute or two; this is for one that cannot.
_SLOWEST_ROUND_S = 0.01
_PATIENCE_S = 600

# Objects that the kernel's pools may have handed out for an input of the fuzzer, and not got back.
_LEAK = 0.01


def run(settings: Settings, *, rounds: int, minutes: float) -> Path:
    """Run it all, one after the other; return the JSON file in the cache that says what ran.

    rounds is how many tickles are sent and answered in the guests, over all of them; a
    rump kernel gets as many, a kernel with LOCKDEBUG a tenth.  minutes is how
    long each fuzzer runs.  Raises TestsFailed when anything was found, at the end.
    """
    settings = resolve(settings)
    debug = replace(settings, kernel_config=DEBUG)
    programs = build_for_guest(settings)
    build_kernels(settings)
    build_kernels(debug, ["patched"])
    build_rump(settings)
    build_rump(settings, ["patched"], sanitize=True)
    ran: list[dict[str, Any]] = []
    failures: list[Failure] = []

    def attempt(body: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        began = time.monotonic()
        try:
            ran.append(body(*arguments))
        except Failure as failure:
            report(failure)
            failures.append(failure)
            ran.append({"failed": str(failure)})
        ran[-1]["seconds"] = round(time.monotonic() - began, 1)

    attempt(_races_on_rump, settings, rounds)
    attempt(_fuzz_rump, settings, minutes)
    for variant in VARIANTS:
        for cpus in CPUS:
            attempt(_rules, settings, variant, cpus, programs)
    for cpus in CPUS:
        attempt(_in_guest, settings, cpus, programs, f"races -n {rounds // len(CPUS)}", rounds)
    attempt(_in_guest, debug, 4, programs, f"races -n {rounds // 10}", rounds)
    attempt(_in_guest, debug, 4, programs, f"fuzz -t {minutes * 60:.0f}", 0)
    path = settings.cache / "stress" / "stress.json"
    write_whole(path, compact({"machine": this_machine(), "ran": ran}))
    for one in ran:
        say(", ".join(str(value) for value in one.values()))
    say(f"numbers: {path}")
    if failures:
        raise failures[0]
    return path


def _races_on_rump(settings: Settings, rounds: int) -> dict[str, Any]:
    """Run races.c on the patched rump kernel."""
    with step("races on the patched rump kernel"):
        done = _run([str(build_for_rump(settings, "patched") / "races"), "-n", str(rounds)])
    return {"where": "rump kernel", "cpus": os.cpu_count(), "program": "races", **_numbers(done)}


def _fuzz_rump(settings: Settings, minutes: float) -> dict[str, Any]:
    """Run libFuzzer on the sanitized rump kernel, from the corpus in tests/c and what it found since."""
    fuzzer = build_for_rump(settings, "patched", sanitize=True) / "libfuzzer"
    found = settings.cache / "stress" / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    command = [str(fuzzer), f"-max_total_time={minutes * 60:.0f}", "-max_len=600", "-print_final_stats=1"]
    command += ["-detect_leaks=0"]  # not after each input, that takes a second; at the end it is done
    command += [f"-artifact_prefix={found.parent}/", str(found), str(CORPUS)]
    with step("libFuzzer on the sanitized rump kernel"):
        text = _run(command, UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1")
    covered = re.findall(r" cov: (\d+)", text)
    return {
        "where": "sanitized rump kernel",
        "program": "libFuzzer",
        "inputs": int(re.findall(r"number_of_executed_units: (\d+)", text)[-1]),
        "edges_covered": int(covered[-1]) if covered else 0,
    }


def _rules(settings: Settings, variant: str, cpus: int, programs: Path) -> dict[str, Any]:
    """Run the rules, in Python and C, in a guest."""
    name = f"stress-{variant}"
    junit = settings.cache / "stress" / f"{variant}-{cpus}.xml"
    machine = qemu.up(settings, variant=variant, name=name, cpus=cpus)
    try:
        with step(f"rules in the {variant} guest, {cpus} CPUs"), guest.connect(machine) as connection:
            status, output = guest.run_tests(connection, junit, [], programs, PYKQ_EXPECT=variant)
        machine.raise_if_dead()
    finally:
        with uninterrupted():
            qemu.down(settings, name)
    if status:
        raise TestsFailed(f"tests failed in the {variant} guest with {cpus} CPUs", tail=output[-3000:])
    counts = {key: int(re.findall(rf'{key}="(\d+)"', junit.read_text())[0]) for key in ("tests", "skipped")}
    return {"where": "guest", "variant": variant, "cpus": cpus, "program": "pytest", **counts}


def _in_guest(
    settings: Settings, cpus: int, programs: Path, command: str, rounds: int
) -> dict[str, Any]:
    """Run one of the programs in a guest with the patched kernel."""
    name = "stress"
    machine = qemu.up(settings, variant="patched", name=name, cpus=cpus)
    try:
        with (
            step(f"{command} in a guest, kernel {settings.kernel_config}, {cpus} CPUs"),
            guest.connect(machine) as connection,
            guest.installed(connection, programs) as folder,
        ):
            within_s = _PATIENCE_S + rounds * _SLOWEST_ROUND_S
            result = connection.run(f"{folder}/programs/{command}", hide=True, warn=True, timeout=within_s)
            machine.raise_if_dead()
    finally:
        with uninterrupted():
            qemu.down(settings, name)
    if result.exited:
        raise TestsFailed(f"{command} ended with status {result.exited}", tail=result.stdout + result.stderr)
    numbers = _numbers(result.stdout)
    if "inputs" in numbers and numbers["leaked"] > _LEAK * numbers["inputs"]:
        raise TestsFailed(f"{command}: the kernel's pools did not get {numbers['leaked']} objects back")
    program = command.partition(" ")[0]
    where = f"guest, {settings.kernel_config}"
    return {"where": where, "variant": "patched", "cpus": cpus, "program": program, **numbers}


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


def _numbers(text: str) -> dict[str, int]:
    """Read what races.c and fuzz.c print."""
    numbers = {}
    patterns = {
        "seed": r"^seed (\d+)",
        "rounds": r"^(\d+) rounds",
        "tickles": r"(\d+) tickles, none lost",
        "eintr": r"(\d+) waits ended by EINTR",
        "events": r"(\d+) by events",
        "inputs": r"^(\d+) inputs",
    }
    for name, pattern in patterns.items():
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            numbers[name] = int(found[1])
    objects = re.search(r"objects out: (\d+) .*, (\d+) at the end", text)
    if objects:
        numbers["leaked"] = max(0, int(objects[2]) - int(objects[1]))
    return numbers
