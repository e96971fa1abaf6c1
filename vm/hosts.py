"""The guest tests on real NetBSD machines, at the same time: a Fabric group."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from fabric import Config, Connection, ThreadingGroup
from fabric.exceptions import GroupException
from paramiko import RejectPolicy, SSHException

from . import guest
from .log import Failure

# pytest's status and output.
Result: TypeAlias = tuple[int, str]


class _Host(Connection):  # type: ignore[misc]
    """A machine of the user's, reached with the user's keys, agent and ssh_config."""

    def log_in(self) -> None:
        """Open the connection, if known_hosts has the machine's key."""
        for name in shlex.split(self.ssh_config.get("userknownhostsfile", "~/.ssh/known_hosts")):
            if Path(name).expanduser().is_file():
                self.client.load_system_host_keys(str(Path(name).expanduser()))
        self.client.set_missing_host_key_policy(RejectPolicy())  # Fabric's own takes any key
        self.open()

    def test(self, reports: Path, chosen: Sequence[str]) -> Result:
        """Run the guest tests; nothing of them is left on the machine."""
        self.log_in()
        return guest.run_tests(self, reports / f"{self.original_host}-{self.port}.xml", chosen)


class _Hosts(ThreadingGroup):  # type: ignore[misc]
    """Machines that are tested at the same time."""

    def test(self, reports: Path, chosen: Sequence[str]) -> dict[_Host, Result | Exception]:
        """Run the guest tests on each."""
        try:
            done: dict[_Host, Result | Exception] = self._do("test", reports, chosen)
        except GroupException as error:
            done = error.result
        return done


def test(
    names: Sequence[str], reports: Path, chosen: Sequence[str], *, ssh_config: Path | None = None
) -> dict[str, Result | Failure]:
    """Run the guest tests on hosts; return what pytest came to, or why it did not run, by name.

    A name is a host of the user's ssh_config, or user@host:port; known_hosts
    must have its key.  chosen are words for pytest.  JUnit XML comes into the
    folder reports.
    """
    config = _config(ssh_config)
    connections = {name: _Host(name, config=config) for name in names}
    with _Hosts.from_connections(connections.values()) as group:
        done = group.test(reports, chosen)
    return {name: _explained(name, done[connection]) for name, connection in connections.items()}


@contextmanager
def connect(name: str, *, ssh_config: Path | None = None) -> Iterator[Connection]:
    """Log in to one host, named as for test(), for as long as the context lasts."""
    connection = _Host(name, config=_config(ssh_config))
    try:
        connection.log_in()
        yield connection
    except (SSHException, OSError, EOFError) as error:
        raise _failure(name, error) from error
    finally:
        connection.close()


def _config(ssh_config: Path | None) -> Config:
    """Return Fabric's configuration with the user's ssh_config, or another one."""
    if ssh_config is not None and not ssh_config.is_file():
        raise Failure(f"{ssh_config}: no such file", hint="--ssh-config names an ssh_config(5)")
    return Config(runtime_ssh_path=str(ssh_config) if ssh_config else None, overrides=guest.OVERRIDES)


def _explained(name: str, result: Result | Exception) -> Result | Failure:
    """Make a Failure of what SSH or the system did not do."""
    if isinstance(result, Exception) and not isinstance(result, Failure):
        return _failure(name, result)
    return result


def _failure(name: str, error: Exception) -> Failure:
    """Say what SSH or the system did not do."""
    what = str(error).strip() or type(error).__name__
    return Failure(f"{name}: {what}", hint=f"does 'ssh {name}' log in without a question?")
