"""The ports of the patch, and which of them fits a source tree."""

from __future__ import annotations

import re
import subprocess
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .log import Failure
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
    need("patch")
    rejects: list[tuple[Port, str]] = []
    for port in ports():
        try:
            texts = {name: (source.top / name).read_bytes() for name in port.files}
        except OSError as error:
            raise Failure(f"{error.filename}: {error.strerror}", hint="is the tree complete?") from error
        if any(b"KQUEUE_TICKLE" in text for text in texts.values()):
            try:
                return Fit(port, texts, _apply(port, texts, reverse=True), already=True)
            except NoFit as error:
                rejects.append((port, str(error)))
                continue
        try:
            return Fit(port, _apply(port, texts), texts, already=False)
        except NoFit as error:
            rejects.append((port, str(error)))
    nearest, account = min(rejects, key=lambda reject: reject[1].count("\n@@ "))
    raise Failure(
        f"no port fits {source} in {source.top}; the nearest is {nearest.name}",
        hint="patches/README.md says how to make a port",
        tail=account,
    )


def _apply(port: Port, texts: dict[str, bytes], *, reverse: bool = False) -> dict[str, bytes]:
    """Return the texts with a port applied without fuzz; raise NoFit when it does not apply."""
    with tempfile.TemporaryDirectory(prefix="pykq-") as folder:
        for name, text in texts.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        command = ["patch", "-p1", "-F0", "-u", "-f", "--no-backup-if-mismatch"]
        command += ["-r", "rejects"]
        command += ["-i", str(port.path)]
        command += ["-R"] if reverse else []
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            rejects = Path(folder, "rejects")
            hunks = rejects.read_text(errors="replace") if rejects.exists() else done.stderr
            raise NoFit(f"{port.name} does not apply here:\n{hunks}")
        return {name: Path(folder, name).read_bytes() for name in texts}
