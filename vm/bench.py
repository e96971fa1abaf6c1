"""Speed: what a wake-up costs on each kernel there is, and what an edit of the patch costs its author."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.table import Table

from . import guest, qemu
from .cache import write_whole
from .config import Settings
from .log import console, say, step
from .rump import build_rump, run_module
from .suite import raise_failures, test_rumps


def run(settings: Settings, *, name: str = "pykq", loop: bool = False, as_json: bool = False) -> None:
    """Measure, print a table or JSON, and keep the JSON in the cache.

    Wake-ups are measured by pykq.bench, in the guest when it is up and on the
    patched rump kernel.  With loop, also the time from an edited kern_event.c
    to the verdict of the rules, T1 to T10, on both rump kernels.
    """
    runs = []
    machine = qemu.find(settings, name)
    if machine is not None:
        runs.append(json.loads(guest.run_module(machine, "pykq.bench", "--json", show=False)))
    if settings.source is not None:
        runs.append(json.loads(run_module(settings, "pykq.bench", "--json", show=False)))
    result: dict[str, Any] = {"wake_ups": runs}
    if loop:
        result["loop_s"] = _loop(settings)
    write_whole(settings.cache / "bench.json", json.dumps(result, indent=1))
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for measured in runs:
        table = Table("microseconds", "send", "wake p50", "wake p99", title=measured["kernel"], box=None)
        for way, numbers in measured["results"].items():
            keys = ("send_s", "wake_p50_s", "wake_p99_s")
            table.add_row(way, *(f"{1e6 * numbers[key]:.1f}" if key in numbers else "" for key in keys))
        console.print(table)
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
