"""A NetBSD release: from a mirror, or a folder laid out like one, to a source tree, sets and a Python."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from . import image, pkgsrc, programs
from .archive import unpack
from .build import MACHINE
from .cache import locked, read_json, whole_folder, write_whole
from .config import NEWEST, RELEASE_PARTS, Settings
from .log import Failure, Step, say, step
from .mirror import WAYS_ON, Mirrors, Missing, is_url
from .signature import SIGNER, is_known, verified

Parsed = TypeVar("Parsed")

# Where NetBSD is to be had, in the order in which it is tried.  Below each
# place the layout is that of release(7).  A mirror that the user names holds
# the same three folders.
_PLACES = {
    "NetBSD": (
        "https://cdn.NetBSD.org/pub/NetBSD",
        "https://nycdn.NetBSD.org/pub/NetBSD",
        "https://ftp.NetBSD.org/pub/NetBSD",
        "https://archive.NetBSD.org/pub/NetBSD-archive",
    ),
    "NetBSD-daily": (
        "https://nycdn.NetBSD.org/pub/NetBSD-daily",
        "https://ftp.NetBSD.org/pub/NetBSD-daily",
    ),
    "pkgsrc": (
        "https://cdn.NetBSD.org/pub/pkgsrc",
        "https://ftp.NetBSD.org/pub/pkgsrc",
    ),
}
_SOURCE_SETS = "source/sets"
_BINARY_SETS = f"{MACHINE}/binary/sets"
_SETS = tuple(dict.fromkeys((*image.SETS, *programs.SETS)))
_PACKAGES = f"packages/NetBSD/{MACHINE}"

# The signer's key: never from a mirror that it is to check.
_KEY = f"{_PLACES['NetBSD'][0]}/security/PGP/security-officer@netbsd.org.asc"

_DAYS = 4  # of daily builds, among which one is whole
_DATED = re.compile(r"\b(\d{12,14}Z)\b")

# Source sets, and large folders in them from which neither a kernel nor a rump
# kernel nor the host tools are built.
_SOURCES = ("syssrc", "src", "sharesrc")
_GCC = "gnusrc"
_UNUSED = (
    "crypto/",
    "distrib/",
    "external/apache2/llvm/",
    "external/bsd/bind/",
    "external/bsd/llvm/",
    "external/bsd/ntp/",
    "external/bsd/openldap/",
    "external/ibm-public/",
    "external/mpl/",
    "games/",
    "tests/",
)

# The driver runs on these and later ones.
_PYTHON = re.compile(r"python3(\d\d)")
_OLDEST_PYTHON = 11


@dataclass(frozen=True)
class Release:
    """One release, or the daily build that 'current' stands for, and what the cache has of it."""

    settings: Settings

    @property
    def name(self) -> str:
        """As the user names it: 11.0, 10.1, current."""
        return self.settings.release

    @property
    def folder(self) -> Path:
        """Where the cache keeps it."""
        return self.settings.cache / "release" / self.name

    def has(self, part: str) -> bool:
        """Tell whether the cache holds a part: source, sets or python."""
        held = self._held(part) if self.path(part).is_dir() else None
        return held is not None and (part != "source" or set(self.source_sets()) <= set(held))

    def path(self, part: str) -> Path:
        """Return the folder that holds a part, once it is there."""
        return self.folder / part

    def get(self, part: str) -> Path:
        """Return the folder that holds a part; take it from a mirror when it is not there."""
        if not self.has(part):
            getters: dict[str, Callable[[Step], Any]] = {
                "source": self._get_source,
                "sets": self._get_sets,
                "python": self._get_python,
            }
            with step(f"{part} of NetBSD {self.name}") as work:
                self._record(part, getters[part](work))
        return self.path(part)

    def reach(self) -> None:
        """Raise Failure when no mirror answers, or has the release."""
        mirrors, release = self._where
        mirrors.read(f"{release}/{_SOURCE_SETS}/SHA512")

    def source_sets(self) -> tuple[str, ...]:
        """The source sets that the toolchain needs, without their ending."""
        return (*_SOURCES, _GCC) if self.settings.toolchain == "gcc" else _SOURCES

    def _held(self, part: str) -> Any:
        """Return what _record wrote down of a part, None where there is nothing."""
        return read_json(self.folder / "manifest.json").get(part)

    def _record(self, part: str, content: Any) -> None:
        """Write down what the cache holds of a part; None: nothing any more."""
        held = read_json(self.folder / "manifest.json") | {part: content}
        write_whole(self.folder / "manifest.json", json.dumps(held, indent=1))

    def _mirrors(self, kind: str) -> Mirrors:
        """Return the places for a kind of files, a key of _PLACES."""
        roots = _PLACES[kind]
        if self.settings.mirror is not None:
            roots = (f"{self.settings.mirror.rstrip('/').removesuffix('/NetBSD')}/{kind}",)
        return Mirrors(roots, self.settings.cache / "pins.json")

    @cached_property
    def _where(self) -> tuple[Mirrors, str]:
        """The mirrors, and the folder on them that holds the release."""
        if self.name != "current":
            return self._mirrors("NetBSD"), f"NetBSD-{self.name}"
        mirrors, build = self._mirrors("NetBSD-daily"), self._held("build")
        if build is None or not _is_whole(mirrors, build):
            self._change_build(build, self._newest_build(mirrors))
        return mirrors, f"HEAD/{self._held('build')}"

    def _change_build(self, old: str | None, new: str) -> None:
        """Take another daily build; raise Failure when there are parts of the old one, which is gone."""
        parts = [part for part in ("source", "sets") if self._held(part)]
        for part in parts:  # they have to be of one build
            self._record(part, None)
        self._record("build", new)
        if parts:
            what = f"the daily build {old} is gone from the mirror, and {new} takes its place"
            raise Failure(f"NetBSD {self.name}: {what}", hint="run the same command again")

    def _newest_build(self, mirrors: Mirrors) -> str:
        """Return the folder of the newest daily build that is whole."""
        builds = sorted(set(_DATED.findall(mirrors.index("HEAD"))), reverse=True)
        for build in builds[:_DAYS]:
            if _is_whole(mirrors, build):
                return str(build)
        raise Failure(f"{mirrors.roots[0]}/HEAD has no whole daily build for {MACHINE}", hint=WAYS_ON)

    def _hashes(self, sets: str) -> dict[str, str]:
        """Return the SHA512 of each file in a folder of the release."""
        mirrors, release = self._where
        path = f"{release}/{sets}/SHA512"
        found = _sums(mirrors.read(path))
        if not found:
            raise Failure(f"{mirrors.roots[0]}/{path} lists no SHA512", hint=WAYS_ON)
        return found

    def _check(self, path: str, sha512: str) -> None:
        """Raise Failure when the list that NetBSD signs has no such SHA512 for a file of the release."""
        _, release = self._where
        if self._signed is not None and self._signed.get(f"{release}/{path}") != sha512:
            what = f"the mirror's SHA512 of {path} is not the one that {SIGNER} signed"
            raise Failure(f"NetBSD {self.name}: {what}", hint="do not use this mirror")

    @cached_property
    def _signed(self) -> dict[str, str] | None:
        """The SHA512 of each file by the list that NetBSD signs for the release; None: not to be checked."""
        mirrors, release = self._where
        path = f"security/hashes/{release}_hashes.asc"
        lists = f"the SHA512 lists of NetBSD {self.name}: signature not checked"
        if self.name == "current":
            say(f"{lists} (daily builds are not signed)")
            return None
        if not is_known():
            say(f"{lists} (gpg --fetch-keys {_KEY})")
            return None
        try:
            content = mirrors.read(path)
        except Missing as error:
            self._say_unchecked(f"{lists} ({error})")
            return None
        return _sums(verified(content, f"{mirrors.roots[0]}/{path}"))

    def _say_unchecked(self, what: str) -> None:
        """Say what cannot be checked in a folder that the user named; for a web server raise Failure."""
        if self.settings.mirror is None or is_url(self.settings.mirror):
            raise Failure(what, hint=WAYS_ON)
        say(what)

    def _get_source(self, work: Step) -> list[str]:
        """Bring the source sets that are missing into the source tree; return all that it then holds."""
        have = (self._held("source") or []) if self.path("source").is_dir() else []
        missing = [name for name in self.source_sets() if name not in have]
        archives = self._fetch(_SOURCE_SETS, missing, work)
        with whole_folder(self.path("source")) as part:
            if have:
                self._record("source", None)
                self.path("source").rename(part)
            unpack(archives, part, _in_source, work)
        shutil.rmtree(self.path("download"))
        return [*have, *missing]

    def _get_sets(self, work: Step) -> list[str]:
        """Bring the binary sets of a guest and of its programs; return their names."""
        return [path.name for path in self._fetch(_BINARY_SETS, _SETS, work)]

    def _fetch(self, sets: str, names: Sequence[str], work: Step) -> list[Path]:
        """Bring files of one folder of the release; their names are without the ending."""
        mirrors, release = self._where
        hashes = self._hashes(sets)
        found = []
        for name in names:
            file = next((f"{name}{end}" for end in image.ENDINGS if f"{name}{end}" in hashes), None)
            if file is None:
                raise Failure(f"{mirrors.roots[0]}/{release}/{sets} has no {name}", hint=WAYS_ON)
            self._check(f"{sets}/{file}", hashes[file])
            target = self.path("sets" if sets == _BINARY_SETS else "download")
            found.append(mirrors.fetch(f"{release}/{sets}/{file}", target, work, sha512=hashes[file]))
        return found

    def _get_python(self, work: Step) -> list[str]:
        """Bring the newest Python that the driver runs on, and what it needs; return the packages' names."""
        mirrors = self._mirrors("pkgsrc")
        version = NEWEST if self.name == "current" else self.name.partition("_")[0]
        place = f"{_PACKAGES}/{version}"
        where = f"{mirrors.roots[0]}/{place}/All"
        packages = _read(mirrors, f"{place}/All/pkg_summary.gz", pkgsrc.parse)
        pythons = [package for package in packages if _python_minor(package) >= _OLDEST_PYTHON]
        if not pythons:
            raise Failure(f"{where} has no python3{_OLDEST_PYTHON} or later", hint=WAYS_ON)
        needed = pkgsrc.closure(packages, max(pythons, key=_python_minor))
        shutil.rmtree(self.path("python"), ignore_errors=True)
        hashes = {} if all(package.cksum for package in needed) else _package_hashes(mirrors, place)
        for package in needed:
            sha512, size, cksum = hashes.get(f"All/{package.file}"), package.size, package.cksum
            if not (sha512 or cksum):
                self._say_unchecked(f"{where}/{package.file}: no checksum of it is listed")
            file = f"{place}/All/{package.file}"
            mirrors.fetch(file, self.path("python"), work, sha512=sha512, size=size, cksum=cksum)
        return [package.name for package in needed]


def resolve(settings: Settings, *parts: str) -> Settings:
    """Return the settings with each of parts (default: all) named: what the user chose, else the release's.

    Takes from a mirror what the cache does not have.  Without a release the
    settings are returned as they are.
    """
    wanted = [part for part in parts or RELEASE_PARTS if getattr(settings, part) is None]
    if not settings.release or not wanted:
        return settings
    release = Release(settings)
    with locked(release.folder):
        found: dict[str, Any] = {part: release.get(part) for part in wanted}
        return replace(settings, **found)


def show(settings: Settings) -> bool:
    """Print what build-kernel would take from a mirror first; return whether it is anything."""
    release = Release(settings)
    if settings.source is not None or release.has("source"):
        return False
    print(f"# not in the cache yet, from {settings.mirror or 'the official mirrors'}:")
    for name in release.source_sets():
        print(f"NetBSD {release.name}, {_SOURCE_SETS}/{name}")
    return True


def _in_source(name: str) -> str | None:
    """Return the name in the source tree of a member of a source set, None for what is not needed."""
    below = name.removeprefix("usr/src/")
    return None if below == name or below.startswith(_UNUSED) else below


def _python_minor(package: pkgsrc.Package) -> int:
    """Return 13 for python313, 0 for what is not a Python 3."""
    match = _PYTHON.fullmatch(package.base)
    return int(match[1]) if match else 0


def _is_whole(mirrors: Mirrors, build: str) -> bool:
    """Tell whether the mirror has the source and the binary sets of a daily build."""
    try:
        for sets in (_SOURCE_SETS, _BINARY_SETS):
            mirrors.read(f"HEAD/{build}/{sets}/SHA512")
    except Missing:
        return False
    return True


def _package_hashes(mirrors: Mirrors, place: str) -> dict[str, str]:
    """Return the SHA512 of each package of a repository, {} where it has no list of them."""
    try:
        return _sums(_read(mirrors, f"{place}/SHA512.bz2", pkgsrc.sums))
    except Missing:
        return {}


def _read(mirrors: Mirrors, path: str, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Read a small file of a mirror; a ValueError of parse becomes a Failure that names the file."""
    content = mirrors.read(path)
    try:
        return parse(content)
    except ValueError as error:
        raise Failure(f"{mirrors.roots[0]}/{path}: {error}", hint=WAYS_ON) from error


def _sums(text: bytes) -> dict[str, str]:
    """Read a list in cksum(1)'s format: the SHA512 of each file."""
    lines = re.findall(r"^SHA512 \((\S+)\) = ([0-9a-f]{128})$", text.decode("utf-8", "replace"), re.MULTILINE)
    return {name.removeprefix("./"): sha512 for name, sha512 in lines}
