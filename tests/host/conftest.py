"""What the host tests share: a source tree made of nothing but the ports' own context lines."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from vm import patches

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
