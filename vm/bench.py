"""Speed: what a wake-up costs on each kernel there is, and what an edit of the patch costs its author."""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace

from rich.table import Table

from . import guest, plot, qemu, rivals
from .build import build_kernels, kernel_folder, pvh, select
from .cache import write_whole
from .clean import freed_bytes
from .config import Settings
from .image import build_image
from .log import TestsFailed, say, show, step
from .programs import build_for_guest
from .release import resolve
from .rump import build_rump
from .run import run as run_program
from .suite import raise_failures, test_rumps

_BOOTS = 5
_GUEST = "bench"

# What the figures of run_host() are to be at most, on two cores without KVM.
_BARS = {
    "boot_s": 1.5,
    "boot_from_state_s": 0.5,
    "nothing_to_build_s": 1,
    "quick_test_of_guests_s": 10,
    "edit_to_first_test_s": 8,
    "from_nothing_s": 300,
}


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


def run_host(settings: Settings, *, full: bool = False, as_json: bool = False) -> None:
    """Measure what this host makes of a guest: boots, edits, nothing to do; print and keep it as JSON.

    The kernels and the image are there before; boots are medians of five, from
    QEMU's start to an ssh that answers.  With full, also a build from nothing
    in a cache of its own, and that cache's size.
    """
    build_kernels(settings)
    result = {"boot_s": _boot(settings, saved=False), "boot_from_state_s": _boot(settings, saved=True)}
    result["nothing_to_build_s"] = _command(settings, "build-kernel", "--quiet")
    quick = ("test", "--guest", "--quick", "--quiet")
    _command(settings, *quick)  # leaves the states from which the guests start from then on
    result["quick_test_of_guests_s"] = _command(settings, *quick)
    result |= _edit(settings)
    if full:
        result |= _from_nothing(settings)
    write_whole(settings.cache / "bench" / "host.json", json.dumps(result, indent=1))
    if as_json:
        print(json.dumps(result, indent=1))
        return
    table = Table("measured", "at most", "what", box=None)
    for what, figure in result.items():
        bar = f"{_BARS[what]:g}" if what in _BARS else ""
        words, _, unit = what.rpartition("_")
        table.add_row(f"{figure:.2f}", bar, f"{words.replace('_', ' ')}, {unit}")
    show(table)


def _command(settings: Settings, *words: str) -> float:
    """Return the seconds that a command takes."""
    began = time.monotonic()
    run_program(
        [sys.executable, "-m", "invoke", *words],
        cwd=guest.ROOT,
        env=settings.environment(),
    )
    return time.monotonic() - began


def _edit(settings: Settings) -> dict[str, float]:
    """Return the seconds from an edited kern_event.c to kernels, and to the first result in a guest.

    That is the first of what tests/c/rules.c has to say, with which the tests
    in a guest begin.
    """
    programs = build_for_guest(settings)
    result = {}
    began = time.monotonic()
    with step("edit, build, boot, test"):
        build_kernels(settings, edit=b"/* edited */\n")
        result["edit_to_kernels_s"] = time.monotonic() - began
        with (
            qemu.fresh(settings, _GUEST, "patched") as machine,
            guest.connect(machine) as connection,
            guest.installed(connection, programs) as folder,
        ):
            first = next(guest.rules_in_c(connection, folder, "patched"), "there is none")
            result["edit_to_first_test_s"] = time.monotonic() - began
    build_kernels(settings)
    if not first.startswith("ok "):
        raise TestsFailed(f"the first result in the guest: {first}")
    return result


def _from_nothing(settings: Settings) -> dict[str, float]:
    """Return the seconds from unpacked sources to both kernels and the image, and what these take in GB."""
    cold = replace(settings, cache=settings.cache / "bench" / "cold")
    try:
        began = time.monotonic()
        build_kernels(cold)
        builder = select(cold)
        kernel = kernel_folder(builder, "patched") / "netbsd"
        build_image(builder, None if pvh(kernel) else kernel)
        seconds = time.monotonic() - began
        return {"from_nothing_s": seconds, "cache_GB": freed_bytes(cold.cache, Counter()) / 1e9}
    finally:
        shutil.rmtree(cold.cache, ignore_errors=True)


def _boot(settings: Settings, *, saved: bool) -> float:
    """Return the median of the seconds from QEMU's start to an ssh that answers."""
    seconds = []
    for attempt in range(_BOOTS + saved):  # the first may have to leave the state
        machine = qemu.up(settings, name=_GUEST, saved=saved)
        with socket.create_connection(("127.0.0.1", machine.ssh_port), timeout=qemu.BOOT_WITHIN_S) as ssh:
            ssh.recv(1)
        if attempt >= saved:
            seconds.append(time.time() - machine.started)
        qemu.down(settings, _GUEST)
    return statistics.median(seconds)
