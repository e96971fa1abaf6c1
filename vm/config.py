"""What the user chose: command line, then PYKQ_* variables, then one TOML file.

The file is config.toml in the user's configuration folder for pykq (on Linux
~/.config/pykq), or the file that PYKQ_CONFIG names.  All of it is optional:

    source = "/usr/src"                 # a NetBSD source tree
    sets = "/usr/release/binary/sets"   # base.tgz, etc.tgz, ... or a DESTDIR with its METALOG
    python = "/usr/python.tgz"          # Python for the guest: rooted at usr/pkg
    toolchain = "clang"                 # or "gcc": NetBSD's own, built from the tree
    kernel_config = "PYKQ"              # or GENERIC, or a file
    cache = "/var/tmp/pykq"             # instead of the user's cache folder

    [build]                             # build.sh -V, for every source tree
    HOST_CFLAGS = "-O -fcommon -w"

    [build."7.99"]                      # and for versions that begin with 7.99
    NOGCCERROR = "yes"
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from .log import Failure

_PATHS = ("source", "sets", "python", "cache")
_TOOLCHAINS = ("clang", "gcc")


@dataclass(frozen=True)
class Settings:
    """The user's choices; a path is absolute, None is 'not chosen'."""

    source: Path | None = None
    sets: Path | None = None
    python: Path | None = None
    toolchain: str = "clang"
    kernel_config: str = "PYKQ"
    cache: Path = field(default_factory=lambda: platformdirs.user_cache_path("pykq"))
    build: dict[str, Any] = field(default_factory=dict)

    def variables(self, version: str) -> dict[str, str]:
        """Return the build.sh variables for a source of this version, such as '10.99.12'."""
        chosen: dict[str, str] = {}
        for name, value in self.build.items():
            if not isinstance(value, dict):
                chosen[name] = str(value)
        for prefix, table in self.build.items():
            if isinstance(table, dict) and f"{version}.".startswith(f"{prefix}."):
                chosen.update({name: str(value) for name, value in table.items()})
        return chosen


def config_file() -> Path:
    """Return the path of the configuration file, which need not be there."""
    return Path(os.environ.get("PYKQ_CONFIG") or platformdirs.user_config_path("pykq") / "config.toml")


def load(**command_line: str | None) -> Settings:
    """Merge command line, environment and file; raise Failure for what makes no sense."""
    names = {item.name for item in fields(Settings)}
    path = config_file()
    chosen: dict[str, Any] = {}
    try:
        chosen = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if "PYKQ_CONFIG" in os.environ:
            raise Failure(f"{path}: no such file", hint="PYKQ_CONFIG names it") from None
    except (OSError, ValueError) as error:
        raise Failure(f"{path}: {error}", hint="mend or remove the file") from error
    unknown = sorted(set(chosen) - names)
    if unknown:
        raise Failure(f"{path}: unknown key {unknown[0]!r}", hint=f"known: {', '.join(sorted(names))}")
    for name in names - {"build"}:
        value = command_line.get(name) or os.environ.get(f"PYKQ_{name.upper()}")
        if value:
            chosen[name] = value
    for name in _PATHS:
        if name in chosen:
            if not isinstance(chosen[name], str):
                raise Failure(f"{path}: {name} is not a string", hint="write a path in quotes")
            chosen[name] = Path(chosen[name]).expanduser().absolute()
    if chosen.get("toolchain", "clang") not in _TOOLCHAINS:
        raise Failure(f"no toolchain {chosen['toolchain']!r}", hint="clang or gcc")
    if not isinstance(chosen.get("build", {}), dict):
        raise Failure(f"{path}: build is not a table", hint='write [build], then NAME = "value" lines')
    return Settings(**chosen)
