"""A tickle beside its rivals: tests/c/rivals.c and pykq.bench, on every kernel there is."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from . import guest, qemu
from .build import VARIANTS, build_kernels
from .cache import read_json
from .config import Settings
from .log import Failure, show, step
from .programs import build_for_guest, build_for_rump
from .release import Release, resolve
from .rump import build_rump, rump_folder, run_module

# The guests that are started for a full measurement.
_GUESTS = (("stock", 2), ("patched", 1), ("patched", 2), ("patched", 4))

# Of each, one after the other: where an emulator happens to put things makes up to a fifth of a figure, the
# same one in all rounds.
_GUESTS_OF_EACH = 3

_ROUNDS = 5

# The longest that rivals.c takes, on one emulated processor, is some minutes.
_WITHIN_S = 900


def measure(settings: Settings, *, name: str, full: bool) -> dict[str, Any]:
    """Measure in the guest when it is up and on the patched rump kernel; return what the page is made of.

    With full, in guests of its own, several of each kind, with both kernels,
    the patched one on 1, 2 and 4 processors, and on both rump kernels.
    """
    machine = None if full else qemu.find(settings, name)
    result: dict[str, Any] = {"machine": this_machine(), "runs": []}
    if full:
        settings = resolve(settings)
        build_kernels(settings)
        for variant, cpus in _GUESTS:
            result["runs"].append(_in_own_guests(settings, variant, cpus))
    elif machine is not None:
        result["runs"].append(_in_guest(settings, machine))
    if machine is None or Release(settings).has("source"):
        settings = resolve(settings, "source")
    if settings.source is not None:
        for variant in VARIANTS if full else ["patched"]:
            result["runs"].append(_on_rump(settings, variant))
    result["machine"]["load_after"] = os.getloadavg()[0]
    return result


def show_run(run: dict[str, Any]) -> None:
    """Print what was measured on one kernel."""
    _show_c(run)
    if run["python"] is not None:
        _show_python(run["python"])


def this_machine() -> dict[str, Any]:
    """Say what this host is and how busy, for a page that people read elsewhere."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    version = subprocess.run([qemu.QEMU, "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": model[1] if model else os.uname().machine,
        "cpus": os.cpu_count(),
        "qemu": (re.findall(r"version (\S+)", version) or [""])[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_before": os.getloadavg()[0],
    }


def compact(value: Any) -> str:
    """Return JSON with one line for each list of numbers: it is kept in a repository."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def spread(values: Sequence[float]) -> float:
    """Return half of the range that the middle half of the rounds lies in."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / 2


def title(run: dict[str, Any]) -> str:
    """Name the kernel that was measured."""
    cpus = f"{run['cpus']} CPU{'s' if run['cpus'] > 1 else ''}"
    return f"NetBSD {run['netbsd']}, {run['variant']}, {run['where']}, {cpus}"


def joined(parts: Sequence[Any], key: str = "") -> Any:
    """Join what several guests measured: their rounds follow one another, other numbers are medians.

    The percentiles of all of a guest's rounds are no rounds.
    """
    first = parts[0]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts], key) for key in first}
    if key == "percentiles":
        return [statistics.median(one) for one in zip(*parts, strict=True)]
    if isinstance(first, list):
        return [one for part in parts for one in part]
    return statistics.median(parts) if isinstance(first, int | float) else first


def _in_own_guests(settings: Settings, variant: str, cpus: int) -> dict[str, Any]:
    """Measure in guests that are started for it and ended afterwards."""
    parts = []
    for _ in range(_GUESTS_OF_EACH):
        with qemu.fresh(settings, f"bench-{variant}", variant, cpus=cpus) as machine:
            qemu.pin(machine)
            parts.append(_in_guest(settings, machine))
    result: dict[str, Any] = joined(parts)
    return result


def _in_guest(settings: Settings, machine: qemu.Machine) -> dict[str, Any]:
    """Measure in a guest that is up."""
    programs = build_for_guest(resolve(settings, "sets"))
    with guest.connect(machine) as connection, guest.installed(connection, programs) as folder:
        cpus = int(connection.run("sysctl -n hw.ncpu", hide=True).stdout)
        with step(f"rivals in the {machine.variant} guest, {cpus} CPUs"):
            command = f"{folder}/programs/rivals -r {_ROUNDS}"
            measured = connection.run(command, hide=True, timeout=_WITHIN_S).stdout
    return {
        "where": f"guest ({machine.accelerator})",
        "variant": machine.variant,
        "netbsd": machine.netbsd,
        "cpus": cpus,
        "c": json.loads(measured),
        "python": json.loads(guest.run_module(machine, "pykq.bench", "--json", show=False)),
    }


def _on_rump(settings: Settings, variant: str) -> dict[str, Any]:
    """Measure on a rump kernel."""
    build_rump(settings, [variant])
    rivals = build_for_rump(settings, variant) / "rivals"
    with step(f"rivals on the {variant} rump kernel"):
        command = [str(rivals), "-r", str(_ROUNDS)]
        try:
            measured = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, timeout=_WITHIN_S
            ).stdout
        except subprocess.SubprocessError as error:
            raise Failure(f"on the {variant} rump kernel: {error}") from error
    manifest = read_json(rump_folder(settings, variant) / "manifest.json")
    python = None
    if variant == "patched":
        python = json.loads(run_module(settings, "pykq.bench", "--json", show=False))
    return {
        "where": "rump kernel",
        "variant": variant,
        "netbsd": manifest["netbsd"],
        "cpus": os.cpu_count(),
        "c": json.loads(measured),
        "python": python,
    }


def _show_c(run: dict[str, Any]) -> None:
    """Print what rivals.c measured: medians of the rounds, with their spread."""
    costs = Table("send, ns", "awake", "pending", "asleep", "M/s, 1 sender", "8", title=title(run), box=None)
    times = Table("us", "one way p50", "round trip p50", "p99", "p99.9", "note", "own event", box=None)
    for name, way in run["c"]["ways"].items():
        cells = [figure(way[key], 1) for key in ("awake_ns", "pending_ns", "asleep_ns")]
        costs.add_row(name, *cells, *(figure(way[f"per_second_{senders}"], 1e6) for senders in (1, 8)))
        times.add_row(name, *delays(way), behind(way, "note", "p50"), behind(way, "event", "p50"))
    for name, key in (("FIOCLEX", "fioclex"), ("getppid", "getppid")):
        floor = run["c"]["floor"]
        awake = figure(floor[f"{key}_awake_ns"], 1) if f"{key}_awake_ns" in floor else ""
        costs.add_row(name, awake, figure(floor[f"{key}_ns"], 1))
    show(costs)
    show(times)


def delays(way: dict[str, Any]) -> list[str]:
    """Give one way's latency and its round trips' percentiles, in us; p99.9 is of all rounds together."""
    trips = way["round_trip_ns"]
    cells = [figure(way["latency_ns"]["p50"], 1e3), figure(trips["p50"], 1e3)]
    cells.append(figure(trips["p99"], 1e3) if "p99" in trips else "")
    cells.append(figure([trips["all"]["p999"]], 1e3) if "p999" in trips["all"] else "")
    return cells


def behind(way: dict[str, Any], what: str, percentile: str) -> str:
    """Give the delay behind a stream of events until the note or the way's own event was seen, in us."""
    times = way.get(f"behind_{what}_ns", {})
    return figure(times[percentile], 1e3) if percentile in times else ""


# What pykq.bench measured of a way to wake: the columns and the keys.
PYTHON = {
    "awake": "send",
    "pending": "pending",
    "asleep": "asleep",
    "wake-up p50": "wake_p50",
    "p99": "wake_p99",
    "p99.9": "wake_p999",
}


def python_cells(numbers: dict[str, float]) -> list[str]:
    """Give the columns of PYTHON in microseconds, with the spread of the rounds where there is one."""
    cells = []
    for key in PYTHON.values():
        middle, around = numbers.get(f"{key}_s"), numbers.get(f"{key}_spread_s")
        cell = "" if middle is None else f"{1e6 * middle:.1f}"
        cells.append(cell if around is None else f"{cell} ±{1e6 * around:.1f}")
    return cells


def _show_python(measured: dict[str, Any]) -> None:
    """Print what pykq.bench measured, in microseconds."""
    table = Table("Python, us", *PYTHON, box=None)
    for way, numbers in measured["results"].items():
        table.add_row(way, *python_cells(numbers))
    show(table)
    table = Table("Python, us: pykq", "other", "ratio", "at most", "pykq : other", box=None)
    for pair, numbers in measured["driver"].items():
        times = [f"{1e6 * numbers[key]:.1f}" for key in ("pykq_s", "other_s")]
        bar = f"{numbers['at_most']:g}" if "at_most" in numbers else ""
        table.add_row(*times, f"{numbers['ratio']:.2f}", bar, pair)
    show(table)


def figure(values: Sequence[float], unit: float) -> str:
    """Format a median and, of several values, its spread; precise enough for three figures."""
    middle = statistics.median(values) / unit
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ±{spread(values) / unit:.{digits}f}"
