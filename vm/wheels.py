"""pytest as it is installed here, for guests and other machines that have no network of their own."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .cache import digest

_WHEELS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
_LEXERS = ("__init__.", "_mapping.", "diff.", "python.")  # of pygments' 200, 7 MB, those that pytest loads


def folder() -> str:
    """Return where the image has these wheels, in these versions."""
    return f"usr/pkg/pykq-{digest([(name, metadata.version(name)) for name in _WHEELS])}"


def files() -> dict[str, Path]:
    """Return the files of the wheels that pytest consists of, by their names below site-packages."""
    found: dict[str, Path] = {}
    for name in _WHEELS:
        entries: Any = metadata.files(name) or ()
        for entry in entries:
            path = Path(entry.locate())
            if "lexers" in entry.parts and not entry.name.startswith(_LEXERS):
                continue
            if ".." not in entry.parts and path.exists() and goes(path):
                found[str(entry)] = path
    return found


def goes(path: Path) -> bool:
    """Tell bytecode that is not this Python's from other files.

    A guest whose Python makes the same bytecode takes this, and others do not look at it.
    """
    return "__pycache__" not in path.parts or str(sys.implementation.cache_tag) in path.name
