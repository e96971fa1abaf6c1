"""What the user chose: command line, then PYKQ_* variables, then one TOML file.

The file is config.toml in the user's configuration folder for pykq (on Linux
~/.config/pykq), or the file that PYKQ_CONFIG names.  All of it is optional:

    release = "11.0"                    # or 10.1, 9.4, ..., current: taken from a mirror
    mirror = "https://cdn.NetBSD.org/pub"  # or a folder laid out like it
    source = "/usr/src"                 # a NetBSD source tree, in place of the release's
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
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from .log import Failure

_PATHS = ("source", "sets", "python", "cache")
_TOOLCHAINS = ("clang", "gcc")

# The newest stable release: taken where neither a source nor a release is named.
NEWEST = "11.0"

_RELEASE = re.compile(r"\d+(\.\d+){1,2}(_\w+)?|current")

# What a release brings.
RELEASE_PARTS = ("source", "sets", "python")


@dataclass(frozen=True)
class Settings:
    """The user's choices; a path is absolute, None is 'not chosen'.

    release is '' where a source is named and no release.  Then, and for each
    of source, sets and python that is named, nothing is taken from a mirror.
    """

    release: str = ""
    mirror: str | None = None  # an URL or a folder
    source: Path | None = None
    sets: Path | None = None
    python: Path | None = None
    toolchain: str = "clang"
    kernel_config: str = "PYKQ"
    cache: Path = field(default_factory=lambda: _own(platformdirs.user_cache_path))
    build: dict[str, Any] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Return the variables with which another process that reads the same file makes the same choices."""
        chosen = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "build"}
        return {f"PYKQ_{name.upper()}": str(value) for name, value in chosen.items() if value}

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
    return Path(os.environ.get("PYKQ_CONFIG") or _own(platformdirs.user_config_path) / "config.toml")


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
    environment = {name: os.environ.get(f"PYKQ_{name.upper()}") for name in names - {"build"}}
    for layer in (environment, command_line):
        if layer.get("release"):  # it brings what lower layers name
            chosen = {name: value for name, value in chosen.items() if name not in RELEASE_PARTS}
        chosen.update({name: value for name, value in layer.items() if value})
    if "source" not in chosen:
        chosen.setdefault("release", NEWEST)
    for name in names - {"build"}:
        if not isinstance(chosen.get(name, ""), str):
            raise Failure(f"{path}: {name} is not a string", hint="write it in quotes")
    for name in _PATHS:
        if name in chosen:
            chosen[name] = Path(os.path.expanduser(chosen[name])).absolute()
    if "release" in chosen and _RELEASE.fullmatch(chosen["release"]) is None:
        hint = f"such as {NEWEST}, 10.1, 9.4 or current"
        raise Failure(f"{chosen['release']!r} is not the name of a release", hint=hint)
    mirror = chosen.get("mirror", "")
    if "://" not in mirror and mirror:
        chosen["mirror"] = str(Path(os.path.expanduser(mirror)).absolute())
    elif mirror and not mirror.startswith(("http://", "https://")):
        raise Failure(f"no mirror {mirror!r}", hint="an URL of http or https, or a folder")
    if chosen.get("toolchain", "clang") not in _TOOLCHAINS:
        raise Failure(f"no toolchain {chosen['toolchain']!r}", hint="clang or gcc")
    if not isinstance(chosen.get("build", {}), dict):
        raise Failure(f"{path}: build is not a table", hint='write [build], then NAME = "value" lines')
    return Settings(**chosen)


def _own(place: Callable[[str], Path]) -> Path:
    """Return the user's folder of a kind; raise Failure for a user who has no home."""
    try:
        path = place("pykq")
    except RuntimeError:
        path = Path()
    if not path.is_absolute():
        raise Failure("there is no home folder", hint="set HOME, or PYKQ_CACHE and PYKQ_CONFIG")
    return path
