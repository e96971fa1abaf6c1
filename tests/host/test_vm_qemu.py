"""Bad days of a guest, on a real QEMU with the kernel of kernel.S, which does as its command line says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from vm import build, cache, config, guest, image, log, qemu
from vm.config import Settings
from vm.log import Failure, GuestDied
from vm.qemu import Machine

from .conftest import eventually, programs

ALIVE = "The NetBSD Foundation%n"
READY = f"{ALIVE}pykq: guest ready%n"
ASKS = f"{ALIVE}{qemu.ASKS.decode()}%n"
ASKING = f"{ASKS}%w{qemu.ASKS.decode()}%n%w{qemu.READY.decode()}%n"  # the second time for a state


@pytest.fixture
def empty_image(tmp_path: Path) -> image.Image:
    """A disk with nothing on it, and keys that nobody has."""
    folder = tmp_path / "image"
    folder.mkdir()
    made = image.Image(folder)
    made.disk.write_bytes(bytes(1 << 20))
    image._add_keys(made, image._Root(folder))
    return made


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """An empty cache. At the end no process, lock or file may be left but logs."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    settings = config.load()
    yield settings
    qemu.down(settings)
    assert not programs(tmp_path), "a stray QEMU"
    assert list(temporary.iterdir()) == [], "stray sockets"
    left = {path.name for path in (settings.cache / "run" / "pykq").iterdir()}
    assert left <= {".lock", "console.log", "qemu.log", "known_hosts"}
    with cache.locked(settings.cache / "run" / "pykq"):
        pass


@pytest.fixture
def start(settings: Settings, test_kernel: Path, empty_image: image.Image) -> Callable[..., Machine]:
    """``start(arguments)``: start a guest as qemu.up does, with the test kernel."""

    def start(arguments: str, **changes: object) -> Machine:
        fields: dict[str, object] = {
            "name": "pykq", "variant": "patched", "netbsd": "0", "kernel": str(test_kernel), "boot": "pvh",
            "folder": str(qemu.folder_of(settings, "pykq")), "arguments": arguments, "cpus": 1,
            "memory_mib": 64,
        }
        wanted = Machine(**(fields | changes))  # type: ignore[arg-type]
        return qemu.start(settings, wanted, lambda: empty_image)

    return start


@contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Do something in another thread, and see that it did not fail."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        yield
    future.result()


def go_on(machine: Machine) -> None:
    """End the wait that %w asks for."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(machine.console))
        line.send(b"\n")


def test_it_is_a_pvh_kernel(test_kernel: Path) -> None:
    assert build.pvh(test_kernel)


def test_guest_that_says_it_is_ready_is_up_until_it_is_ended(
    start: Callable[..., Machine], settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = start(READY)
    assert qemu.status(settings, "pykq")
    assert qemu.must_find(settings, "pykq") == machine
    assert start(READY) == machine, "the second start leaves it as it is"
    assert qemu.down(settings)
    assert not qemu.status(settings, "pykq")
    assert not qemu.down(settings)
    assert "up already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (f"{ALIVE}panic: it hurts%n%r", "panic: it hurts"),
        (f"{ALIVE}panic: it hurts%n%h", "panic: it hurts"),
        (f"{ALIVE}fatal page fault in supervisor mode%ndb{{0}}> ", "fatal page fault in supervisor mode"),
        (f"{ALIVE}Stopped in pid 0.2 (system) at netbsd:x+0x5%ndb{{0}}> ", "db{0}>"),
        (f"{ALIVE}panic: init died (signal 0, exit 1)%n%l", "panic: init died (signal 0, exit 1)"),
        (f"{ALIVE}%r", "it rebooted or powered off"),
        (f"{ALIVE}%t", "it rebooted or powered off"),
        (f"{ALIVE}%p", "it rebooted or powered off"),
    ],
)
def test_death_during_boot_is_named_and_the_next_start_works(
    start: Callable[..., Machine], settings: Settings, arguments: str, cause: str
) -> None:
    with pytest.raises(GuestDied) as caught:
        start(arguments)
    assert str(caught.value) == f"the guest did not start: {cause}"
    assert "console.log" in caught.value.hint
    assert not qemu.status(settings, "pykq")
    assert start(READY).alive()


@pytest.mark.parametrize("arguments", ["", "%h", "%l", "noise%n%l"])
def test_guest_that_is_silent_or_talks_nonsense_is_given_up_in_time(
    start: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setitem(qemu._ALIVE_WITHIN_S, "tcg", 1.0)
    with pytest.raises(GuestDied, match=r"no 'The NetBSD Foundation' on its console within 1 s"):
        start(arguments)
    monkeypatch.undo()


def test_guest_that_hangs_later_is_given_up_in_time(
    start: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "BOOT_WITHIN_S", 1.0)
    with pytest.raises(GuestDied, match=r"no 'pykq: guest ready' on its console within 1 s"):
        start(ALIVE)


def test_qemu_killed_during_boot(start: Callable[..., Machine], settings: Settings, tmp_path: Path) -> None:
    def kill() -> None:
        eventually(lambda: ALIVE[:10].encode() in qemu._read(settings.cache / "run/pykq/console.log"))
        for pid in programs(tmp_path):
            os.kill(pid, signal.SIGKILL)

    with meanwhile(kill), pytest.raises(GuestDied, match="QEMU ended with status -9"):
        start(ALIVE)
    assert start(READY).alive()


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("panic: too late%n%h", "panic: too late"),
        ("db{1}> ", "db{1}>"),
        ("%r", "QEMU has ended"),
        ("%p", "QEMU has ended"),
    ],
)
def test_death_of_a_running_guest_is_named_and_the_next_start_works(
    start: Callable[..., Machine],
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    end: str,
    cause: str,
) -> None:
    machine = start(f"{READY}%w{end}")
    go_on(machine)
    eventually(machine.death)
    assert machine.death() == cause
    assert not qemu.status(settings, "pykq")
    with pytest.raises(GuestDied, match="the guest died") as caught:
        qemu.must_find(settings, "pykq")
    assert caught.value.status == 3
    assert start(READY).pid != machine.pid
    assert f"guest pykq died ({cause}) and is started anew" in capsys.readouterr().out


def test_qemu_killed_while_the_guest_runs(start: Callable[..., Machine], settings: Settings) -> None:
    machine = start(READY)
    os.kill(machine.pid, signal.SIGKILL)
    os.waitpid(machine.pid, 0)
    with pytest.raises(GuestDied, match="QEMU has ended"):
        qemu.must_find(settings, "pykq")
    assert qemu.down(settings)


def test_stopped_qemu_is_ended_all_the_same(start: Callable[..., Machine], settings: Settings) -> None:
    machine = start(READY)
    os.kill(machine.pid, signal.SIGSTOP)
    assert qemu.down(settings)
    assert os.waitstatus_to_exitcode(os.waitpid(machine.pid, 0)[1]) == -signal.SIGKILL


def test_ssh_that_does_not_answer_is_one_failure(
    start: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_CONNECT_WITHIN_S", 1)
    machine = start(READY)
    with pytest.raises(GuestDied, match="the connection to guest pykq failed"), guest.connect(machine):
        pass


def test_what_the_guest_prints_moves_no_cursor(
    start: Callable[..., Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GuestDied) as caught:
        start(f"{ALIVE}%e[2J%e]0;a title%e%npanic: %e[31mred%n")
    log.report(caught.value)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "panic: red" in shown


def test_port_in_use_is_named(start: Callable[..., Machine]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failure, match=f"port {port} is in use"):
            start(READY, ssh_port=port)


def test_accelerator_that_works_is_used(
    start: Callable[..., Machine], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played by software emulation in another manner, which QEMU has on every host."""
    monkeypatch.setattr(qemu, "accelerators", lambda settings: ["tcg,thread=single", "tcg"])
    assert start(READY).accelerator == "tcg,thread=single"
    assert not (settings.cache / "accelerators.json").exists()


def test_accelerator_that_does_not_work_is_left_and_remembered(
    start: Callable[..., Machine],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(qemu, "accelerators", lambda settings: ["none", "tcg"])
    assert start(READY).accelerator == "tcg"
    assert "none is there but does not run NetBSD" in capsys.readouterr().out
    assert list(cache.read_json(settings.cache / "accelerators.json")) == ["none"]


def test_kvm_of_this_host_is_used_or_said_to_be_broken(
    start: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever this host's /dev/kvm is like: none, forbidden, broken or good."""
    monkeypatch.setattr(qemu, "accelerators", lambda settings: ["kvm", "tcg"])
    used = start(READY).accelerator
    said = "kvm is there but does not run NetBSD" in capsys.readouterr().out
    assert used == ("tcg" if said else "kvm")


def test_forbidden_kvm_is_not_tried(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert qemu.accelerators(settings) == ["tcg"]
    (settings.cache / "run" / "pykq").mkdir(parents=True)


def test_two_starts_at_once_are_one_guest(start: Callable[..., Machine]) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, [READY, READY])
    assert first == second


def test_guest_of_an_older_pykq_is_found_and_ended(start: Callable[..., Machine], settings: Settings) -> None:
    machine = start(READY)
    state = qemu._state(Path(machine.folder))
    old = {**cache.read_json(state), "gone": 1}
    del old["arguments"]
    state.write_text(json.dumps(old))
    assert qemu.must_find(settings, "pykq").pid == machine.pid


def the_state(test_kernel: Path) -> Path:
    (path,) = test_kernel.parent.glob("*.state")
    return path


def test_guest_starts_from_the_state_of_one_before(
    start: Callable[..., Machine], settings: Settings, test_kernel: Path
) -> None:
    first = start(ASKING)
    assert "The NetBSD Foundation" in first.console_log.read_text()
    state = the_state(test_kernel)
    assert state.stat().st_mode & 0o077 == 0, "it holds the guest's memory"
    qemu.down(settings)
    second = start(ASKING)
    assert "The NetBSD Foundation" not in second.console_log.read_text(), "it has not booted"
    assert second.alive()
    assert the_state(test_kernel) == state


def test_guests_of_one_state_run_at_the_same_time(start: Callable[..., Machine], settings: Settings) -> None:
    one = start(ASKING)
    folder = qemu.folder_of(settings, "other")
    other = start(ASKING, name="other", folder=str(folder))
    try:
        assert one.alive() and other.alive()
        assert one.ssh_port != other.ssh_port
    finally:
        qemu.down(settings, "other")


def empty(state: bytes) -> bytes:
    return b""


def cut(state: bytes) -> bytes:
    return state[: len(state) // 2]


def flip_a_bit(state: bytes) -> bytes:
    return state[:9999] + bytes([state[9999] ^ 1]) + state[10000:]


def cut_with_a_checksum(state: bytes) -> bytes:
    return cut(state) + hashlib.sha256(cut(state)).digest()


@pytest.mark.parametrize("damage", [empty, cut, flip_a_bit, cut_with_a_checksum])
def test_damaged_state_is_dropped_and_the_guest_boots(
    start: Callable[..., Machine],
    settings: Settings,
    test_kernel: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
) -> None:
    start(ASKING)
    qemu.down(settings)
    whole = the_state(test_kernel).read_bytes()
    the_state(test_kernel).write_bytes(damage(whole))
    assert "The NetBSD Foundation" in start(ASKING).console_log.read_text()
    assert "the saved state is dropped" in capsys.readouterr().out
    assert len(the_state(test_kernel).read_bytes()) > len(whole) / 2, "there is a new one"


def test_state_is_kept_only_if_the_guest_gets_ready(
    start: Callable[..., Machine], test_kernel: Path
) -> None:
    before = set(test_kernel.parent.iterdir())
    with pytest.raises(GuestDied, match="panic: at the end"):
        start(f"{ASKS}%w{qemu.ASKS.decode()}%n%wpanic: at the end%n")
    assert set(test_kernel.parent.iterdir()) == before


def test_state_of_another_kernel_is_not_used_and_does_not_stay(
    start: Callable[..., Machine], test_kernel: Path, settings: Settings
) -> None:
    start(ASKING)
    old = the_state(test_kernel)
    qemu.down(settings)
    os.utime(test_kernel)
    assert "The NetBSD Foundation" in start(ASKING).console_log.read_text()
    assert the_state(test_kernel) != old


def test_state_is_of_the_whole_command_line(start: Callable[..., Machine], settings: Settings) -> None:
    start(ASKING)
    qemu.down(settings)
    assert "The NetBSD Foundation" in start(f"{ASKING}%n").console_log.read_text()
