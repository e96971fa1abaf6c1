"""Guests of NetBSD that die, or are cut off, while something runs in them. See ../BAD-DAY.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paramiko import Channel

from vm import config, guest, qemu
from vm.log import Failure, GuestDied

NAME = "test-bad"

# What a test waits for where installed() and python() have begun, and where they have left nothing.
BEGUN = "until ls /tmp/pykq-*/.group; do sleep 0.1; done"
GONE = "while ls -d /tmp/pykq-* || pgrep -f '[p]ytest'; do sleep 0.1; done"


@pytest.fixture
def machine() -> Iterator[qemu.Machine]:
    """A guest that may die; afterwards the next one has to start."""
    settings = config.load()
    qemu.down(settings, NAME)
    try:
        yield qemu.up(settings, name=NAME)
        qemu.down(settings, NAME)
        assert qemu.up(settings, name=NAME).alive()
    finally:
        qemu.down(settings, NAME)


def end_of(machine: qemu.Machine, fault: str, within_s: float = 60.0) -> str:
    """What connect() says when something happens to a guest in which a command runs."""
    with pytest.raises(GuestDied) as caught, guest.connect(machine) as connection:
        connection.run(f"({fault}) >/dev/null 2>&1 & sleep 999", hide=True, timeout=within_s)
    assert caught.value.status == 3
    assert str(machine.console_log) in caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("ddb", [0, 1])
@pytest.mark.parametrize(
    ("crash", "causes"),
    [
        ("panic", ["crashme plain old panic"]),
        ("null_deref", ["uvm_fault(", "in supervisor mode"]),
        ("mutex_recursion", ["Mutex error", "locking against myself"]),
    ],
)
def test_crash_is_named(machine: qemu.Machine, crash: str, causes: list[str], ddb: int) -> None:
    with guest.connect(machine) as connection:
        if connection.run("sysctl -n debug.crashme_enable", hide=True, warn=True).failed:
            pytest.skip("this kernel has no debug.crashme")
    settings = [f"ddb.onpanic={ddb}", "debug.crashme_enable=1", f"debug.crashme.{crash}=1"]
    said = end_of(machine, "; ".join(f"sysctl -w {setting}" for setting in settings))
    assert said.startswith("the guest died: ")
    assert any(cause in said for cause in causes)


def test_processor_that_spins_is_given_up_in_time(machine: qemu.Machine) -> None:
    """At a priority that nothing interrupts; the other processor goes on, until it needs this one."""
    with guest.connect(machine) as connection:
        if connection.run("sysctl -n debug.crashme.spl_spinout", hide=True, warn=True).failed:
            pytest.skip("this kernel has no debug.crashme.spl_spinout")
    spin = "sysctl -w debug.crashme_enable=1; sysctl -w debug.crashme.spl_spinout=1"
    assert end_of(machine, spin, within_s=20) == f"in guest {NAME} a command did not end within 20 s"


@pytest.mark.parametrize("end", ["reboot -n -q", "poweroff -n -q"])
def test_guest_that_ends_by_itself_is_named(machine: qemu.Machine, end: str) -> None:
    assert end_of(machine, end) == "the guest died: QEMU has ended"


def test_guest_without_its_network_is_given_up_in_time(
    machine: qemu.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the thread that closes its channel ends late: a command's time is over when it began to."""
    close = Channel.close

    def close_slowly(channel: Channel) -> None:
        close(channel)
        time.sleep(0.5)

    monkeypatch.setattr(Channel, "close", close_slowly)
    said = end_of(machine, "ifconfig vioif0 down", within_s=3)
    assert said == f"in guest {NAME} a command did not end within 3 s"


def test_guest_without_its_sshd_is_one_failure(machine: qemu.Machine) -> None:
    assert end_of(machine, "pkill sshd").startswith(f"the connection to guest {NAME} failed: ")


def test_qemu_killed_while_tests_run(machine: qemu.Machine, tmp_path: Path) -> None:
    def kill() -> None:
        with guest.connect(machine) as other:
            other.run(BEGUN, hide=True, timeout=60)
            os.kill(machine.pid, signal.SIGKILL)
            os.waitpid(machine.pid, 0)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(GuestDied, match="the guest died: QEMU has ended"), guest.connect(machine) as one:
        guest.run_tests(one, tmp_path / "junit.xml", ())
    killer.join()


def test_full_disk_of_the_guest_is_named(machine: qemu.Machine) -> None:
    """A small one, where the files go that are copied there."""
    with guest.connect(machine) as connection:
        connection.run("mount -t tmpfs -o -s256k tmpfs /tmp", hide=True)
        with pytest.raises(Failure, match="'tar -xzf - -C /tmp/pykq-") as caught, guest.installed(connection):
            pass
        assert connection.run("ls /tmp", hide=True).stdout == ""
    assert caught.value.status == 1
    assert caught.value.hint == "is its disk full?"


@pytest.mark.parametrize("room", ["60m", "150m", "250m"])
def test_full_disk_while_an_image_is_made_names_the_remedy(tmp_path: Path, room: str) -> None:
    """When sets are unpacked, when Python's files are, and when makefs writes the disk."""
    mount = f"mount -t tmpfs -o size={room} none {tmp_path}"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*alone, mount], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount")
    build = config.load().cache / "build"
    line = f"PYKQ_CACHE={tmp_path} {sys.executable} -m invoke vm.up --quiet --name {NAME}"
    left = f"ls -A {tmp_path}/image {tmp_path}/run/{NAME} >&2"
    done = subprocess.run(
        [*alone, f"{mount} && ln -s {build} {tmp_path} && {line}; echo $?; {left}"],
        cwd=guest.ROOT, capture_output=True, text=True, check=False,
    )
    assert done.stdout in ("1\n", "2\n"), done.stderr
    assert "(make room, or name another cache folder in PYKQ_CACHE)" in done.stderr
    assert ".part" not in done.stderr.rpartition("PYKQ_CACHE)")[2]


def test_interrupted_test_of_a_host_leaves_nothing_there(machine: qemu.Machine, tmp_path: Path) -> None:
    """Twice in a row, while pytest runs there."""
    ssh_config = tmp_path / "ssh_config"
    ssh_config.write_text(
        f"Host bad\n HostName 127.0.0.1\n Port {machine.ssh_port}\n User root\n IdentitiesOnly yes\n"
        f" IdentityFile {machine.image}/id_ed25519\n UserKnownHostsFile {machine.folder}/known_hosts\n"
    )
    line = [sys.executable, "-m", "invoke", "test", "--hosts", "bad", "--ssh-config", str(ssh_config)]
    with guest.connect(machine) as connection, subprocess.Popen(
        line, cwd=guest.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            connection.run(BEGUN, hide=True, timeout=60)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert errors == "pykq: interrupted (the same command goes on where it stopped)\n"
        connection.run(GONE, hide=True, timeout=30)
