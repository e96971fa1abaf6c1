"""The ports of the patch, and which of them fits a source tree."""

from __future__ import annotations

import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .log import Failure, say
from .run import need
from .source import Source

PATCHES = Path(__file__).resolve().parent.parent / "patches"


@dataclass(frozen=True)
class Port:
    """One port: path is the patch, files are what it changes, from the top of a source tree."""

    path: Path
    title: str
    revisions: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The port's file below patches/."""
        return str(self.path.relative_to(PATCHES))


@dataclass(frozen=True)
class Fit:
    """A port that fits a source: the changed files with and without it, by name."""

    port: Port
    patched: dict[str, bytes]
    stock: dict[str, bytes]
    already: bool  # the source has the patch

    def texts(self, variant: str) -> dict[str, bytes]:
        """Return the files as the stock or the patched variant has them."""
        return self.patched if variant == "patched" else self.stock


class NoFit(Exception):
    """A port does not apply; the argument has the hunks that do not."""

    @property
    def summary(self) -> str:
        """The hunks that do not apply, by file and by line in the tree that the port was made from."""
        hunks: dict[str, list[str]] = {}
        for file, line in re.findall(r"^(?:--- (\S+)|@@ -(\d+))", str(self), re.MULTILINE):
            if file:
                lines = hunks.setdefault(file, [])
            else:
                lines.append(line)
        return "no place for the hunks of " + ", of ".join(
            f"{file} at {', '.join(lines)}" for file, lines in hunks.items()
        )


def ports() -> list[Port]:
    """Read patches/series.toml."""
    entries = tomllib.loads((PATCHES / "series.toml").read_text())["port"]
    found = []
    for entry in entries:
        path = PATCHES / entry["file"]
        files = tuple(re.findall(r"^\+\+\+ b/(\S+)", path.read_text(), re.MULTILINE))
        found.append(Port(path, entry["title"], tuple(entry["revisions"]), files))
    return found


def fit(source: Source) -> Fit:
    """Find the port for a source by trying each on copies of the files it changes.

    The source is only read.  Raises Failure, with the hunks that do not apply
    to the nearest port, when none fits.
    """
    rejects: list[tuple[Port, str]] = []
    for port, outcome in _attempts(source):
        if isinstance(outcome, Fit):
            return outcome
        rejects.append((port, str(outcome)))
    nearest, account = min(rejects, key=lambda reject: reject[1].count("\n@@ "))
    raise Failure(
        f"no port fits {source} in {source.top}; the nearest is {nearest.name}",
        hint="patches/README.md says how to make a port",
        tail=account,
    )


def show(source: Source) -> None:
    """Print which ports fit a source and where the others do not; raise Failure when none fits."""
    say(f"{source} in {source.top}")
    for port, outcome in _attempts(source):
        if isinstance(outcome, Fit):
            already = "; the source has it already" if outcome.already else ""
            say(f"fits: {port.name}, {port.title}{already}")
        else:
            say(f"does not fit: {port.name}, {port.title}: {outcome.summary}")
    fit(source)


def _attempts(source: Source) -> Iterator[tuple[Port, Fit | NoFit]]:
    """Try one port after the other."""
    for port in ports():
        try:
            texts = {name: (source.top / name).read_bytes() for name in port.files}
        except OSError as error:
            raise Failure(f"{error.filename}: {error.strerror}", hint="is the tree complete?") from error
        already = any(b"KQUEUE_TICKLE" in text for text in texts.values())
        try:
            other = apply(port.path.read_text(), texts, reverse=already)
        except NoFit as error:
            yield port, error
        else:
            yield port, Fit(port, texts, other, True) if already else Fit(port, other, texts, False)


def apply(patch: str, texts: dict[str, bytes], *, reverse: bool = False) -> dict[str, bytes]:
    """Return the texts with a patch applied without fuzz; raise NoFit when it does not apply."""
    need("patch")
    with tempfile.TemporaryDirectory(prefix="pykq-") as folder:
        for name, text in texts.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        command = ["patch", "-p1", "-F0", "-u", "-f", "--no-backup-if-mismatch"]
        command += ["-r", "rejects"]
        command += ["-R"] if reverse else []
        done = subprocess.run(
            command, input=patch, cwd=folder, capture_output=True, text=True, errors="replace"
        )
        if done.returncode != 0:
            rejects = Path(folder, "rejects")
            raise NoFit(rejects.read_text(errors="replace") if rejects.exists() else done.stderr)
        return {name: Path(folder, name).read_bytes() for name in texts}
