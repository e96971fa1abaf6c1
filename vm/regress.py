"""What others wrote to test kqueue, on the stock and on the patched kernel, compared test by test."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

from fabric import Connection
from rich.table import Table

from . import guest, qemu
from .archive import inside, opened
from .build import VARIANTS, build_kernels
from .cache import write_whole
from .config import Settings
from .image import set_archives
from .log import Failure, TestsFailed, say, show, step
from .programs import compile_for_guest
from .release import resolve
from .rivals import compact, this_machine

# NetBSD's own, where the tests set has them; each is a program that runs one test case at a time.
_ATF = re.compile(r"usr/tests/(kernel/kqueue/.*|lib/libc/sys/t_kevent)")

# CPython's, as they came with the guest's Python; of test_asyncio what runs an event loop on a kqueue.
_CPYTHON = ("test_kqueue", "test_selectors", "test_asyncio.test_events", "test_asyncio.test_selector_events")

# libkqueue's, without the file about libkqueue itself.
_LIBKQUEUE_LINE = re.compile(r"^(\d+): (\w+)\(\)", re.MULTILINE)
_LIBKQUEUE_CLASSES = "kqueue socket write timer user vnode proc signal threading"
_LIBKQUEUE = "common kqueue main test threading read write timer user vnode proc signal"

# The scripts that run in the guest.
_HERE = guest.ROOT / "tests" / "regress"

_WITHIN_S = 1200

# Why a test may come out differently on the two kernels: suite, test, and the reason, for the page.  A
# difference that is not listed here fails the run.
EXPLAINED = {
    (
        "libkqueue",
        "socket:test_kevent_socket_lowat_read",
    ): "comes and goes on both kernels: TCP holds the second of two short segments back until the first is"
    " acknowledged, which may take the 200 ms that the test waits",
}

# What came of each test, by its name: "passed", "failed: why", "skipped: why".
Outcomes = dict[str, str]


def run(settings: Settings, libkqueue: Path | None) -> Path:
    """Run what there is on both kernels, print the differences; return the JSON file in the cache.

    NetBSD's own tests need the tests set, libkqueue's a folder of its source.
    Raises TestsFailed when a test came out differently on the two kernels, and
    EXPLAINED does not say why.
    """
    settings = resolve(settings)
    assert settings.sets is not None
    build_kernels(settings)
    atf = _atf_files(settings.sets)
    program = None if libkqueue is None else _build_libkqueue(settings, libkqueue)
    outcomes: dict[str, dict[str, Outcomes]] = {}
    for variant in VARIANTS:
        with (
            qemu.fresh(settings, f"regress-{variant}", variant) as machine,
            guest.connect(machine) as connection,
            guest.installed(connection) as folder,
        ):
            found = outcomes[variant] = {}
            # A process may open as many files as the system; a test that does is not alone.
            connection.run("sysctl -w kern.maxfiles=10000", hide=True)
            if atf:
                found["NetBSD"] = _atf(connection, folder, atf)
            for module in _CPYTHON:
                found[f"CPython {module}"] = _cpython(connection, folder, module)
            if program is not None:
                found["libkqueue"] = _libkqueue(connection, folder, program)
    path = settings.cache / "regress" / "regress.json"
    write_whole(path, compact({"machine": this_machine(), "netbsd": machine.netbsd, "outcomes": outcomes}))
    differences = compare(outcomes)
    _show(outcomes, differences)
    if not atf:
        say(f"NetBSD's own tests are left out: {settings.sets} has no tests set")
    if program is None:
        say("libkqueue's tests are left out: --libkqueue names a folder of its source")
    say(f"outcomes: {path}")
    unexplained = [one for one in differences if one[:2] not in EXPLAINED]
    if unexplained:
        raise TestsFailed(f"{len(unexplained)} tests came out differently on the two kernels, unexplained")
    return path


def compare(outcomes: dict[str, dict[str, Outcomes]]) -> list[tuple[str, str, str, str]]:
    """Return suite, test, and what came of it on the stock and on the patched kernel, where that differs."""
    found = []
    for suite, stock in outcomes["stock"].items():
        patched = outcomes["patched"][suite]
        for test in sorted({*stock, *patched}):
            pair = stock.get(test, "not run"), patched.get(test, "not run")
            if pair[0].partition(":")[0] != pair[1].partition(":")[0]:
                found.append((suite, test, *pair))
    return found


def told(difference: tuple[str, str, str, str]) -> str:
    """Say in a line what a test came to on both kernels, and why."""
    suite, test, stock, patched = difference
    reason = EXPLAINED.get((suite, test), "not explained")
    return f"{suite}, {test}: stock {stock}, patched {patched}; {reason}"


def tally(outcomes: Outcomes) -> str:
    """Count outcomes by their first word: "20 passed, 1 skipped"."""
    words = [outcome.partition(":")[0] for outcome in outcomes.values()]
    return ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))


def _show(outcomes: dict[str, dict[str, Outcomes]], differences: list[tuple[str, str, str, str]]) -> None:
    """Print what came of each suite, and the differences."""
    table = Table("suite", *VARIANTS, box=None)
    for suite in outcomes["stock"]:
        table.add_row(suite, *(tally(outcomes[variant][suite]) for variant in VARIANTS))
    show(table)
    for difference in differences:
        say(told(difference))


def _atf_files(sets: Path) -> bytes:
    """Return a tar archive of NetBSD's programs that test kqueue, nothing without a tests set."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as out:
        if (sets / "METALOG").is_file():
            for path in sorted((sets / "usr/tests").rglob("*")):
                name = str(path.relative_to(sets))
                if path.is_file() and _ATF.fullmatch(name):
                    out.add(path, name)
        else:
            try:
                (archive,) = set_archives(sets, ["tests"])
            except Failure:
                return b""
            with opened(archive) as tar:
                for member in tar:
                    if member.isfile() and _ATF.fullmatch(inside(member.name, archive)):
                        out.addfile(member, tar.extractfile(member))
        found = out.getmembers()
    return buffer.getvalue() if found else b""


def _atf(connection: Connection, folder: str, files: bytes) -> Outcomes:
    """Run NetBSD's tests."""
    with step("NetBSD's tests of kqueue"):
        guest.put(connection, files, f"{folder}/atf.tar")
        guest.put(connection, (_HERE / "atf.sh").read_bytes(), f"{folder}/atf.sh")
        command = f"cd {folder} && tar -xpf atf.tar && sh atf.sh"
        return _read(connection.run(command, hide=True, timeout=_WITHIN_S).stdout)


def _cpython(connection: Connection, folder: str, module: str) -> Outcomes:
    """Run one module of CPython's tests."""
    with step(f"CPython's {module}"):
        guest.put(connection, (_HERE / "cpython.py").read_bytes(), f"{folder}/cpython.py")
        command = f"{guest.python(folder)} cpython.py {module}"
        result = connection.run(command, hide=True, warn=True, timeout=_WITHIN_S)
        found = _read(result.stdout)
        if result.exited:
            found["the module as a whole"] = f"failed: {' '.join(result.stderr[-300:].split())}"
        return found


def _build_libkqueue(settings: Settings, source: Path) -> Path:
    """Compile libkqueue's test program for the kqueue of the guest's kernel; return it."""
    tests = source / "test"
    if not (tests / "kqueue.c").is_file():
        raise Failure(f"{source} has no test/kqueue.c", hint="--libkqueue names libkqueue's source")
    folder = settings.cache / "regress"
    write_whole(folder / "config.h", "#define WITH_NATIVE_KQUEUE_BUGS 0\n#define HAVE_ERR_H 1\n")
    program = folder / "libkqueue-test"
    words: list[str | Path] = ["-w", f"-I{folder}", f"-I{tests}", "-include", _HERE / "since.h"]
    words += [tests / f"{name}.c" for name in _LIBKQUEUE.split()]
    compile_for_guest(settings, words, program)
    return program


def _libkqueue(connection: Connection, folder: str, program: Path) -> Outcomes:
    """Run libkqueue's tests, each class in processes of its own."""
    found: Outcomes = {}
    with step("libkqueue's tests"):
        guest.put(connection, program.read_bytes(), f"{folder}/libkqueue-test")
        connection.run(f"chmod +x {folder}/libkqueue-test", hide=True)
        for name in _LIBKQUEUE_CLASSES.split():
            first: int | None = 0
            while first is not None:
                outcomes, first = _libkqueue_from(connection, folder, name, first)
                found |= outcomes
    return found


def _libkqueue_from(
    connection: Connection, folder: str, name: str, first: int
) -> tuple[Outcomes, int | None]:
    """Run a class from a test on to its end, or to one that fails: that ends the process.

    Return what came of them, and the number of the test to go on with.
    """
    command = f"cd {folder} && timeout 200 ./libkqueue-test {name}:{first}-9999"
    result = connection.run(command, hide=True, warn=True, timeout=_WITHIN_S)
    tests = _LIBKQUEUE_LINE.findall(result.stdout)
    found = {f"{name}:{test}": "passed" for _, test in tests}
    if not result.exited:
        return found, None
    number, last = tests[-1] if tests else (first, f"test {first}")
    found[f"{name}:{last}"] = f"failed: {' '.join(result.stderr[-200:].split())}"
    return found, int(number) + 1 if tests else None


def _read(text: str) -> Outcomes:
    """Read lines of a name, a tab and an outcome; a path in it is cut to the file's name."""
    pairs: list[Any] = [line.split("\t", 1) for line in text.splitlines() if "\t" in line]
    return {name: re.sub(r"/\S*/", "", outcome) for name, outcome in pairs}
