"""invoke install, on a guest that boots its disk's own /netbsd as a real machine does."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from vm import config, guest, image, install, qemu
from vm.build import kernel_folder, select
from vm.cache import file_digest, read_json
from vm.log import Failure

SETTINGS = config.load()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[qemu.Machine]:
    """A guest with the stock kernel on its disk, that may reboot."""
    builder = select(SETTINGS)
    kernel = kernel_folder(builder, "stock") / "netbsd"
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    name = f"install-{secrets.token_hex(3)}"
    wanted = qemu.Machine(
        name=name,
        variant="stock",
        netbsd=builder.source.version,
        kernel=str(kernel),
        boot="disk",
        folder=str(qemu.folder_of(SETTINGS, name)),
        disk=str(disk),
    )
    try:
        yield qemu.start(SETTINGS, wanted, partial(image.build_image, builder, kernel), saved=False)
    finally:
        qemu.down(SETTINGS, name)


@pytest.fixture
def ssh_config(machine: qemu.Machine, tmp_path: Path) -> Path:
    """The guest is named box."""
    path = tmp_path / "config"
    path.write_text(
        f"Host box\n HostName 127.0.0.1\n Port {machine.ssh_port}\n User root\n"
        f" IdentityFile {machine.image}/id_ed25519\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {machine.folder}/known_hosts\n"
    )
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The folder of a patched kernel that is a byte longer."""
    patched = kernel_folder(select(SETTINGS), "patched")
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "netbsd").write_bytes((patched / "netbsd").read_bytes() + b"\0")
    manifest = read_json(patched / "manifest.json") | {"sha256": file_digest(folder / "netbsd")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def on(machine: qemu.Machine, command: str) -> str:
    with guest.connect(machine) as connection:
        output: str = connection.run(command, hide=True, warn=True, in_stream=False).stdout
    return output


def reboot(machine: qemu.Machine) -> None:
    def order() -> None:
        with guest.connect(machine) as connection:
            connection.client.exec_command("reboot")

    qemu.reboot(machine, order)


def test_the_kernel_is_installed_when_told_to_and_taken_back(
    machine: qemu.Machine,
    ssh_config: Path,
    other: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builder = select(SETTINGS)
    stock, patched = (
        read_json(kernel_folder(builder, variant) / "manifest.json")["sha256"]
        for variant in ("stock", "patched")
    )
    before = on(machine, "ls -l / && cksum -a SHA256 /netbsd")
    assert stock in before

    install.install(SETTINGS, "box", ssh_config=ssh_config)
    assert "with --yes it does" in capsys.readouterr().out
    assert on(machine, "ls -l / && cksum -a SHA256 /netbsd") == before, "nothing is touched"

    install.install(SETTINGS, "box", ssh_config=ssh_config, yes=True)
    assert "mv /onetbsd /netbsd" in capsys.readouterr().out
    assert patched in on(machine, "cksum -a SHA256 /netbsd")
    assert stock in on(machine, "cksum -a SHA256 /onetbsd")
    assert "pykq-stock" in on(machine, "uname -v")

    with monkeypatch.context() as patch:
        patch.setattr(install, "kernel_folder", lambda *_: other)
        with pytest.raises(Failure, match="does not run what is its /netbsd"):
            install.install(SETTINGS, "box", ssh_config=ssh_config, yes=True)
    assert stock in on(machine, "cksum -a SHA256 /onetbsd"), "which has booted"

    reboot(machine)
    assert "pykq-patched" in on(machine, "uname -v")
    install.install(SETTINGS, "box", ssh_config=ssh_config, yes=True)
    assert "is its /netbsd already" in capsys.readouterr().out

    on(machine, "mv /onetbsd /netbsd")
    reboot(machine)
    assert "pykq-stock" in on(machine, "uname -v")
