"""Configuration, output, image and QEMU parts that need neither NetBSD nor QEMU."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import struct
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm import archive as vm_archive
from vm import build, cache, config, doctor, image, log, packages, qemu, rump, run
from vm.log import BuildFailed, Failure


def write_config(text: str) -> None:
    config.config_file().write_text(text)


def test_command_line_wins_over_environment_over_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write_config('source = "/file"\nsets = "/file"\npython = "/file"\n')
    monkeypatch.setenv("PYKQ_SETS", "/environment")
    monkeypatch.setenv("PYKQ_PYTHON", "/environment")
    chosen = config.load(python="/line", source="")
    assert (chosen.source, chosen.sets, chosen.python) == (Path("/file"), Path("/environment"), Path("/line"))


def test_variables_of_a_version_win_over_those_of_all() -> None:
    write_config('[build]\nA = "1"\nB = 1\n[build."7.99"]\nB = "2"\n[build."7.9"]\nB = "3"\n')
    chosen = config.load()
    assert chosen.variables("7.99.10") == {"A": "1", "B": "2"}
    assert chosen.variables("10.1") == {"A": "1", "B": "1"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("souce = 1", "unknown key 'souce'"),
        ("source = 1", "source is not a string"),
        ("release = 11.0", "release is not a string"),
        ("source = ", "config.toml"),
        ('toolchain = "pcc"', "no toolchain 'pcc'"),
        ('build = "x"', "build is not a table"),
    ],
)
def test_bad_configuration_is_named(text: str, complaint: str) -> None:
    write_config(text)
    with pytest.raises(Failure, match=complaint):
        config.load()


@given(st.text())
def test_printed_text_moves_no_cursor(text: str) -> None:
    shown = log.printable(text)
    assert not any(ord(char) < 32 and char not in "\t\n" for char in shown)
    assert not any(0x7F <= ord(char) < 0xA0 for char in shown)


def test_escape_sequences_are_dropped_whole() -> None:
    assert log.printable("a\x1b[31mb\x1b]0;title\x07c\r\n") == "abc\n"


def test_failed_program_shows_its_last_lines() -> None:
    with pytest.raises(BuildFailed, match="sh failed with status 3") as caught:
        run.run(["sh", "-c", "echo first; echo last; exit 3"])
    assert caught.value.tail.endswith("first\nlast")


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", "apt-get install -y --no-install-recommends clang qemu-system-x86"),
        ("dnf", "dnf install -y clang qemu-system-x86-core"),
        ("pacman", "pacman -S --needed --noconfirm clang qemu-system-x86"),
        ("brew", "brew install llvm qemu"),
        ("pkgin", "pkgin -y install clang qemu"),
        ("", "install it, and see invoke doctor"),
    ],
)
def test_missing_program_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, manager: str, command: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name == manager or None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(Failure, match=r"qemu-system-x86_64, clang\+\+ not found") as caught:
        run.need("qemu-system-x86_64", "clang++")
    assert caught.value.hint == command


def test_ordinary_user_installs_with_sudo_but_for_brew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: name == "dnf" or None)
    assert packages.install_command(["make"])[:2] == ["sudo", "dnf"]
    monkeypatch.setattr("shutil.which", lambda name: name == "brew" or None)
    assert packages.install_command(["make", "ld.lld"]) == ["brew", "install", "lld"]
    assert packages.install_command(["make"]) == [], "it comes with the system"


def test_every_program_that_is_looked_for_has_packages() -> None:
    assert {need.what for need in doctor.needs()} == set(packages._PACKAGES)


def test_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    cache.write_whole(path, "first")
    with pytest.raises(TypeError):
        cache.write_whole(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "first"
    assert list(tmp_path.glob(".file*")) == []


def test_two_threads_can_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, chmod = threading.Barrier(2, timeout=10), Path.chmod

    def wait(path: Path, mode: int) -> None:
        both.wait()
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", wait)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cache.write_whole, [tmp_path / "to/file"] * 2, ["content"] * 2))
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["file"]


def test_folder_that_is_removed_while_others_wait_for_it_is_held_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, waits, holds, over = tmp_path / "folder", *(threading.Event() for _ in range(3))
    monkeypatch.setattr(cache, "say", lambda text: waits.set())

    def work() -> None:
        with cache.locked(folder):
            holds.set()
            over.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with cache.locked(folder):
            done = pool.submit(work)
            assert waits.wait(10)
            shutil.rmtree(folder)
        assert holds.wait(10)
        with (folder / ".lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        over.set()
        done.result()


def test_half_written_json_reads_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"key": ')
    assert cache.read_json(tmp_path / "m.json") == {}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_mtree_names_survive_quoting(name: str) -> None:
    quoted = image._quote(name)
    assert quoted.isascii()
    assert not set(quoted) & set(" #\t\n")
    assert image._unquote(quoted).encode("latin-1").decode() == name


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c", "..."])).map("/".join))
def test_no_archive_member_leaves_the_root(name: str) -> None:
    try:
        inside = vm_archive.inside(name, Path("x.tgz"))
    except Failure:
        assert ".." in name.split("/")
    else:
        assert not inside.startswith("/")
        assert ".." not in inside.split("/")


def archive(path: Path, *members: tuple[str, bytes, dict[str, object]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content, fields in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_set_keeps_owners_modes_and_links_in_the_spec(tmp_path: Path) -> None:
    sets = archive(
        tmp_path / "base.tgz",
        ("./bin", b"", {"type": tarfile.DIRTYPE, "mode": 0o755}),
        ("./bin/su", b"su", {"mode": 0o4555, "uid": 0, "gid": 0}),
        ("./bin/also", b"", {"type": tarfile.LNKTYPE, "linkname": "./bin/su"}),
        ("./tmp link", b"", {"type": tarfile.SYMTYPE, "linkname": "../../var/tmp"}),
    )
    root = image._Root(tmp_path / "root")
    root.folder.mkdir()
    image._unpack(sets, root)
    assert root.spec["bin/su"] == "type=file uid=0 gid=0 mode=4555"
    assert root.spec["tmp link"].startswith("type=link link=../../var/tmp ")
    assert not (root.folder / "tmp link").exists()
    assert (root.folder / "bin/su").stat().st_mode & 0o7000 == 0
    assert (root.folder / "bin/also").samefile(root.folder / "bin/su")


def test_pkgsrc_package_goes_below_usr_pkg(tmp_path: Path) -> None:
    members = ("+CONTENTS", b"@name python", {}), ("bin/python3.11", b"python", {})
    package = archive(tmp_path / "python.tgz", *members)
    root = image._Root(tmp_path / "root")
    root.folder.mkdir()
    image._unpack(package, root)
    assert list(root.spec) == ["usr/pkg/bin/python3.11"]


@pytest.mark.parametrize("name", ["../evil", "/../evil", "a/../../evil"])
def test_archive_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    sets = archive(tmp_path / "base.tgz", (name, b"x", {}))
    root = image._Root(tmp_path / "root")
    root.folder.mkdir()
    with pytest.raises(Failure, match="leads out of the archive"):
        image._unpack(sets, root)


def test_cut_archive_is_one_failure(tmp_path: Path) -> None:
    whole = archive(tmp_path / "base.tgz", ("file", bytes(range(256)) * 4000, {}))
    whole.write_bytes(whole.read_bytes()[:200])
    root = image._Root(tmp_path / "root")
    root.folder.mkdir()
    with pytest.raises(Failure, match=r"base\.tgz") as caught:
        image._unpack(whole, root)
    assert caught.value.hint == "is the file whole?"


def test_sets_folder_without_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"has no base\.tar\.xz or \.tgz"):
        image.set_archives(tmp_path)


def machine(tmp_path: Path, **changes: object) -> qemu.Machine:
    fields: dict[str, object] = {
        "name": "t", "variant": "stock", "netbsd": "10.1", "kernel": "/k,ernel/netbsd", "image": "/image",
        "boot": "pvh", "accelerator": "tcg", "ssh_port": 2222, "pid": 0, "sockets": str(tmp_path / "a,b"),
        "folder": str(tmp_path), "started": 0.0,
    }
    return qemu.Machine(**(fields | changes))  # type: ignore[arg-type]


def test_guest_is_reached_from_this_machine_only(tmp_path: Path) -> None:
    line = " ".join(qemu.command_line(machine(tmp_path), Path("/d,isk")))
    assert "hostfwd=tcp:127.0.0.1:2222-:22" in line
    assert "restrict=on" in line
    assert "snapshot=on,file=/d,,isk" in line
    assert f"{tmp_path}/a,,b/qmp" in line
    assert "-kernel /k,ernel/netbsd" in line
    assert "-kernel" not in " ".join(
        qemu.command_line(machine(tmp_path, boot="disk"), Path("/disk"))
    )


def test_only_a_guest_with_a_disk_of_its_own_reboots(tmp_path: Path) -> None:
    other = qemu.command_line(machine(tmp_path), Path("/disk"))
    line = qemu.command_line(machine(tmp_path, disk="/s,econd"), Path("/disk"))
    assert "-no-reboot" in other and "-no-reboot" not in line
    assert "if=none,id=second,format=raw,werror=report,file=/s,,econd" in line
    assert line.index("virtio-blk-pci,drive=root") < line.index("virtio-blk-pci,drive=second"), "ld0 and ld1"


@pytest.mark.parametrize(
    "text",
    [
        b"[ 1.0] panic: kernel diagnostic assertion failed",
        b"fatal page fault in supervisor mode",
        b"uvm_fault(0xffffffff81, 0x0, 1) -> e",
        b"Stopped in pid 0.2 (system) at netbsd:breakpoint+0x5: leave\ndb{0}> ",
        b"panic: cannot mount root, error = 6",
        b"panic: init died (signal 0, exit 1)",
    ],
)
def test_death_on_the_console_is_seen(tmp_path: Path, text: bytes) -> None:
    dead = machine(tmp_path)
    dead.console_log.write_bytes(b"NetBSD 10.1\r\n" + text + b"\r\n")
    assert dead.death()


def test_guest_without_a_qemu_is_dead(tmp_path: Path) -> None:
    assert machine(tmp_path).death() == "QEMU has ended"


def test_guest_names_are_folder_names(tmp_path: Path) -> None:
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(Failure, match="no name for a guest"):
            qemu.folder_of(config.load(), name)


@pytest.mark.parametrize("size", [4, 8])
def test_pvh_note_is_found_where_a_program_header_says_so(tmp_path: Path, size: int) -> None:
    note = struct.pack("<III4s8x", 4, size, 18, b"Xen")
    kernel = tmp_path / "netbsd"
    for kind, found in ((4, True), (1, False)):
        segments = struct.pack("<IIQQQQ16x", 1, 0, 0, 0, 0, 64) + struct.pack(
            "<IIQQQQ16x", kind, 0, 176, 0, 0, len(note)
        )
        header = struct.pack("<4sB27xQ14xHH6x", b"\x7fELF", 2, 64, 56, 2)
        kernel.write_bytes(header + segments + note)
        assert build.pvh(kernel) == found



def test_another_process_can_be_given_the_same_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config.load(source="/src", sets="/sets", toolchain="gcc", kernel_config="GENERIC")
    for name, value in chosen.environment().items():
        monkeypatch.setenv(name, value)
    assert config.load() == chosen


def test_clang_without_its_sanitizers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It then prints the name that it was asked for, and no path."""
    clang = tmp_path / "clang"
    clang.write_text('#!/bin/sh\necho "${1#*=}"\n')
    clang.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Failure, match="clang has no sanitizers here"):
        rump.sanitizer_environment()
