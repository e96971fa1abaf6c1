"""Speed: what a wake-up costs on each kernel there is, and what an edit of the patch costs its author."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from rich.table import Table

from . import guest, plot, qemu, rivals
from .build import build_kernels
from .cache import write_whole
from .config import Settings
from .log import say, show, step
from .release import resolve
from .rump import build_rump
from .suite import raise_failures, test_guest, test_rumps

_BOOTS = 5


def run(
    settings: Settings, *, name: str = "pykq", loop: bool = False, full: bool = False, as_json: bool = False
) -> None:
    """Measure, print tables or JSON, draw, and keep the JSON in the cache.

    vm.rivals measures.  With loop, also the time from an edited kern_event.c
    to the verdict of the rules, T1 to T10, on both rump kernels.
    """
    result = rivals.measure(settings, name=name, full=full)
    if loop:
        result["loop_s"] = _loop(resolve(settings, "source"))
    path = settings.cache / "bench" / ("full.json" if full else "bench.json")
    write_whole(path, rivals.compact(result))
    drawn = plot.draw(result["runs"], path.parent)
    if as_json:
        print(path.read_text(), end="")
        return
    for one in result["runs"]:
        rivals.show_run(one)
    say(", ".join(str(file) for file in [path, *drawn]))
    if loop:
        say(f"edited kern_event.c to the verdict on both rump kernels: {result['loop_s']:.1f} s")


def _loop(settings: Settings) -> float:
    """Return the seconds from an edit to the verdict; the user's source is left alone."""
    build_rump(settings)
    began = time.monotonic()
    with step("edit, build, test"):
        build_rump(settings, edit=b"/* edited */\n")
        raise_failures(test_rumps(settings, tests="tests/rules/test_rules.py"))
    seconds = time.monotonic() - began
    build_rump(settings)
    return seconds


def run_host(settings: Settings, *, as_json: bool = False) -> None:
    """Measure what this host makes of a guest: boots, edits, nothing to do; print and keep it as JSON.

    The kernels and the image are there before; boots are medians of five, from
    QEMU's start to an ssh that answers.
    """
    build_kernels(settings)
    result = {"boot_s": _boot(settings, saved=False), "boot_from_state_s": _boot(settings, saved=True)}
    began = time.monotonic()
    command = [sys.executable, "-m", "invoke", "build-kernel", "--quiet"]
    subprocess.run(command, cwd=guest.ROOT, env={**os.environ, **settings.environment()}, check=True)
    result["nothing_to_build_s"] = time.monotonic() - began
    began = time.monotonic()
    with step("edit, build, boot, test"):
        build_kernels(settings, edit=b"/* edited */\n")
        result["edit_to_kernels_s"] = time.monotonic() - began
        outcome = test_guest(settings, "patched", ("-k", "test_t1_a_thread_asleep_returns_eintr"))
        result["edit_to_first_test_s"] = time.monotonic() - began
    build_kernels(settings)
    raise_failures({"guest": outcome})
    write_whole(settings.cache / "bench-host.json", json.dumps(result, indent=1))
    if as_json:
        print(json.dumps(result, indent=1))
        return
    table = Table("seconds", "what", box=None)
    for what, seconds in result.items():
        table.add_row(f"{seconds:.2f}", what.removesuffix("_s").replace("_", " "))
    show(table)


def _boot(settings: Settings, *, saved: bool) -> float:
    """Return the median of the seconds from QEMU's start to an ssh that answers."""
    name, seconds = "bench", []
    for attempt in range(_BOOTS + saved):  # the first may have to leave the state
        machine = qemu.up(settings, name=name, saved=saved)
        if attempt >= saved:
            seconds.append(time.time() - machine.started)
        qemu.down(settings, name)
    return statistics.median(seconds)
