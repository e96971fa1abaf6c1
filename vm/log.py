"""What a person reads: steps with their times, and failures with their remedies."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=True)

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


def say(text: str) -> None:
    """Print one plain line."""
    console.print(escape(printable(text)))


def report(failure: Failure) -> None:
    """Print a failure to standard error: last lines of output, what happened, the remedy."""
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    if failure.tail:
        err.print(escape(printable(failure.tail)), style="dim")
    line = f"pykq: {failure}"
    if failure.hint:
        line += f" ({failure.hint})"
    err.print(escape(printable(line)), style="bold red")


class Step:
    """A piece of work that is under way; update() says how far it is."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.note = ""
        self.seconds = 0.0
        self._began = time.monotonic()
        self._status = console.status(escape(title)) if console.is_terminal else None

    def update(self, progress: str) -> None:
        """Show progress, such as '412 of 754 objects'; shown on a terminal only."""
        if self._status is not None:
            elapsed = time.monotonic() - self._began
            self._status.update(escape(f"{self.title}: {printable(progress)}, {elapsed:.0f} s"))

    def _start(self) -> None:
        if self._status is not None:
            self._status.start()
        else:
            say(f"{self.title} ...")
            sys.stdout.flush()

    def _stop(self, outcome: str) -> None:
        self.seconds = time.monotonic() - self._began
        if self._status is not None:
            self._status.stop()
        note = f" ({self.note})" if self.note else ""
        say(f"{self.title}: {outcome}{note}, {self.seconds:.1f} s")


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Name a piece of work when it begins, and say how it ended and how long it took."""
    work = Step(title)
    work._start()
    try:
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
