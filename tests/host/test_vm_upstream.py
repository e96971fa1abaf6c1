"""The upstream form applies to what the port applies to, and to kqueue(2) of any release."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vm import patches, rivals, upstream
from vm.log import Failure

# As much of a manual page as the patch needs to find its places.
PAGE = """.\\"
.Dd {date}
.Dt KQUEUE 2
.Os
.Sh NAME
.Nm kqueue ,
.Nm kevent
.Nd kernel event notification mechanism
.Sh DESCRIPTION
.Bl -tag -width EV_ERROR
.It Dv EV_ERROR
See
.Sx RETURN VALUES
below.
.El
.Ss Filters
Filters are identified by a number.
There are two types of filters; pre-defined filters which
are described below.
.Sh RETURN VALUES
A number.
.Sh ERRORS
.Bl -tag -width Er
.It Bq Er EINTR
A signal was delivered before the timeout expired and before any
events were placed on the kqueue for return.
.El
.Sh HISTORY
The function first appeared in
.Nx {version} .
"""
NEWEST = PAGE.format(date="October 22, 2021", version="10.0")


# What invoke bench --full keeps, as far as the letter takes from it: vm.rivals and tests/c/rivals.c make it.
WAY = {
    "calls": 1,
    "descriptors": 0,
    "lost": 0,
    "awake_ns": [310.2, 305.7, 1290.0],
    "asleep_ns": [4120.0, 4125.5, 4121.0],
    "round_trip_ns": {"p50": [61000, 62000, 63000], "p99": [90500, 91500, 92500], "p999": [1, 1, 1]},
    "behind_note_ns": {"p50": [7000, 7001, 7002]},
}
EVENT = {"behind_event_ns": {"p50": [1234567, 1234567, 1234567]}}
WAYS = {"KQUEUE_TICKLE": WAY, "EVFILT_USER": WAY | EVENT, "pipe": WAY | EVENT | {"descriptors": 2}}
RUN = {"where": "guest (tcg)", "variant": "patched", "netbsd": "10.99.12", "cpus": 2, "python": None}
RUN |= {"c": {"rounds": 3, "ways": WAYS}}
OTHERS = [
    RUN | {"variant": "stock", "c": {}},
    RUN | {"where": "rump kernel", "c": {}},
    RUN | {"cpus": 4, "c": {}},
]
FIGURES = {"machine": {"cpu": "A $CPU", "qemu": "7.2", "date": "2026-01-31"}, "runs": [*OTHERS, RUN]}


@pytest.fixture
def mails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the mails of somebody called A. Hacker are, who has measured."""
    monkeypatch.setattr(upstream, "FIGURES", tmp_path / "bench.json")
    upstream.FIGURES.write_text(json.dumps(FIGURES))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "A. Hacker")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "hacker@example.org")
    upstream.write(tmp_path / "mails")
    return tmp_path / "mails"


@pytest.fixture
def top(tmp_path: Path, texts_before: Callable[[patches.Port], dict[str, str]]) -> Path:
    """A folder with what the patch changes, as far as it tells."""
    path = tmp_path / "whole.patch"
    path.write_text(upstream.diff())
    texts = texts_before(patches.Port(path, "", (), ()))
    for name, text in (texts | {upstream.PAGE: NEWEST}).items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    return tmp_path / "src"


def git(folder: Path, *words: str | Path) -> str:
    command = ["git", "-c", "user.name=B", "-c", "user.email=b@example.org", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mail_is_a_commit_for_git_and_a_patch_for_patch(mails: Path, top: Path) -> None:
    mail = mails / "0001-kqueue-tickle.patch"
    other = shutil.copytree(top, top.with_name("other"))
    git(top, "init", "-q")
    git(top, "add", ".")
    git(top, "commit", "-q", "-m", "base")
    git(top, "am", "-q", mail)
    assert git(top, "log", "-1", "--format=%an <%ae> %s").startswith(
        "A. Hacker <hacker@example.org> kqueue(2): Add the KQUEUE_TICKLE ioctl"
    )
    subprocess.run(["patch", "-p1", "-F0", "-s", "-i", mail], cwd=other, check=True)
    for name in git(top, "ls-files").split():
        assert (top / name).read_bytes() == (other / name).read_bytes(), name


def test_it_holds_the_port_for_its_revision_and_no_second_copy(mails: Path, top: Path) -> None:
    port = next(port for port in patches.ports() if upstream.REVISION in port.revisions)
    mail = (mails / "0001-kqueue-tickle.patch").read_text()
    assert mail.count(port.path.read_text()) == 1
    files = git(top, "apply", "--numstat", mails / "0001-kqueue-tickle.patch").split()[2::3]
    assert set(port.files) | {upstream.PAGE, upstream.TEST} < set(files)
    assert "@NetBSD@" not in mail and "@DATE@" not in mail


def test_added_lines_are_tidy() -> None:
    for line in upstream.diff().splitlines():
        if line.startswith("+") and not line.startswith("+./usr"):  # set lists are wide
            assert line == line.rstrip() and len(line[1:].expandtabs(8)) <= 80, line


def test_without_figures_the_letter_is_left_out(
    mails: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(upstream, "FIGURES", tmp_path / "none.json")
    upstream.write(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["0001-kqueue-tickle.patch"]
    assert "invoke bench" in capsys.readouterr().out


def test_the_letter_has_every_way_that_was_measured(mails: Path) -> None:
    letter = (mails / "0000-cover-letter.patch").read_text()
    assert re.match(r"From: A\. Hacker <hacker@example\.org>\nDate: .*\nTo: tech-kern@.*\nSubject: ", letter)
    assert "NetBSD 10.99.12, guest (tcg), 2 CPUs, QEMU 7.2\non A $CPU, 2026-01-31:\n" in letter
    assert "medians of 3 rounds" in letter
    assert not re.search(r"\$\{?[a-z]", letter), "a name without its figure"
    table = [line.split() for line in letter.partition("within a round.\n\n")[2].splitlines()[:4]]
    assert table == [
        ["calls", "fds", "awake", "asleep", "p50", "p99", "note", "event", "lost"],
        ["KQUEUE_TICKLE", "1", "0", "310", "4121", "62000", "91500", "7001", "-", "0"],
        ["EVFILT_USER", "1", "0", "310", "4121", "62000", "91500", "7001", "1234567", "0"],
        ["pipe", "1", "2", "310", "4121", "62000", "91500", "7001", "1234567", "0"],
    ]
    assert max(map(len, letter.partition("\n\n")[2].splitlines())) <= 80


def test_a_figure_that_was_not_measured_is_a_dash() -> None:
    run = RUN | {"c": {"rounds": 3, "ways": {"pipe": {"calls": 2, "awake_ns": []}}}}
    table = upstream.letter({"runs": [run]}).splitlines()
    assert ["pipe", "2", *8 * "-"] in [line.split() for line in table]


def test_the_letter_takes_what_bench_keeps() -> None:
    """The names of the figures are those that tests/c/rivals.c writes, or vm.rivals."""
    made = upstream.FIGURES.parents[1].joinpath("c/rivals.c").read_text()
    made += Path(rivals.__file__).read_text()
    taken = {name for path in upstream._COLUMNS.values() for name in path} - {"calls"}
    assert {name for name in taken | {*RUN, *FIGURES, *FIGURES["machine"]} if name not in made} == set()


@pytest.mark.parametrize("date, version", [("October 22, 2021", "10.0"), ("March 2, 2015", "6.0")])
def test_the_page_of_any_release_gets_the_text(date: str, version: str) -> None:
    page = upstream.manual_page(PAGE.format(date=date, version=version))
    assert f".Dd {date}\n" in page
    assert page.count(".Dv KQUEUE_TICKLE") == 3
    assert page.endswith(".Nx 12.0 .\n")
    assert upstream.manual_page(page) == page, "and not twice"


def test_a_page_that_has_no_place_for_it_is_refused() -> None:
    with pytest.raises(patches.NoFit):
        upstream.manual_page(NEWEST.replace("below.", "above."))


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="needs mandoc")
def test_mandoc_has_nothing_to_say_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "kqueue.2"

    def complaints(page: str) -> list[str]:
        path.write_text(page)
        done = subprocess.run(["mandoc", "-Tlint", path], capture_output=True, text=True)
        return [line.split(": ", 2)[2] for line in done.stdout.splitlines()]

    assert complaints(upstream.manual_page(NEWEST)) == complaints(NEWEST) == []


def test_git_that_knows_no_user_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_DIR"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.useConfigOnly")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Failure, match="git does not know"):
        upstream.write(tmp_path / "mails")
