"""Binary packages: what pkg_summary(5) lists, and which of it a package needs, by pkg_install's rules."""

from __future__ import annotations

import bz2
import fnmatch
import functools
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest

from .log import Failure

_LIST_BYTES = 1 << 28  # no list of packages is larger, unpacked
_PATTERN, _BRACES = 500, 3  # no pattern of DEPENDS is longer or has more, and each may multiply the work
_ALGORITHMS = ("md5", "sha1", "sha256", "sha384", "sha512")

# A version is a list of numbers; words count as these (pkg_install, lib/dewey.c).
_WORDS = {"alpha": -3, "beta": -2, "pre": -1, "rc": -1, "pl": 0, "_": 0, ".": 0}
_COMPONENT = re.compile(
    r"(?P<number>\d{1,18})|(?P<word>alpha|beta|pre|rc|pl|_|\.)|nb(?P<nb>\d{0,18})|(?P<letter>[a-z])|."
)

# PATTERN>=VERSION, PATTERN<VERSION, or the first followed by the second.
_RELATION = re.compile(r"(?P<base>[^<>]+)(?P<bounds>(?:[<>]=?[^<>]*)+)")
_BOUND = re.compile(r"([<>]=?)([^<>]*)")


@dataclass(frozen=True)
class Package:
    """One package of a repository; name is base and version, 'libffi-3.4.6'."""

    name: str
    file: str
    size: int  # bytes, 0 where the list does not say
    cksum: str | None  # "sha1:" and the digits, or another's of _ALGORITHMS; NetBSD's own lists have none
    depends: tuple[str, ...]

    @property
    def base(self) -> str:
        """The name without the version."""
        return self.name.rpartition("-")[0]

    @property
    def version(self) -> str:
        """What follows the last hyphen of the name."""
        return self.name.rpartition("-")[2]


def parse(summary: bytes) -> list[Package]:
    """Read a pkg_summary.gz; raise ValueError when it is none."""
    text = _unpacked(gzip.open, summary).decode("utf-8", "replace")
    found = []
    for record in text.split("\n\n"):
        fields: dict[str, list[str]] = {}
        for line in record.splitlines():
            name, _, value = line.partition("=")
            fields.setdefault(name, []).append(value)
        if "PKGNAME" not in fields:
            continue
        name = fields["PKGNAME"][0]
        file = fields.get("FILE_NAME", [f"{name}.tgz"])[0]
        if not re.fullmatch(r"[A-Za-z0-9][\w.+~-]*", file):
            raise ValueError(f"a package file is called {file!r}")
        size = int(fields.get("FILE_SIZE", ["0"])[0])
        algorithm, _, digits = fields.get("FILE_CKSUM", [""])[0].lower().partition(" ")
        cksum = f"{algorithm}:{digits}" if algorithm in _ALGORITHMS else None
        found.append(Package(name, file, size, cksum, tuple(fields.get("DEPENDS", []))))
    return found


def sums(packed: bytes) -> bytes:
    """Read a SHA512.bz2, pbulk's list of all files of a repository; raise ValueError when it is none."""
    return _unpacked(bz2.open, packed)


def compare(left: str, right: str) -> int:
    """Order two versions: negative when left is older, 0 when they are equal."""
    (one, one_nb), (two, two_nb) = _components(left), _components(right)
    for a, b in zip_longest(one, two, fillvalue=0):
        if a != b:
            return a - b
    return one_nb - two_nb


def matches(pattern: str, name: str) -> bool:
    """Tell whether a package fits a pattern of DEPENDS: {a,b}, base>=1.0<2, a glob, or a plain name."""
    if len(pattern) > _PATTERN or pattern.count("{") > _BRACES:
        raise Failure(f"the pattern {pattern[:60]}... is none of pkgsrc's", hint="try another --mirror")
    if "{" in pattern:
        return any(matches(one, name) for one in _alternatives(pattern))
    relation = _RELATION.fullmatch(pattern)
    if relation is not None:
        base, _, version = name.rpartition("-")
        bounds = _BOUND.findall(relation["bounds"])
        return base == relation["base"] and all(_holds(version, *bound) for bound in bounds)
    return any(fnmatch.fnmatchcase(name, glob) for glob in (pattern, f"{pattern}-[0-9]*"))


def best(packages: Iterable[Package], pattern: str) -> Package | None:
    """Return the newest package that fits a pattern."""
    fitting = [package for package in packages if matches(pattern, package.name)]
    key = functools.cmp_to_key(compare)
    return max(fitting, key=lambda package: key(package.version), default=None)


def closure(packages: list[Package], wanted: Package) -> list[Package]:
    """Return a package and all that it needs; raise Failure when something is not there."""
    chosen = [wanted]
    for package in chosen:
        for pattern in package.depends:
            if any(matches(pattern, other.name) for other in chosen):
                continue
            found = best(packages, pattern)
            if found is None:
                raise Failure(
                    f"{package.name} needs {pattern}, which the package repository does not have",
                    hint="try another --mirror, or name a Python with --python",
                )
            chosen.append(found)
    return chosen


def _unpacked(opener: Callable[[io.BytesIO], io.BufferedIOBase], packed: bytes) -> bytes:
    """Return the content of a compressed list; raise ValueError for what is none, or has no end."""
    try:
        with opener(io.BytesIO(packed)) as file:
            content = file.read(_LIST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"not a compressed list ({error})") from error
    if len(content) > _LIST_BYTES:
        raise ValueError(f"it unpacks to more than {_LIST_BYTES >> 20} MiB")
    return content


def _components(version: str) -> tuple[list[int], int]:
    """Split a version into its numbers and its package revision, the one after nb."""
    numbers: list[int] = []
    revision = 0
    for part in _COMPONENT.finditer(version.lower()):
        if part["number"]:
            numbers.append(int(part["number"]))
        elif part["word"]:
            numbers.append(_WORDS[part["word"]])
        elif part["nb"] is not None:
            revision = int(part["nb"] or 0)
        elif part["letter"]:
            numbers += [0, ord(part["letter"]) - ord("a") + 1]
    return numbers, revision


def _holds(version: str, operator: str, bound: str) -> bool:
    order = compare(version, bound)
    return {"<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0}[operator]


def _alternatives(pattern: str) -> list[str]:
    """Expand the first braces of a pattern, which may hold others."""
    start = pattern.index("{")
    depth, begin, choices = 0, start + 1, []
    for place in range(start, len(pattern)):
        char = pattern[place]
        depth += (char == "{") - (char == "}")
        if depth == 0 or (depth == 1 and char == ","):
            choices.append(pattern[begin:place])
            begin = place + 1
        if depth == 0:
            return [pattern[:start] + choice + pattern[begin:] for choice in choices]
    raise Failure(f"the pattern {pattern} has an open brace", hint="try another --mirror")
