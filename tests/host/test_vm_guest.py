"""How a guest is logged in to, when the SSH server at the other end is not what it should be."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import paramiko
import pytest
from fabric import Connection

from vm import guest, image, qemu
from vm.log import Failure, GuestDied

from .conftest import eventually, programs

Key = paramiko.Ed25519Key


class Server(paramiko.ServerInterface):
    """Lets one key in, and counts what it is offered."""

    def __init__(self, accepted: paramiko.PKey | None) -> None:
        self.accepted = accepted
        self.offered = 0

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.offered += 1
        return paramiko.AUTH_SUCCESSFUL if key == self.accepted else paramiko.AUTH_FAILED


class Shell(Server):
    """Runs commands here, as sshd does: each in a session of its own, its input ends with the connection."""

    def check_channel_request(self, kind: str, number: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self.run, args=(channel, command), daemon=True).start()
        return True

    def run(self, channel: paramiko.Channel, command: bytes) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(["sh", "-c", command], bufsize=0, start_new_session=True, **pipes) as process:
            threading.Thread(target=self.feed, args=(channel, process), daemon=True).start()
            with suppress(OSError):
                while data := os.read(process.stdout.fileno(), 4096):
                    channel.sendall(data)
                channel.sendall_stderr(process.stderr.read())
            with suppress(OSError, EOFError):
                channel.send_exit_status(process.wait() & 0xFF)
                channel.close()

    def feed(self, channel: paramiko.Channel, process: subprocess.Popen[bytes]) -> None:
        with suppress(OSError, ValueError):  # it has ended, or we have seen that
            while data := channel.recv(1 << 16):
                process.stdin.write(data)
            process.stdin.close()


@pytest.fixture
def keys(tmp_path: Path) -> image.Image:
    """An image's keys: the one to log in with, and the guest's own."""
    made = image.Image(tmp_path / "image")
    made.folder.mkdir()
    image._add_keys(made, image._Root(tmp_path / "root"))
    return made


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def machine(keys: image.Image, listener: socket.socket, tmp_path: Path) -> qemu.Machine:
    """A guest whose ssh is at the listener; of its QEMU there is a lock that says it lives."""
    port = listener.getsockname()[1]
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{port} {keys.host_key}\n")
    return qemu.Machine(
        name="pykq", variant="patched", netbsd="0", kernel="", boot="pvh", folder=str(tmp_path),
        image=str(keys.folder), ssh_port=port, ready=True,
    )


@pytest.fixture
def serve(listener: socket.socket) -> Iterator[Callable[[Path, Server], Server]]:
    """``serve(host key, server)``: answer one connection."""
    transports: list[paramiko.Transport] = []

    def answer(host_key: Path, server: Server) -> None:
        transport = paramiko.Transport(listener.accept()[0])
        transports.append(transport)
        transport.add_server_key(Key.from_private_key_file(str(host_key)))
        transport.start_server(server=server, event=threading.Event())

    def serve(host_key: Path, server: Server) -> Server:
        threading.Thread(target=answer, args=(host_key, server), daemon=True).start()
        return server

    yield serve
    for transport in transports:
        transport.close()


def refusal(machine: qemu.Machine, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why connect() gives up."""
    monkeypatch.setattr(qemu.Machine, "death", lambda machine: "")
    with pytest.raises(GuestDied) as caught, guest.connect(machine):
        pass
    assert caught.value.status == 3
    assert "console.log" in caught.value.hint
    return str(caught.value)


def test_the_right_key_meets_the_right_host(
    machine: qemu.Machine, keys: image.Image, serve: Callable[..., Server], tmp_path: Path
) -> None:
    ours = Key.from_private_key_file(str(keys.key))
    server = serve(tmp_path / "root/etc/ssh/ssh_host_ed25519_key", Server(ours))
    with guest.connect(machine) as connection:
        assert connection.is_connected
    assert server.offered >= 1
    assert keys.key.stat().st_mode & 0o777 == 0o600


def test_refused_connection_is_one_failure(
    machine: qemu.Machine, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener.close()
    assert "Unable to connect" in refusal(machine, monkeypatch)


def test_server_that_says_nothing_is_given_up(
    machine: qemu.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_CONNECT_WITHIN_S", 1)
    assert "its sshd says nothing for 1 s" in refusal(machine, monkeypatch)


def test_another_host_key_is_refused_before_a_key_is_offered(
    machine: qemu.Machine, keys: image.Image, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(keys.key, Server(None))  # any other key
    assert "does not match" in refusal(machine, monkeypatch)
    assert server.offered == 0


def test_unknown_host_is_refused_before_a_key_is_offered(
    machine: qemu.Machine, keys: image.Image, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(machine.folder) / "known_hosts").write_text("")
    server = serve(keys.key, Server(None))
    assert "not found in known_hosts" in refusal(machine, monkeypatch)
    assert server.offered == 0


def test_no_key_but_the_guests_own_is_offered(
    machine: qemu.Machine,
    serve: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the agent and ~/.ssh have others, and ~/.ssh/config sends every host elsewhere."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/config").write_text("Host *\n\tProxyCommand false\n\tUser nobody\n\tPort 1\n")
    with subprocess.Popen(["ssh-agent", "-D", "-a", home / "agent"], stdout=subprocess.DEVNULL) as agent:
        try:
            monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "agent"))
            monkeypatch.setenv("HOME", str(home))
            for name in ("id_ed25519", "id_ecdsa", "id_rsa", "more"):
                make = ["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", home / ".ssh" / name]
                subprocess.run(make, check=True)
                subprocess.run(["ssh-add", "-q", home / ".ssh" / name], check=True, env=os.environ)
            server = serve(tmp_path / "root/etc/ssh/ssh_host_ed25519_key", Server(None))
            assert "Authentication failed" in refusal(machine, monkeypatch)
        finally:
            agent.terminate()
    assert server.offered == 1


# What is copied there


@pytest.fixture
def connection(
    machine: qemu.Machine,
    keys: image.Image,
    serve: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Connection]:
    """To a server that runs commands on this host."""
    monkeypatch.setattr(qemu.Machine, "death", lambda machine: "")
    ours = Key.from_private_key_file(str(keys.key))
    serve(tmp_path / "root/etc/ssh/ssh_host_ed25519_key", Shell(ours))
    with guest.connect(machine) as connection:
        yield connection


def at_work(folder: str) -> str:
    """A command that python() begins, but for the Python."""
    return guest.python(folder).partition(" && env ")[0] + " && echo begun && sleep 999"


def test_files_are_there_for_as_long_as_the_context(connection: Connection) -> None:
    with guest.installed(connection) as folder:
        assert Path(folder, "pykq/__init__.py").is_file()
        assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert not Path(folder).exists()


def begin(connection: Connection, folder: str) -> None:
    _, stdout, _ = connection.client.exec_command(at_work(folder))
    assert stdout.readline() == "begun\n"


def interrupt(connection: Connection, folder: str) -> None:
    begin(connection, folder)
    raise KeyboardInterrupt


def hang_up(connection: Connection, folder: str) -> None:
    begin(connection, folder)
    connection.close()


def take_too_long(connection: Connection, folder: str) -> None:
    connection.run(at_work(folder), hide=True, timeout=0.5)


@pytest.mark.parametrize("fault", [interrupt, hang_up, take_too_long])
def test_nothing_stays_there_whatever_happens(
    connection: Connection, fault: Callable[[Connection, str], None]
) -> None:
    folders = []
    with suppress(BaseException), guest.installed(connection) as folder:
        folders.append(Path(folder))
        fault(connection, folder)
    assert len(folders) == 1
    eventually(lambda: not programs(folders[0]))
    assert not folders[0].exists()


def test_folder_that_cannot_be_made_is_one_failure(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "none/such")
    with pytest.raises(Failure, match="mkdir") as caught, guest.installed(connection):
        pass
    assert caught.value.status == 1
    assert "No such file" in caught.value.tail


def test_command_that_takes_no_input_says_why(connection: Connection) -> None:
    with pytest.raises(Failure, match="false") as caught:
        guest.feed(connection, "echo full >&2; false", bytes(1 << 24))
    assert caught.value.tail == "full\n"
