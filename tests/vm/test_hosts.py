"""The guest tests on machines of the user's: here two guests that the user's ssh_config knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm import guest, hosts, qemu
from vm.log import Failure

ONE = ("-k", "test_t1_a_thread_asleep_returns_eintr")


@pytest.fixture
def ssh_config(machines: list[qemu.Machine], tmp_path: Path) -> Path:
    """The guests are named one and other; strange is one of them, whose key nobody has seen yet."""
    path = tmp_path / "config"
    known = [f"UserKnownHostsFile {machine.folder}/known_hosts" for machine in machines]
    entries = zip(("one", "other", "strange"), [*machines, machines[0]], [*known, ""], strict=True)
    path.write_text("".join(
        f"Host {name}\n HostName 127.0.0.1\n Port {machine.ssh_port}\n User root\n"
        f" IdentityFile {machine.image}/id_ed25519\n IdentitiesOnly yes\n {known_hosts}\n"
        for name, machine, known_hosts in entries
    ))
    return path


def test_they_are_tested_at_the_same_time(
    ssh_config: Path, machines: list[qemu.Machine], tmp_path: Path
) -> None:
    done = hosts.test(["one", "other"], tmp_path, ONE, ssh_config=ssh_config)
    for name, result in done.items():
        assert not isinstance(result, Failure), result
        assert result[0] == 0, result[1]
        assert len(list(tmp_path.glob(f"{name}-*.xml"))) == 1
    for report in tmp_path.glob("*.xml"):
        assert 'tests="1"' in report.read_text()
    with guest.connect(machines[0]) as connection:
        assert connection.run("ls -d /tmp/pykq-*", hide=True, warn=True).failed, "nothing is left there"


def test_one_that_cannot_be_reached_does_not_keep_the_others(ssh_config: Path, tmp_path: Path) -> None:
    done = hosts.test(["one", "root@127.0.0.1:1"], tmp_path, ONE, ssh_config=ssh_config)
    assert not isinstance(done["one"], Failure)
    assert isinstance(done["root@127.0.0.1:1"], Failure)
    assert "ssh root@127.0.0.1:1" in done["root@127.0.0.1:1"].hint


def test_one_whose_key_is_not_known_is_refused(
    ssh_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/known_hosts").write_text("")
    done = hosts.test(["strange"], tmp_path, ONE, ssh_config=ssh_config)
    assert isinstance(done["strange"], Failure)
    assert "not found in known_hosts" in str(done["strange"])
