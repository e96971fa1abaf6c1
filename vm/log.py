"""What a person reads: steps with their times, failures with their remedies, and a file of all of it."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

# What is printed is text: [bold] and :x: in a guest's or a compiler's words are no markup and no emoji.
_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}

console = Console(**_PLAIN)
logger = logging.getLogger("pykq")
logger.addHandler(logging.NullHandler())
_timings = logger.getChild("timings")

_PROGRESS_EVERY_S = 30.0

# ECMA-48 control sequences, operating system commands, and every other C0 or C1
# control but tab and newline: a guest's console or a compiler is not trusted to
# write to the user's terminal.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def printable(text: str) -> str:
    """Return text without control characters, tabs and newlines excepted."""
    return _CONTROLS.sub("", text)


class Failure(Exception):
    """Something a user can put right: what happened, and the remedy.

    Exit statuses, one for each kind of end: 1 bad input or something missing,
    2 a build failed, 3 the guest died or never answered, 4 tests failed,
    130 interrupted.
    """

    status = 1

    def __init__(self, message: str, *, hint: str = "", tail: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.tail = tail


class BuildFailed(Failure):
    """A program of the build ended with an error."""

    status = 2


class GuestDied(Failure):
    """QEMU ended, the guest's kernel panicked, or the guest did not answer in time."""

    status = 3


class TestsFailed(Failure):
    """The tests ran to their end, and some failed."""

    status = 4


class _File(logging.StreamHandler[TextIO]):
    """A log file that is given up, and not complained of, where it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Keep all that is said, and all that programs print, in a file, each line with its time and our process.

    What a command before has left there goes; one that is still at work and this one share the file.
    A file that cannot be written is no error here: whoever needs the folder will say so.
    """
    logger.setLevel(logging.INFO)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", errors="backslashreplace")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
        fcntl.flock(file, fcntl.LOCK_SH)  # for as long as it is open
    except OSError:
        yield
        return
    handler = _File(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):
            file.close()


def say(text: str) -> None:
    """Print one plain line."""
    logger.info("%s", text)
    console.print(printable(text))


def show(table: Table) -> None:
    """Print a table."""
    text = io.StringIO()
    Console(file=text, width=200, markup=False, emoji=False).print(table)
    lines = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
    logger.info("%s", lines)
    console.print(printable(lines))


def report(failure: Failure, log: Path | None = None) -> None:
    """Print a failure to standard error: last lines of output, what happened, the remedy, and the log."""
    err = Console(stderr=True, **_PLAIN)
    if failure.tail:
        err.print(printable(failure.tail), style="dim")
    line = f"pykq: {failure}"
    if failure.hint:
        line += f" ({failure.hint})"
    if log is not None:
        line += f"; all output is in {log}"
    logger.error("%s", line)
    err.print(printable(line), style="bold red")


class Step:
    """A piece of work that is under way; update() says how far it is."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.note = ""
        self.seconds = 0.0
        self._began = self._shown = time.monotonic()
        self._status = console.status(Text(printable(title))) if console.is_terminal else None

    def update(self, progress: str) -> None:
        """Show progress, such as '412 of 754 objects'; without a terminal as a line now and then."""
        now = time.monotonic()
        text = f"{self.title}: {progress}, {now - self._began:.0f} s"
        if self._status is not None:
            self._status.update(Text(printable(text)))
        elif now - self._shown >= _PROGRESS_EVERY_S:
            self._shown = now
            say(text)

    def _start(self) -> None:
        if self._status is not None:
            self._status.start()
        else:
            say(f"{self.title} ...")

    def _stop(self, outcome: str) -> None:
        self.seconds = time.monotonic() - self._began
        if self._status is not None:
            self._status.stop()
        note = f" ({self.note})" if self.note else ""
        say(f"{self.title}: {outcome}{note}, {self.seconds:.1f} s")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Measure a piece of work for --timings."""
    began = time.monotonic()
    try:
        yield
    finally:
        ended = time.monotonic()
        _timings.info("%s took %.2f s", what, ended - began, extra={"timing": (what, began, ended)})


class _Measured(logging.Handler):
    """Takes what timed() measures: what, its beginning and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one."""
        self.rows.append(record.__dict__["timing"])


@contextmanager
def timings(path: Path) -> Iterator[None]:
    """At the end, show where the seconds went, all that is a step() or timed(), and keep it as JSON."""
    measured, began = _Measured(), time.monotonic()
    _timings.addHandler(measured)
    try:
        yield
    finally:
        _timings.removeHandler(measured)
        table, rows = Table("began", "seconds", "what", box=None), []
        everything = ("in all", began, time.monotonic())
        for what, start, end in sorted([everything, *measured.rows], key=itemgetter(1)):
            rows.append({"what": what, "began_s": round(start - began, 3), "seconds": round(end - start, 3)})
            table.add_row(f"{start - began:.2f}", f"{end - start:.2f}", what)
        show(table)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1))


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Name a piece of work when it begins, and say how it ended and how long it took."""
    work = Step(title)
    work._start()
    try:
        with timed(title):
            yield work
    except KeyboardInterrupt:
        work._stop("interrupted")
        raise
    except BaseException:
        work._stop("failed")
        raise
    work._stop("done")


def tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a text file, '' when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 200 * lines))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
