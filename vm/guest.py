"""Work inside a guest, through Fabric: commands, files, tests, the demo."""

from __future__ import annotations

import io
import logging
import os
import secrets
import shlex
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko
from fabric import Config, Connection, Remote
from invoke.exceptions import CommandTimedOut, UnexpectedExit

from . import wheels
from .cache import write_whole
from .log import Failure, GuestDied, logger, printable, say, timed
from .qemu import Machine

ROOT = Path(__file__).resolve().parent.parent

# In what installed() makes: the process group of what runs there.
_GROUP = ".group"

# And what the rules in C have come to, once they have ended.
_RULES = "rules.tap"

_CONNECT_WITHIN_S = 5
_CLOSED = "it was closed"  # Fabric says status -1, and goes on
_SILENT = ("No existing session", "Error reading SSH protocol banner")  # paramiko's words
_DIES_WITHIN_S = 3.0
_COPY_WITHIN_S = 60
_TIDY_WITHIN_S = 10
_TESTS_WITHIN_S = 900


# Its threads write tracebacks of their own; what matters arrives here as an exception.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class _Screen(io.StringIO):
    """A stream to the user's terminal that lets no control characters through."""

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):  # nobody reads on, as with "| head"
            sys.stdout.write(printable(text))
            sys.stdout.flush()
        return len(text)


class _Remote(Remote):  # type: ignore[misc]
    """A command in a guest; Invoke takes one for timed out only once its timer's thread has ended."""

    expired = False

    def kill(self) -> None:
        self.expired = True
        super().kill()

    @property
    def timed_out(self) -> bool:
        return self.expired


# For Fabric: what runs there reads nothing from here.
OVERRIDES = {"run": {"in_stream": False}, "runners": {"remote": _Remote}}


@contextmanager
def connect(machine: Machine) -> Iterator[Connection]:
    """Open an SSH connection to a guest; its host key must be the one made with its image.

    The user's own keys, agent and ~/.ssh/config are left out of it.  While the
    connection is open the console is watched: when the guest dies, whatever
    runs over the connection ends with GuestDied.
    """
    folder = Path(machine.folder)
    connection = Connection(
        "127.0.0.1",
        user="root",
        port=machine.ssh_port,
        config=Config(ssh_config=paramiko.SSHConfig(), overrides=OVERRIDES),
        connect_timeout=_CONNECT_WITHIN_S,
        connect_kwargs={
            "key_filename": str(Path(machine.image) / "id_ed25519"),
            "look_for_keys": False,
            "allow_agent": False,
            "banner_timeout": _CONNECT_WITHIN_S,
            "auth_timeout": _CONNECT_WITHIN_S,
        },
    )
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    connection.client.load_host_keys(str(folder / "known_hosts"))
    ended = threading.Event()
    watch = threading.Thread(target=_close_on_death, args=(machine, connection, ended), daemon=True)
    try:
        with timed(f"{machine.name}: login"):
            connection.open()
        watch.start()
        yield connection
    except CommandTimedOut as error:
        machine.raise_if_dead()
        raise GuestDied(
            f"in guest {machine.name} a command did not end within {error.timeout} s",
            hint=f"it hangs, or has lost its network; its console is in {machine.console_log}",
            tail=machine.last_lines(),
        ) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        silent = f"its sshd says nothing for {_CONNECT_WITHIN_S} s"
        raise _lost(machine, silent if str(error) in _SILENT else str(error)) from error
    except UnexpectedExit as error:
        result = error.result
        if result.exited < 0:
            raise _lost(machine, _CLOSED) from error
        machine.raise_if_dead()
        raise Failure(
            f"in the guest, {result.command!r} ended with status {result.exited}", tail=result.stderr[-2000:]
        ) from error
    finally:
        ended.set()
        closing = threading.Thread(target=_close, args=(connection,), daemon=True)
        closing.start()
        closing.join(_CONNECT_WITHIN_S)  # paramiko waits for ever when the network is gone


def _lost(machine: Machine, cause: str) -> GuestDied:
    """Say what broke a connection; raise what killed the guest, if that is why."""
    deadline = time.monotonic() + _DIES_WITHIN_S
    while time.monotonic() < deadline:  # a connection breaks before QEMU ends
        machine.raise_if_dead()
        time.sleep(0.05)
    return GuestDied(
        f"the connection to guest {machine.name} failed: {cause}",
        hint=f"its console is in {machine.console_log}",
    )


def _close(connection: Connection) -> None:
    with suppress(Exception):
        connection.close()


def _close_on_death(machine: Machine, connection: Connection, ended: threading.Event) -> None:
    """Close the connection when the guest dies, so that what waits on it ends."""
    while not ended.wait(0.5):
        if machine.death():
            connection.close()
            return


@contextmanager
def installed(connection: Connection, programs: Path | None = None) -> Iterator[str]:
    """Copy pykq, its tests and, where it is not there, pytest into a new folder; yield its path.

    A shell at the other end removes the folder at the end, so that nothing
    stays there when the connection breaks, or this process is killed: then what
    python() has started is killed first.
    """
    folder = f"/tmp/pykq-{secrets.token_hex(8)}"  # noqa: S108 mkdir fails when it is there
    kill = f"kill -9 -$(cat {folder}/{_GROUP}); sleep 1"
    there = f"{{ ls -d /{wheels.folder()} 2>/dev/null || echo none; }}"  # in a guest: the image has them
    command = f"mkdir -m 700 {folder} && {there} && {{ read done || {{ {kill}; }}; rm -rf {folder}; }}"
    keeper, said, errors = connection.client.exec_command(command, timeout=_COPY_WITHIN_S)
    try:
        line = said.readline()
        if not line:
            _expect_success(connection, command, said.channel, errors)
        with timed(f"files to {connection.host}, port {connection.port}"):
            feed(connection, f"tar -xzf - -C {folder}", archive(programs, with_wheels=line == "none\n"))
        yield folder
        keeper.write(b"done\n")
        _expect_success(connection, command, said.channel, errors)
    finally:
        with suppress(OSError, EOFError):
            keeper.channel.shutdown_write()
            said.channel.status_event.wait(_TIDY_WITHIN_S)


def feed(connection: Connection, command: str, content: bytes) -> None:
    """Run a command with content as its input; Invoke would feed that byte by byte."""
    stdin, stdout, stderr = connection.client.exec_command(command, timeout=_COPY_WITHIN_S)
    try:
        stdin.write(content)
        stdin.channel.shutdown_write()
    except TimeoutError:
        raise
    except OSError:  # it has ended, and says why
        pass
    _expect_success(connection, command, stdout.channel, stderr)


def _expect_success(
    connection: Connection, command: str, channel: paramiko.Channel, stderr: paramiko.ChannelFile
) -> None:
    """Wait for a command's end; raise Failure when it is none that its user wanted."""
    if not channel.status_event.wait(_COPY_WITHIN_S):
        raise TimeoutError(f"it takes no files within {_COPY_WITHIN_S} s")
    if channel.exit_status < 0:
        raise EOFError(_CLOSED)
    if channel.exit_status > 0:
        problem = stderr.read().decode(errors="replace")
        raise Failure(f"on {connection.host}, {command!r} failed", hint="is its disk full?", tail=problem)


def put(connection: Connection, content: bytes, path: str) -> None:
    """Write a file."""
    feed(connection, f"cat > {shlex.quote(path)}", content)


def fetch(connection: Connection, path: str) -> bytes:
    """Return the content of a file."""
    buffer = io.BytesIO()
    connection.sftp().get_channel().settimeout(_COPY_WITHIN_S)  # for each piece of it
    connection.get(path, buffer)
    return buffer.getvalue()


def python(folder: str, **variables: str) -> str:
    """Return the command for a shell that starts the newest Python of pkgsrc where archive() was unpacked.

    variables are added to its environment.
    """
    variables |= {"PYTHONPATH": f".:site:/{wheels.folder()}", "PYTHONUNBUFFERED": "1"}
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    found = "ls /usr/pkg/bin/python3.[0-9] /usr/pkg/bin/python3.[0-9][0-9] 2>/dev/null"
    newest = f"python=$({found} | sort -t. -k2n | tail -n 1)"
    start = f"echo $$ >{_GROUP} && env {settings} ${{python:?there is none in /usr/pkg/bin}}"
    return f"{newest}; cd {folder} && {start}"


def run_tests(
    connection: Connection,
    report: Path,
    chosen: Sequence[str],
    programs: Path | None = None,
    **variables: str,
) -> tuple[int, str]:
    """Run tests over an open connection; return pytest's status and output.

    chosen are words for pytest; when they name no files it looks into
    tests/rules and tests/guest.  programs is the folder of the C programs;
    tests that need them are skipped without it.  variables are added to the
    environment.  The report, JUnit XML, is brought back.  The rules in C run
    first, while Python starts: what they say first, and what fails, is shown
    when it is known.
    """
    with installed(connection, programs) as folder:
        if programs is not None:
            variables |= {"PYKQ_PROGRAMS": f"{folder}/programs", "PYKQ_RULES": f"{folder}/{_RULES}"}
            where = variables["PYKQ_EXPECT"]
            results = rules_in_c(connection, folder, where)
            threading.Thread(target=_show_results, args=(results, where), daemon=True).start()
        command = f"{python(folder, **variables)} -m pytest -c /dev/null --rootdir . -p no:cacheprovider"
        command += " --import-mode=importlib -ra -q --junitxml=junit.xml"
        command += f" {shlex.join(pytest_words(chosen, 'tests/rules', 'tests/guest'))}"
        with timed(f"tests on {connection.host}, port {connection.port}"):
            done = connection.run(command, hide=True, warn=True, timeout=_TESTS_WITHIN_S)
        if done.exited < 0:
            raise EOFError(_CLOSED)
        xml = connection.run(f"cat {folder}/junit.xml", hide=True, warn=True, timeout=_COPY_WITHIN_S)
    if xml.ok:
        write_whole(report, xml.stdout)
    output = done.stdout + done.stderr
    logger.info("%s", printable(output))
    return done.exited, output


def pytest_words(chosen: Sequence[str], *folders: str) -> list[str]:
    """Return words for pytest: those chosen, and the folders, unless a word names what is in tests."""
    named = any(word.startswith("tests/") for word in chosen)
    return [*chosen, *(() if named else folders)]


def rules_in_c(connection: Connection, folder: str, variant: str) -> Iterator[str]:
    """Start the rules in C where programs are installed; yield what each came to, as a line of TAP."""
    command = f"cd {folder} && programs/rules {variant} 2>&1 | tee rules.part; mv rules.part {_RULES}"
    _, output, _ = connection.client.exec_command(command, timeout=_TESTS_WITHIN_S)
    return (printable(line.rstrip()) for line in output if line.startswith(("ok ", "not ok ")))


def _show_results(results: Iterator[str], where: str) -> None:
    """Show the first of the rules' results, and each that is a failure."""
    with suppress(OSError, EOFError):  # the connection is gone: who waits for pytest says so
        for number, line in enumerate(results):
            if number == 0 or not line.startswith("ok "):
                say(f"in the {where} guest: {line}")


def run_module(machine: Machine, module: str, *arguments: str, show: bool = True) -> str:
    """Run a module of pykq in a guest; return its output, which show puts on the screen, too."""
    with connect(machine) as connection, installed(connection) as folder:
        result = connection.run(
            " ".join([python(folder), "-m", module, *arguments]),
            hide=not show,
            out_stream=_Screen() if show else None,
            err_stream=_Screen() if show else None,
            warn=True,
            timeout=_TESTS_WITHIN_S,
        )
        if result.exited < 0:
            raise EOFError(_CLOSED)
        machine.raise_if_dead()
        if result.exited:
            raise Failure(f"{module} ended with status {result.exited} in guest {machine.name}")
        output: str = result.stdout
        return output


def ssh_command(machine: Machine, *command: str) -> list[str]:
    """Return the ssh(1) command that logs in to a guest, with the same care as connect()."""
    line = ["ssh"]
    line += ["-F", "none"]
    line += ["-p", str(machine.ssh_port)]
    line += ["-i", str(Path(machine.image) / "id_ed25519")]
    line += ["-o", "IdentitiesOnly=yes"]
    line += ["-o", "IdentityAgent=none"]
    line += ["-o", "StrictHostKeyChecking=yes"]
    line += ["-o", f'UserKnownHostsFile="{Path(machine.folder) / "known_hosts"}"']
    line += ["-o", f"ConnectTimeout={_CONNECT_WITHIN_S}"]
    return [*line, "root@127.0.0.1", *command]


def archive(programs: Path | None = None, *, with_wheels: bool = True) -> bytes:
    """Return a tar.gz of pykq, its tests, site/ with pytest, and programs/ where there are some."""
    files = _ours()
    if with_wheels:
        files |= {f"site/{name}": path for name, path in wheels.files().items()}
    if programs is not None:
        programs_there = (path for path in programs.iterdir() if path.is_file() and os.access(path, os.X_OK))
        files |= {f"programs/{path.name}": path for path in programs_there}
    return _tar(files)


def _tar(files: dict[str, Path]) -> bytes:
    """Return an archive of files under the names given; packed, as the guest's network is slow."""

    def root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname, member.gname = "root", "wheel"
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for name, path in sorted(files.items()):
            tar.add(path, name, recursive=False, filter=root)
    return buffer.getvalue()


def _ours() -> dict[str, Path]:
    """Return the files of pykq and of the tests that run in the guest."""
    folders = ("pykq", "tests/rules", "tests/guest")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests").glob("__pycache__/*"), ROOT / "README.md"]
    return {str(path.relative_to(ROOT)): path for path in paths if wheels.goes(path)}
