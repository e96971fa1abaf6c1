"""What the host tests share: a source tree made of the ports' own context lines, and a kernel for QEMU."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from shutil import which

import pytest

from vm import patches, qemu

PATIENCE_S = 120.0

NEEDED = {
    "build.sh": "",
    "common/include/prop/proplib.h": "",
    "share/mk/bsd.own.mk": "",
    "tools/Makefile": "",
    "usr.bin/make/main.c": "",
    "sys/sys/param.h": "#define\t__NetBSD_Version__\t1099001200\t/* NetBSD 10.99.12 */\n",
}


def before(port: patches.Port) -> dict[str, str]:
    """Return, for each file a port changes, a text that has its hunks' old lines where they belong."""
    texts: dict[str, list[str]] = {}
    name, line = "", 0
    for text in port.path.read_text().splitlines():
        if text.startswith("--- a/"):
            name = text[6:]
            texts[name] = []
        elif match := re.match(r"@@ -(\d+)", text):
            line = int(match[1]) - 1
            texts[name] += [f"/* line {n} */" for n in range(len(texts[name]), line)]
        elif text[:1] in (" ", "-") and not text.startswith("---"):
            texts[name].append(text[1:])
    return {name: "\n".join(lines) + "\n" for name, lines in texts.items()}


@pytest.fixture
def texts_before() -> Callable[[patches.Port], dict[str, str]]:
    """before(), for a patch that is none of the ports."""
    return before


@pytest.fixture(params=patches.ports(), ids=lambda port: port.name)
def port(request: pytest.FixtureRequest) -> patches.Port:
    """Each of the ports."""
    assert isinstance(request.param, patches.Port)
    return request.param


@pytest.fixture
def old_texts(port: patches.Port) -> dict[str, str]:
    """The files that the port changes, by name, as far as the port tells what is in them."""
    return before(port)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder that looks like NetBSD 10.99.12 to vm.source, and that the first port fits."""
    top = tmp_path / "src"
    for name, text in (NEEDED | before(patches.ports()[0])).items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    kern_event = top / "sys/kern/kern_event.c"
    ident = "/*\t$" + "NetBSD: kern_event.c,v 1.150 2023/09/21 $\t*/"
    kern_event.write_text(kern_event.read_text().replace("/* line 0 */", ident, 1))
    return top


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own configuration and cache out of the tests."""
    for name in [name for name in os.environ if name.startswith("PYKQ_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "config.toml"
    config.write_text("")
    monkeypatch.setenv("PYKQ_CONFIG", str(config))
    monkeypatch.setenv("PYKQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def test_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel of kernel.S, made by clang."""
    if not all(map(which, (qemu.QEMU, "clang", "ld"))):
        pytest.skip("needs QEMU and clang: invoke doctor --install")
    path = tmp_path_factory.mktemp("kernel") / "kernel"
    command = ["clang", "--target=i386-linux-gnu", "-nostdlib", "-static", "-Wl,-Ttext-segment=0x100000"]
    subprocess.run([*command, Path(__file__).with_name("kernel.S"), "-o", path], check=True)
    return path


def programs(folder: Path) -> list[int]:
    """The processes of which the command line or the environment names something in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if bytes(folder) in words:
            found.append(int(path.name))
    return found


def eventually(fact: Callable[[], object]) -> None:
    """Return when something has become true."""
    deadline = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)
