"""Pictures of what bench measured, where matplotlib is installed (the optional extra "plot")."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SENDERS = (1, 2, 4, 8)
_WIDTH, _HEIGHT = 4.2, 3.6  # inches, of one kernel's picture


def draw(runs: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw round trips and throughput, a picture a kernel beside each other, as SVG and PNG.

    Stock kernels are left out.  Returns the files, none without matplotlib.
    """
    shown = [run for run in runs if run["variant"] == "patched"]
    try:
        import matplotlib
    except ImportError:
        return []
    if not shown:
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pykq"  # the same numbers make the same file
    from matplotlib import pyplot

    files = []
    for name, body in (("round_trip", _round_trips), ("throughput", _throughput)):
        figure, axes = pyplot.subplots(
            1, len(shown), figsize=(_WIDTH * len(shown), _HEIGHT), squeeze=False, sharey=True
        )
        for axis, run in zip(axes[0], shown, strict=True):
            body(axis, run)
            axis.set_title(f"{run['where']}, {run['cpus']} CPU{'s' if run['cpus'] > 1 else ''}", fontsize=10)
            axis.grid(alpha=0.3)
        axes[0][0].legend(fontsize=8)
        figure.tight_layout()
        for ending in ("svg", "png"):
            path = folder / f"{name}.{ending}"
            figure.savefig(path, dpi=100, metadata={"Date": None} if ending == "svg" else None)
            files.append(path)
        pyplot.close(figure)
    return files


def _round_trips(axis: Any, run: dict[str, Any]) -> None:
    """Draw which share of the round trips was faster than what."""
    from matplotlib.ticker import LogLocator

    for name, way in run["c"]["ways"].items():
        every = way["round_trip_ns"]["all"]
        times: dict[float, int] = dict(enumerate(every["percentiles"]))
        if "p999" in every:  # of few samples it says nothing
            times[99.9] = every["p999"]
        axis.plot([time / 1000 for time in times.values()], list(times), label=name)
    axis.set_xscale("log", subs=())
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("round trip, µs")
    axis.set_ylabel("% of round trips")


def _throughput(axis: Any, run: dict[str, Any]) -> None:
    """Draw sends in a second by the number of threads that send; dotted, what of them came as a wake-up."""
    for name, way in run["c"]["ways"].items():
        sent, received = (
            [statistics.median(way[f"{what}_{senders}"]) / 1e6 for senders in _SENDERS]
            for what in ("per_second", "received")
        )
        (line,) = axis.plot(_SENDERS, sent, marker="o", label=name)
        axis.plot(_SENDERS, received, marker=".", linestyle=":", color=line.get_color())
    axis.set_xscale("log", base=2)
    axis.set_xticks(_SENDERS, [str(senders) for senders in _SENDERS])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("threads that send")
    axis.set_ylabel("million a second: sent, and dotted received")
