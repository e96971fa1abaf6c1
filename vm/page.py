"""The page that says what was measured and proved: tests/RESULTS.md, all of whose numbers come from JSON."""

from __future__ import annotations

import runpy
import statistics
from pathlib import Path
from string import Template
from typing import Any

from . import plot, regress, rivals
from .build import VARIANTS
from .cache import read_json, write_whole
from .config import Settings
from .guest import ROOT
from .log import Failure, say

PAGE = ROOT / "tests" / "RESULTS.md"
_FOLDER = ROOT / "tests" / "results"

# The files in _FOLDER, where a run leaves them in the cache, and the command that makes them.
_RUNS = {
    "bench": ("bench/full.json", "invoke bench --full"),
    "stress": ("stress/stress.json", "invoke stress"),
    "regress": ("regress/regress.json", "invoke regress"),
}

# What the tickle's cost is to be, as a multiple of another's in the same round.
_BARS = (
    ("cost for the sender, of EVFILT_USER's", "awake_ns", "EVFILT_USER", 0.3),
    ("cost for the sender, of a pipe's", "awake_ns", "pipe", 0.45),
    ("cost for the sender, of an empty ioctl's (FIOCLEX)", "awake_ns", "fioclex_ns", 1.15),
    ("round trip, median, of the best rival's", "p50", "", 0.7),
    ("round trip, 99th percentile, of the best rival's", "p99", "", 1.0),
)
_TICKLE = "KQUEUE_TICKLE"


def write(settings: Settings) -> None:
    """Take over what was run last, and write the page and its plots from it.

    Without a run in the cache, the page is made from what lies beside it.
    """
    for name, (last, _) in _RUNS.items():
        if (settings.cache / last).is_file():
            write_whole(_FOLDER / f"{name}.json", (settings.cache / last).read_text())
    results = kept()
    write_whole(PAGE, text(results))
    drawn = plot.draw(_guests(results), _FOLDER)
    if not drawn:
        raise Failure("matplotlib is not installed", hint="pip install -e '.[plot]'")
    say(f"wrote {PAGE.relative_to(ROOT)} and {len(drawn)} plots")


def kept() -> dict[str, Any]:
    """Return the results that lie beside the page; raise Failure when some are missing."""
    results = {name: read_json(_FOLDER / f"{name}.json") for name in _RUNS}
    for name, (_, command) in _RUNS.items():
        if not results[name]:
            raise Failure(f"there is no {_FOLDER.relative_to(ROOT)}/{name}.json", hint=f"{command} makes it")
    return results


def text(results: dict[str, Any]) -> str:
    """Return the page."""
    runs, guests = results["bench"]["runs"], _guests(results)
    return Template(Path(__file__).with_suffix(".md").read_text()).substitute(
        bars=_bars(guests),
        rivals=_rivals(guests),
        python=_python(guests),
        busy=_busy(runs),
        tickles=_patched(runs)[0]["c"]["returns_for_a_tickle"]["tickles"],
        weak=_weak(_patched(runs)),
        **_model(),
        stress=_stress(results["stress"]),
        regress=_regress(results["regress"]),
        machine=_machine(results),
    )


def _bars(guests: list[dict[str, Any]]) -> str:
    """Compare with what the project asks for."""
    patched = _patched(guests)
    lines = [
        _row("", "at most", *(_cpus(run) for run in patched)),
        _row(*["---"] * (2 + len(patched))),
    ]
    for title, figure, rival, bar in _BARS:
        ratios = [_ratio(run["c"], figure, rival) for run in patched]
        cells = [f"{one:.2f}{'' if one <= bar else ' (missed)'}" for one in ratios]
        lines.append(_row(title, f"{bar:g}", *cells))
    return "\n".join(lines).strip()


def _ratio(measured: dict[str, Any], figure: str, rival: str) -> float:
    """Return the tickle's figure over the rival's, or over the best rival's."""
    ways = measured["ways"]
    if figure == "awake_ns":
        mine = ways[_TICKLE]["pending_ns" if rival.endswith("_ns") else figure]
        theirs = measured["floor"][rival] if rival.endswith("_ns") else ways[rival][figure]
    else:
        mine = ways[_TICKLE]["round_trip_ns"][figure]
        rivals = [way["round_trip_ns"][figure] for name, way in ways.items() if name != _TICKLE]
        theirs = min(rivals, key=statistics.median)
    return float(statistics.median(one / other for one, other in zip(mine, theirs, strict=True)))


def _rivals(guests: list[dict[str, Any]]) -> str:
    """Give the figures of every way, on both kernels."""
    lines = []
    for run in guests:
        lines += [
            f"**{run['variant']} kernel, {_cpus(run)}** "
            f"(an empty system call, getppid: {rivals.figure(run['c']['floor']['getppid_ns'], 1)} ns; "
            f"FIOCLEX on the kqueue: {rivals.figure(run['c']['floor']['fioclex_ns'], 1)} ns)\n",
            _row("", "awake, ns", "pending, ns", "asleep, ns", "round trip p50, µs", "p99, µs", "p99.9, µs",
                 "calls", "descriptors", "lost"),
            _row("---", *["---:"] * 9),
        ]
        for name, way in run["c"]["ways"].items():
            costs = [rivals.figure(way[key], 1) for key in ("awake_ns", "pending_ns", "asleep_ns")]
            times = [rivals.figure(way["round_trip_ns"][key], 1e3) for key in ("p50", "p99", "p999")]
            lines.append(_row(name, *costs, *times, way["calls"], way["descriptors"], way["lost"]))
        lines.append("")
    return "\n".join(lines).strip()


def _python(guests: list[dict[str, Any]]) -> str:
    """Give what pykq.bench measured."""
    lines = []
    for run in guests:
        lines += [
            f"**{run['variant']} kernel, {_cpus(run)}**\n",
            _row("", "send", "wake-up p50", "p99"),
            _row("---", "---:", "---:", "---:"),
        ]
        for name, way in run["python"]["results"].items():
            keys = ("send_s", "wake_p50_s", "wake_p99_s")
            lines.append(_row(name, *(f"{1e6 * way[key]:.1f}" if way.get(key) else "" for key in keys)))
        lines.append("")
    return "\n".join(lines).strip()


def _busy(runs: list[dict[str, Any]]) -> str:
    """Answer the objection of 2007."""
    lines = [
        _row("", *(f"{run['variant']}, {_where(run)}" for run in runs)),
        _row("---", *["---:"] * len(runs)),
    ]
    names = dict.fromkeys(name for run in runs for name in run["c"]["ways"])
    for name in names:
        cells = []
        for run in runs:
            way = run["c"]["ways"].get(name)
            behind = way["behind_ns"] if way else None
            cells.append(
                f"{rivals.figure(behind['p50'], 1e3)}; {rivals.figure(behind['p99'], 1e3)}" if behind else ""
            )
        lines.append(_row(name, *cells))
    return "\n".join(lines).strip()


def _weak(patched: list[dict[str, Any]]) -> str:
    """Show what version 2 of the patch does not do."""
    lines = [_row("sleepers", *map(_where, patched)), _row("---", *["---:"] * len(patched))]
    titles = {"of_2": "2", "of_4": "4", "of_8": "8", "of_1_beside_a_poller": "1, and a poller"}
    for key, title in titles.items():
        cells = [rivals.figure(run["c"]["returns_for_a_tickle"][key], 1) for run in patched]
        lines.append(_row(title, *cells))
    return "\n".join(lines).strip()


def _model() -> dict[str, int]:
    """Say what the model looked at; it is run for it."""
    model = runpy.run_path(str(ROOT / "patches" / "model.py"))
    scenarios, mutants = model["SCENARIOS"], model["MUTANTS"]
    states = sum(model["check"](first) for first in scenarios.values())
    return {"states": states, "scenarios": len(scenarios), "mutants": len(mutants)}


def _stress(stress: dict[str, Any]) -> str:
    """Give what the races, the fuzzers and the rules came to."""
    lines = [_row("where", "CPUs", "what", "came of it", "s"), _row("---", "---:", "---", "---", "---:")]
    for one in stress["ran"]:
        if "failed" in one:
            came = f"**failed: {one['failed']}**"
        elif one["program"] == "races":
            came = f"{one['tickles']:,} tickles, {one['rounds']:,} answered one by one, none lost"
        elif one["program"] == "fuzz":
            came = f"{one['inputs']:,} inputs, no panic, no call hung, {one['leaked']} objects kept"
        elif one["program"] == "libFuzzer":
            came = f"{one['inputs']:,} inputs, {one['edges_covered']} edges of kern_event.c, nothing found"
        else:
            came = f"{one['tests'] - one['skipped']} passed, {one['skipped']} skipped"
        where = " ".join(str(one[key]) for key in ("where", "variant") if key in one)
        lines.append(_row(where, one.get("cpus", ""), one.get("program", ""), came, one["seconds"]))
    return "\n".join(lines).strip()


def _regress(found: dict[str, Any]) -> str:
    """Give what others' tests came to on both kernels."""
    outcomes = found["outcomes"]
    differences = regress.compare(outcomes)
    lines = [
        _row("suite", *VARIANTS),
        _row("---", "---", "---"),
        *(
            _row(suite, *(regress.tally(outcomes[one][suite]) for one in VARIANTS))
            for suite in outcomes["stock"]
        ),
        "",
        f"Differences: {len(differences) or 'none'}.",
        *(f"* {suite}, {test}: stock {stock}, patched {new}" for suite, test, stock, new in differences),
        *(
            f"* {suite}, {test}: {outcome}, on both kernels"
            for suite, tests in outcomes["patched"].items()
            for test, outcome in tests.items()
            if outcome.startswith("failed") and outcomes["stock"][suite].get(test, "").startswith("failed")
        ),
    ]
    return "\n".join(lines).strip()


def _machine(results: dict[str, Any]) -> str:
    """Say where and when it was measured."""
    lines = []
    for name, (_, command) in _RUNS.items():
        machine = results[name]["machine"]
        load = f"{machine['load_before']:.1f}"
        if "load_after" in machine:
            load += f" before and {machine['load_after']:.1f} after"
        lines.append(
            f"* `{command}`: {machine['date']}, {machine['cpu']}, {machine['cpus']} CPUs, "
            f"QEMU {machine['qemu']}; load average {load}, other work on the machine included."
        )
    kernels = dict.fromkeys(f"NetBSD {run['netbsd']}, {_where(run)}" for run in results["bench"]["runs"])
    lines.append(f"* Kernels: {'; '.join(kernels)}.")
    return "\n".join(lines).strip()


def _guests(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in results["bench"]["runs"] if run["where"] != "rump kernel"]


def _patched(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["variant"] == "patched"]


def _where(run: dict[str, Any]) -> str:
    return "rump kernel" if run["where"] == "rump kernel" else _cpus(run)


def _cpus(run: dict[str, Any]) -> str:
    return f"guest, {run['cpus']} CPU{'s' if run['cpus'] > 1 else ''}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
