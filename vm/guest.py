"""Work inside a guest, through Fabric: commands, files, tests, the demo."""

from __future__ import annotations

import io
import logging
import shlex
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import paramiko
from fabric import Config, Connection
from invoke.exceptions import CommandTimedOut, UnexpectedExit

from .cache import digest
from .log import Failure, GuestDied, TestsFailed, printable, step
from .qemu import Machine

ROOT = Path(__file__).resolve().parent.parent

# What runs the tests in the guest: pure Python, taken as it is installed here.
_WHEELS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")

# Where it lies in the guest.
_HOME = "/root/pykq"

_CONNECT_WITHIN_S = 5
_TESTS_WITHIN_S = 900


# Its threads write tracebacks of their own; what matters arrives here as an exception.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class _Screen(io.StringIO):
    """A stream to the user's terminal that lets no control characters through."""

    def write(self, text: str) -> int:
        sys.stdout.write(printable(text))
        sys.stdout.flush()
        return len(text)


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
        config=Config(ssh_config=paramiko.SSHConfig()),
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
        connection.open()
        watch.start()
        yield connection
    except (paramiko.SSHException, OSError, EOFError, CommandTimedOut) as error:
        machine.raise_if_dead()
        raise GuestDied(
            f"the connection to guest {machine.name} failed: {error}",
            hint=f"its console is in {machine.console_log}",
        ) from error
    except UnexpectedExit as error:
        machine.raise_if_dead()
        result = error.result
        raise Failure(
            f"in the guest, {result.command!r} ended with status {result.exited}", tail=result.stderr[-2000:]
        ) from error
    finally:
        ended.set()
        with suppress(Exception):
            connection.close()


def _close_on_death(machine: Machine, connection: Connection, ended: threading.Event) -> None:
    """Close the connection when the guest dies, so that what waits on it ends."""
    while not ended.wait(0.5):
        if machine.death():
            connection.close()
            return


def install(connection: Connection, **variables: str) -> str:
    """Copy pykq, its tests and pytest into the guest; return the command that starts its Python.

    variables are added to that Python's environment.

    What does not change while a guest lives is copied once.
    """
    found = connection.run("ls -d /usr/pkg/bin/python3.[0-9]*", hide=True, warn=True).stdout.split()
    pythons = [path for path in found if path.rpartition(".")[2].isdigit()]
    if not pythons:
        raise Failure("the guest has no Python 3 in /usr/pkg/bin", hint="--python names the one to install")
    python = max(pythons, key=lambda path: int(path.rpartition(".")[2]))
    site = f"{_HOME}/site-{digest([metadata.version(name) for name in _WHEELS])}"
    if not connection.run(f"test -d {site}", hide=True, warn=True).ok:
        with step("pytest into the guest"):
            _send(connection, _tar(_distributions()), f"{site}.part")
            connection.run(f"mv {site}.part {site}", hide=True)
    _send(connection, _tar(_ours()), f"{_HOME}/work")
    variables |= {"PYTHONPATH": f".:{site}", "PYTHONUNBUFFERED": "1"}
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    return f"cd {_HOME}/work && env {settings} {python}"


def run_tests(machine: Machine, junit: Path, selection: str = "") -> None:
    """Run tests/rules and tests/guest in a guest, streaming the output; bring the JUnit XML back.

    Raises TestsFailed when a test failed, GuestDied when the guest did.
    """
    with connect(machine) as connection:
        python = install(connection, PYKQ_EXPECT=machine.variant)
        chosen = f"-k {shlex.quote(selection)}" if selection else ""
        result = connection.run(
            f"{python} -m pytest -c /dev/null --rootdir . -p no:cacheprovider --import-mode=importlib -ra -q"
            f" --junitxml=/tmp/junit.xml {chosen} tests/rules tests/guest",
            out_stream=_Screen(),
            err_stream=_Screen(),
            warn=True,
            timeout=_TESTS_WITHIN_S,
        )
        machine.raise_if_dead()
        junit.parent.mkdir(parents=True, exist_ok=True)
        if connection.run("test -f /tmp/junit.xml", hide=True, warn=True).ok:
            connection.get("/tmp/junit.xml", str(junit))
    if result.exited:
        what = f"tests failed in the {machine.variant} guest (pytest status {result.exited})"
        raise TestsFailed(what, hint=f"see {junit}")


def run_module(machine: Machine, module: str, *arguments: str, show: bool = True) -> str:
    """Run a module of pykq in a guest; return its output, which show puts on the screen, too."""
    with connect(machine) as connection:
        python = install(connection)
        result = connection.run(
            " ".join([python, "-m", module, *arguments]),
            hide=not show,
            out_stream=_Screen() if show else None,
            err_stream=_Screen() if show else None,
            warn=True,
            timeout=_TESTS_WITHIN_S,
        )
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


def _send(connection: Connection, archive: bytes, folder: str) -> None:
    """Unpack a tar archive into a new folder of the guest."""
    connection.run(f"rm -rf {folder} && mkdir -p {folder}", hide=True)
    connection.put(io.BytesIO(archive), "/tmp/pykq.tar")
    connection.run(f"tar -xf /tmp/pykq.tar -C {folder} && rm /tmp/pykq.tar", hide=True)


def _tar(files: dict[str, Path]) -> bytes:
    """Return a tar archive of files under the names given."""

    def root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname, member.gname = "root", "wheel"
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, path in sorted(files.items()):
            tar.add(path, name, recursive=False, filter=root)
    return buffer.getvalue()


def _ours() -> dict[str, Path]:
    """Return the files of pykq and of the tests that run in the guest."""
    folders = ("pykq", "tests/rules", "tests/guest")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += (ROOT / "tests").glob("*.py")
    return {str(path.relative_to(ROOT)): path for path in paths if "__pycache__" not in path.parts}


def _distributions() -> dict[str, Path]:
    """Return the files of the wheels that pytest consists of, as installed here."""
    files: dict[str, Path] = {}
    for name in _WHEELS:
        entries: Any = metadata.files(name) or ()
        for entry in entries:
            if ".." not in entry.parts and "__pycache__" not in entry.parts:
                files[str(entry)] = Path(entry.locate())
    return files
