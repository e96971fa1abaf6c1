"""The patch as NetBSD would commit it, the letter to tech-kern, and the manual page of a guest."""

from __future__ import annotations

import re
import statistics
import subprocess
from datetime import date
from email.utils import formatdate
from pathlib import Path
from string import Template
from typing import Any

from .cache import read_json, write_whole
from .log import Failure, say
from .patches import PATCHES, apply, ports
from .run import need

REVISION = "1.150"  # of kern_event.c, that the patch is for
PAGE = "lib/libc/sys/kqueue.2"
TEST = "tests/kernel/kqueue/t_tickle.c"
FIGURES = PATCHES.parent / "tests" / "results" / "bench.json"

PARTS = PATCHES / "upstream"
_LIST = "tech-kern@NetBSD.org"

# The columns of the letter's table, and where a way's figures are.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "calls": ("calls",),
    "fds": ("descriptors",),
    "awake": ("awake_ns",),
    "asleep": ("asleep_ns",),
    "p50": ("round_trip_ns", "p50"),
    "p99": ("round_trip_ns", "p99"),
    "note": ("behind_note_ns", "p50"),
    "event": ("behind_event_ns", "p50"),
    "lost": ("lost",),
}


def write(folder: Path) -> None:
    """Write two mails for git send-email into a folder: the letter, and the patch.

    The letter is left out, with a line that says so, while there are no
    figures for it.  Raises Failure when git does not know whom they are from.
    """
    subject, message = (PARTS / "commit.txt").read_text().split("\n", 1)
    changes = (PARTS / "changes.txt").read_text()
    notes = f"---\nFor doc/CHANGES, in a commit of its own:\n\n{changes}\n"
    mails = {"0001-kqueue-tickle.patch": f"{_head(f'[PATCH 1/1] {subject}')}{message}{notes}{diff()}"}
    figures = read_json(FIGURES)
    if _guests(figures):
        mails["0000-cover-letter.patch"] = _head(f"[PATCH 0/1] {subject}") + "\n" + letter(figures)
    else:
        say(f"the letter is left out: no guest was measured in {FIGURES} (invoke bench --full)")
    for name, mail in sorted(mails.items()):
        write_whole(folder / name, mail)
        say(f"wrote {folder / name}")


def diff() -> str:
    """Return the patch: the port, the manual page, the test and where NetBSD lists it."""
    port = next(port for port in ports() if REVISION in port.revisions)
    test = (PARTS / "t_tickle.c").read_text().replace("@NetBSD@", "$" + "NetBSD$").splitlines(keepends=True)
    today = date.today()
    return "".join([
        port.path.read_text(),
        (PARTS / "kqueue.2.patch").read_text().replace("@DATE@", f"{today:%B} {today.day}, {today.year}"),
        (PARTS / "tests.patch").read_text(),
        f"--- /dev/null\n+++ b/{TEST}\n@@ -0,0 +1,{len(test)} @@\n",
        *(f"+{line}" for line in test),
    ])


def letter(figures: dict[str, Any]) -> str:
    """Return the letter with the figures of what tests/c/rivals.c measured in a patched guest."""
    run = min(_guests(figures), key=lambda run: abs(run["cpus"] - 2))
    machine = {"qemu": "?", "cpu": "?", "date": "?"} | figures.get("machine", {})
    rows = [["", *_COLUMNS]]
    for name, way in run["c"]["ways"].items():
        rows.append([name, *(_figure(way, path) for path in _COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return Template((PARTS / "letter.txt").read_text()).substitute(
        how=f"NetBSD {run['netbsd']}, {run['where']}, {run['cpus']} CPUs, QEMU {machine['qemu']}\n"
        f"on {machine['cpu']}, {machine['date']}",
        rounds=run["c"]["rounds"],
        table="\n".join(
            f"  {row[0]:<{widths[0]}}"
            + "".join(f" {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ),
    )


def _guests(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs on a whole NetBSD that has the patch."""
    runs = figures.get("runs", [])
    return [run for run in runs if run["variant"] == "patched" and run["where"] != "rump kernel"]


def _figure(way: Any, path: tuple[str, ...]) -> str:
    """Return a figure of a way of waking, the median where there is one for each round; - for none."""
    for name in path:
        way = way.get(name) if isinstance(way, dict) else None
    if way is None or way == []:
        return "-"
    return f"{statistics.median(way) if isinstance(way, list) else way:.0f}"


def manual_page(page: str) -> str:
    """Return a release's kqueue(2) with KQUEUE_TICKLE; raise NoFit when the text has no place for it.

    The patch is for the newest page; an older one has another date, and ends on another line.
    """
    own = re.search(r"^\.Dd (.*)$", page, re.MULTILINE)
    if own is None or "KQUEUE_TICKLE" in page:
        return page
    patch = (PARTS / "kqueue.2.patch").read_text().replace("@DATE@", own[1])
    patch = re.sub(r"^-\.Dd .*$", lambda _: f"-{own[0]}", patch, flags=re.MULTILINE)
    patch = patch.replace("\n .Nx 10.0 .\n", f"\n {page.splitlines()[-1]}\n")
    return apply(patch, {PAGE: page.encode()})[PAGE].decode()


def _head(subject: str) -> str:
    """Return the first lines of a mail from the user."""
    need("git")
    done = subprocess.run(["git", "var", "GIT_AUTHOR_IDENT"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failure("git does not know whom the mails are from", hint="git config user.name, user.email")
    sender = done.stdout.rsplit(" ", 2)[0]
    return f"From: {sender}\nDate: {formatdate()}\nTo: {_LIST}\nSubject: {subject}\n"
