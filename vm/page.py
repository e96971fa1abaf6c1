"""The page that says what was measured and proved: tests/RESULTS.md, all of whose numbers come from JSON."""

from __future__ import annotations

import runpy
import statistics
from collections.abc import Iterable
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

# What the tickle's figure is to be at most, as a multiple of another's in the same round: what is compared,
# the tickle's figure, and the other's.  A rival of "" is the best there is.
_BARS = (
    ("send, awake, of EVFILT_USER's, awake", "awake_ns", "EVFILT_USER", 0.3),
    ("send, awake, of a pipe's, awake", "awake_ns", "pipe", 0.45),
    ("send, awake, of FIOCLEX's, one by one like it", "awake_ns", "fioclex_awake_ns", 1.15),
    ("send, pending, of FIOCLEX's, in a row like it", "pending_ns", "fioclex_ns", 1.15),
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
        **_short(results),
        bars=_bars(guests),
        rivals=_rivals(guests),
        python=_python(guests),
        driver=_driver(guests),
        busy=_busy(runs),
        tickles=_same(run["c"]["returns_for_a_tickle"]["tickles"] for run in _patched(runs)),
        abi=_same(run["c"]["abi"] for run in runs),
        weak=_weak(_patched(runs)),
        **_model(),
        stress=_stress(results["stress"]),
        regress=_regress(results["regress"]),
        machine=_machine(results),
    )


def _short(results: dict[str, Any]) -> dict[str, str]:
    """Return the numbers of the few lines that the page begins with."""
    patched = _patched(_guests(results))
    run = max(patched, key=lambda one: one["cpus"] == 2)
    trips = [_ratio(one["c"], "p50", "") for one in patched]
    races = [one for one in results["stress"]["ran"] if "tickles" in one]
    outcomes = results["regress"]["outcomes"]
    differing = regress.compare(outcomes)
    met = [_ratio(one["c"], figure, rival) <= bar for one in patched for _, figure, rival, bar in _BARS]
    driver = [one for run in patched for one in run["python"]["driver"].values() if "at_most" in one]
    met += [one["ratio"] <= one["at_most"] for one in driver]
    return {
        "guest": _cpus(run),
        "tickle_ns": f"{statistics.median(run['c']['ways'][_TICKLE]['awake_ns']):.0f}",
        "of_event": f"{_ratio(run['c'], 'awake_ns', 'EVFILT_USER'):.2f}",
        "of_pipe": f"{_ratio(run['c'], 'awake_ns', 'pipe'):.2f}",
        "trips": f"{min(trips):.2f} to {max(trips):.2f}",
        "raced": f"{sum(one['tickles'] for one in races):,}",
        "accounted": f"{sum(one['rounds'] for one in races):,}",
        "others": f"{sum(map(len, outcomes['patched'].values())):,}",
        "differences": f"{len(differing)} came out differently, see below" if differing else "no difference",
        "reached": f"{statistics.median(run['c']['returns_for_a_tickle']['of_1_beside_a_poller']):.0%}",
        "met": f"{sum(met)} of {len(met)}",
    }


def _bars(guests: list[dict[str, Any]]) -> str:
    """Compare with what the project asks for."""
    patched = _patched(guests)
    lines = [
        _row("", "at most", *(_cpus(run) for run in patched)),
        _row(*["---"] * (2 + len(patched))),
    ]
    missed = []
    for title, figure, rival, bar in _BARS:
        ratios = [_ratio(run["c"], figure, rival) for run in patched]
        cells = [f"{one:.3f}{'' if one <= bar else ' **missed**'}" for one in ratios]
        lines.append(_row(title, f"{bar:g}", *cells))
        for run, one in zip(patched, ratios, strict=True):
            if one > bar:
                missed.append(f"{title}: {one:.3f} instead of {bar:g} ({_cpus(run)})")
    lines += ["", f"Missed: {'; '.join(missed) or 'none'}."]
    return "\n".join(lines).strip()


def _ratio(measured: dict[str, Any], figure: str, rival: str) -> float:
    """Return the tickle's figure over the rival's, the floor's, or the best rival's."""
    ways = measured["ways"]
    if rival == "":
        mine = ways[_TICKLE]["round_trip_ns"][figure]
        rivals = [way["round_trip_ns"][figure] for name, way in ways.items() if name != _TICKLE]
        theirs = min(rivals, key=statistics.median)
    else:
        mine = ways[_TICKLE][figure]
        theirs = measured["floor"][rival] if rival in measured["floor"] else ways[rival][figure]
    return float(statistics.median(one / other for one, other in zip(mine, theirs, strict=True)))


def _rivals(guests: list[dict[str, Any]]) -> str:
    """Give the figures of every way, on both kernels."""
    lines = []
    for run in guests:
        lines += [
            f"**{run['variant']} kernel, {_cpus(run)}** "
            f"(an empty system call, getppid: {rivals.figure(run['c']['floor']['getppid_ns'], 1)} ns; "
            f"FIOCLEX on the kqueue: {rivals.figure(run['c']['floor']['fioclex_ns'], 1)} ns in a row, "
            f"{rivals.figure(run['c']['floor']['fioclex_awake_ns'], 1)} ns one by one)\n",
            _row("", "awake, ns", "pending, ns", "asleep, ns", "one way p50, µs", "round trip p50, µs",
                 "p99, µs", "p99.9, µs", "calls", "descriptors", "lost"),
            _row("---", *["---:"] * 10),
        ]
        for name, way in run["c"]["ways"].items():
            costs = [rivals.figure(way[key], 1) for key in ("awake_ns", "pending_ns", "asleep_ns")]
            lines.append(
                _row(name, *costs, *rivals.delays(way), way["calls"], way["descriptors"], way["lost"])
            )
        lines.append("")
    return "\n".join(lines).strip()


def _python(guests: list[dict[str, Any]]) -> str:
    """Give what pykq.bench measured."""
    lines = []
    for run in guests:
        lines += [
            f"**{run['variant']} kernel, {_cpus(run)}**\n",
            _row("", *rivals.PYTHON),
            _row("---", *["---:"] * len(rivals.PYTHON)),
        ]
        for name, way in run["python"]["results"].items():
            lines.append(_row(name, *rivals.python_cells(way)))
        lines.append("")
    return "\n".join(lines).strip()


def _driver(guests: list[dict[str, Any]]) -> str:
    """Compare the driver with what does the same without it."""
    lines = [
        _row("pykq : other", "at most", *(f"{run['variant']}, {_cpus(run)}" for run in guests)),
        _row(*["---"] * (2 + len(guests))),
    ]
    for pair in dict.fromkeys(pair for run in guests for pair in run["python"]["driver"]):
        every = [run["python"]["driver"].get(pair) for run in guests]
        bars = [one["at_most"] for one in every if one and "at_most" in one]
        lines.append(_row(f"`{pair}`", f"{bars[0]:g}" if bars else "", *map(_driver_cell, every)))
    return "\n".join(lines).strip()


def _driver_cell(numbers: dict[str, float] | None) -> str:
    """Give a ratio, and say when it is higher than it is to be."""
    if numbers is None:
        return ""
    missed = numbers["ratio"] > numbers.get("at_most", numbers["ratio"])
    return f"{numbers['ratio']:.2f}{' **missed**' if missed else ''}"


def _busy(runs: list[dict[str, Any]]) -> str:
    """Answer the objection of 2007."""
    lines = []
    for run in runs:
        lines += [
            f"**{run['variant']} kernel, {_where(run)}**\n",
            _row("", "note p50", "p99", "own event p50", "p99"),
            _row("---", *["---:"] * 4),
        ]
        for name, way in run["c"]["ways"].items():
            cells = [rivals.behind(way, what, one) for what in ("note", "event") for one in ("p50", "p99")]
            lines.append(_row(name, *(cell or "none" for cell in cells)))
        lines.append("")
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
            came = f"{one['tickles']:,} tickles, none lost, {one['rounds']:,} accounted for one by one"
            also = {"timeouts_raced": "timeouts raced", "signals": "signals", "forks": "forks",
                    "waits_closed": "waits ended by close"}
            came += "".join(f"; {one[key]:,} {words}" for key, words in also.items() if one.get(key))
        elif one["program"] == "fuzz":
            pools = {"file": "files", one["pool_of_kqueues"]: f"{one['pool_of_kqueues']} (kqueues)"}
            kept = ", ".join(f"{words} {one['kept'][name]:+}" for name, words in pools.items())
            came = f"{one['inputs']:,} inputs, no panic, no call hung; objects out at the end: {kept}"
        elif one["program"] == "libFuzzer":
            came = f"{one['inputs']:,} inputs, {one['edges_covered']} edges covered, nothing found"
        else:
            came = f"{one['tests'] - one['skipped']} passed, {one['skipped']} skipped"
        where = " ".join(str(one[key]) for key in ("where", "netbsd", "accelerator", "variant") if key in one)
        what = one.get("program", one.get("what", ""))
        lines.append(_row(where, one.get("cpus", ""), what, came, one["seconds"]))
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
        *(f"* {regress.told(one)}" for one in differences),
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


def _same(values: Iterable[object]) -> str:
    """Return what all runs have; where they differ, each."""
    return ", ".join(str(value) for value in dict.fromkeys(values))


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
