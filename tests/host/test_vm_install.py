"""A machine that must not get the kernel does not, none loses one that boots; a guest makes its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from vm import config, install, native, patches
from vm.log import Failure
from vm.source import identify

KERNEL = {"netbsd": "10.1", "config": "GENERIC", "sha256": "00"}
MACHINE = {
    "system": "NetBSD",
    "machine": "amd64",
    "netbsd": "10.1",
    "version": "NetBSD 10.1 (GENERIC) #0: Mon Dec 16 13:08:11 UTC 2024",
    "runs": "/netbsd",
    "user": "0",
    "sha256": "SHA256 (/netbsd) = 11",
    "free_kib": "100000",
}
SIZE_BYTES = 30 << 20

# NetBSD's answers, for a machine that has booted what is in the file "running".
COMMANDS = {
    "uname": "case $1 in -s) echo NetBSD;; -m) echo amd64;; -r) echo 10.1;; esac",
    "sysctl": 'cat "$BOX/running"',
    "id": "echo 0",
    "df": "echo Filesystem; echo / 1 1 100000",
    "cksum": 'shift 2; for file; do echo "SHA256 ($file) = $(sha256sum < "$file")"; done',
    "sync": 'cat "$BOX/netbsd" >> "$BOX/synced"',
}


class Box:
    """A machine that is a folder: its / there, and its own uname, sysctl, and so on."""

    original_host = "box"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in COMMANDS.items():
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        (folder / "netbsd").write_text("NetBSD 10.1 (GENERIC) #0: stock\n")
        self.boot()

    def boot(self, name: str = "netbsd") -> None:
        (self.folder / "running").write_text(self.text(name))

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def run(self, command: str, *, content: bytes = b"", **_: object) -> SimpleNamespace:
        there = re.sub(r"/(?=o?netbsd\b)", f"{self.folder}/", command)
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "BOX": str(self.folder)}
        done = subprocess.run(["sh", "-c", there], input=content, capture_output=True, env=environment)
        output = SimpleNamespace(stdout=done.stdout.decode(), stderr=done.stderr.decode())
        output.exited = done.returncode
        return output

    def feed(self, command: str, content: bytes) -> None:
        assert self.run(command, content=content).exited == 0


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    """The machine that invoke install --host box reaches."""
    (tmp_path / "box").mkdir()
    (tmp_path / "kernel").mkdir()
    box = Box(tmp_path / "box")

    @contextmanager
    def connect(name: str, *, ssh_config: Path | None) -> Iterator[Box]:
        yield box

    monkeypatch.setattr("vm.hosts.connect", connect)
    monkeypatch.setattr("vm.guest.feed", Box.feed)
    monkeypatch.setattr(install, "select", lambda settings: None)
    monkeypatch.setattr(install, "kernel_folder", lambda builder, variant: tmp_path / "kernel")
    return box


def build_and_install(box: Box, build: str, *, yes: bool = True) -> None:
    """Put a patched kernel on a machine; build is what tells it from others."""
    folder = box.folder.parent / "kernel"
    text = f"NetBSD 10.1 (GENERIC.pykq-patched) #0: {build}\n"
    (folder / "netbsd").write_text(text)
    manifest = KERNEL | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    install.install(config.load(), "box", yes=yes)


@pytest.mark.parametrize("ident", ["GENERIC", "GENERIC.pykq-stock"])
def test_a_machine_of_the_release_and_configuration_may_have_it(ident: str) -> None:
    install._check("box", MACHINE | {"version": f"NetBSD 10.1 ({ident}) #0: Mon"}, KERNEL, SIZE_BYTES)


@pytest.mark.parametrize(
    "fact, value, complaint, remedy",
    [
        ("system", "FreeBSD", "box is FreeBSD amd64", "NetBSD amd64"),
        ("machine", "i386", "box is NetBSD i386", "NetBSD amd64"),
        ("netbsd", "9.4", "runs NetBSD 9.4, the kernel is of 10.1", "--release"),
        ("version", "NetBSD 10.1 (XEN3_DOM0) #0", "has the configuration GENERIC", "--config"),
        ("version", "who knows", "has the configuration GENERIC", "--config"),
        ("runs", "", "does not run what is its /netbsd", "reboot into /netbsd"),
        ("user", "1000", "you are not root", "root@box"),
        ("free_kib", "50000", "50000 KiB free", "room"),
        ("free_kib", "", "unknown KiB free", "room"),
    ],
)
def test_any_other_is_refused_with_the_remedy(fact: str, value: str, complaint: str, remedy: str) -> None:
    with pytest.raises(Failure) as caught:
        install._check("box", MACHINE | {fact: value}, KERNEL, SIZE_BYTES)
    assert complaint in str(caught.value)
    assert remedy in caught.value.hint


def test_the_kernel_that_ran_is_kept_and_the_new_one_on_the_disk_before_it_has_its_name(box: Box) -> None:
    build_and_install(box, "first")
    assert "first" in box.text("netbsd")
    assert "stock" in box.text("onetbsd")
    assert [line.split()[-1] for line in box.text("synced").splitlines()] == ["stock", "first"]
    assert not (box.folder / "netbsd.pykq").exists()


def test_without_yes_nothing_is_touched(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    build_and_install(box, "first", yes=False)
    assert "stock" in box.text("netbsd")
    assert not (box.folder / "onetbsd").exists()
    assert "with --yes it does" in capsys.readouterr().out


def test_the_next_kernel_waits_until_the_last_one_has_booted(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    build_and_install(box, "first")
    build_and_install(box, "first")
    assert "is its /netbsd already" in capsys.readouterr().out
    with pytest.raises(Failure, match="does not run what is its /netbsd"):
        build_and_install(box, "second")
    box.boot("onetbsd")  # the first one did not boot
    with pytest.raises(Failure, match="does not run what is its /netbsd"):
        build_and_install(box, "second")
    assert "stock" in box.text("onetbsd")
    box.boot()
    build_and_install(box, "second")
    assert "second" in box.text("netbsd")
    assert "first" in box.text("onetbsd")


def test_a_kernel_that_cannot_take_the_place_is_removed(box: Box) -> None:
    (box.folder / "bin/mv").write_text("#!/bin/sh\nexit 1\n")
    (box.folder / "bin/mv").chmod(0o755)
    with pytest.raises(Failure, match="ended with status 1"):
        build_and_install(box, "first")
    assert "stock" in box.text("netbsd")
    assert not (box.folder / "netbsd.pykq").exists()


def test_a_patch_in_a_guest_that_was_cut_short_is_made_whole(
    box: Box, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_TOP", str(tree))
    fit = patches.fit(identify(tree))
    first, second, *_ = fit.port.files
    (tree / first).write_bytes(fit.patched[first])
    (tree / second).unlink()
    native._patch(box, fit)
    assert {name: (tree / name).read_bytes() for name in fit.port.files} == fit.patched
    monkeypatch.setattr("vm.guest.feed", None)
    native._patch(box, fit)  # nothing to do


def test_the_first_objects_tell_how_long_the_build_takes(capsys: pytest.CaptureFixture[str]) -> None:
    native._estimate(1815.0, 754, cpus=0)
    assert "by the first 20 of 754 objects: some 30 min; this host has" in capsys.readouterr().out
