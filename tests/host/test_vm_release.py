"""A release comes whole and checked from a mirror, whatever the server does, or not at all."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cmp_to_key
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from vm import archive, cache, clean, config, image, mirror, pkgsrc, programs, source
from vm import release as release_
from vm.log import Failure, step

SETS = "NetBSD/NetBSD-10.1/source/sets"
SRC = f"{SETS}/src.tgz"
ALL = "pkgsrc/packages/NetBSD/amd64/10.1/All"
GPG = ["gpg", "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"]
CUT = 2 * mirror._CHUNK_BYTES  # bytes of a file that arrive before the server cuts it


class Server(ThreadingHTTPServer):
    """Serves a folder, and does wrong what it is told to: faults maps a path to what happens to it."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, Callable[[Handler, bytes], object]] = {}
        self.asked: list[tuple[str, str]] = []  # path and Range of each request
        self.over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.strip("/")
        self.server.asked.append((path, self.headers.get("Range", "")))
        file = self.server.folder / path
        if file.is_dir():
            self.reply(200, "".join(f'<a href="{one.name}/">' for one in file.iterdir()).encode())
        elif not file.is_file():
            self.send_error(404)
        else:
            fault = self.server.faults.get(path.removeprefix("pub/"), Handler.whole)
            fault(self, file.read_bytes())

    def reply(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def whole(self, body: bytes) -> None:
        begin = self.begin()
        self.reply(206 if begin else 200, body[begin:])

    def begin(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def cut(self, body: bytes) -> None:
        """Send CUT bytes of what is left, and say that it is all of it."""
        begin = self.begin()
        self.reply(206 if begin else 200, body[begin : begin + CUT], len(body) - begin)

    def cut_once(self, body: bytes) -> None:
        self.whole(body) if self.begin() else self.cut(body)

    def cut_and_forget(self, body: bytes) -> None:
        """Cut the first time, and not know what a Range is the second time."""
        first = sum(path == self.path.strip("/") for path, _ in self.server.asked) == 1
        self.reply(200, body[:CUT] if first else body, len(body))

    def stall(self, body: bytes) -> None:
        self.reply(200, body[:CUT], len(body))
        self.server.over.wait(30)

    def trickle(self, body: bytes) -> None:
        """Send a byte now and then for some seconds, each well within the limit for one."""
        begin = self.begin()
        self.reply(206 if begin else 200, body[begin : begin + 300], len(body) - begin)
        with suppress(OSError):
            for byte in body[begin + 300 : begin + 400]:
                self.wfile.write(bytes([byte]))
                self.server.over.wait(0.05)

    def wrong(self, body: bytes) -> None:
        self.reply(200, body[:-1] + bytes([body[-1] ^ 1]))

    def page(self, body: bytes) -> None:
        self.reply(200, b"<!DOCTYPE html>\n<html>Welcome to the hotel's network</html>")

    def log_message(self, *words: object) -> None:
        pass


def tar(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz" if path.name.endswith("xz") else "w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content), 1_700_000_000, 0o664
            out.addfile(member, io.BytesIO(content))
        for member in more:
            out.addfile(member)
    return path


def write_sums(folder: Path) -> None:
    files = [path for path in sorted(folder.iterdir()) if path.name != "SHA512"]
    lines = [f"SHA512 ({path.name}) = {hashlib.sha512(path.read_bytes()).hexdigest()}" for path in files]
    (folder / "SHA512").write_text("\n".join(lines) + "\n")


def package(folder: Path, name: str, *depends: str) -> str:
    """Make a package; return its record in pkg_summary."""
    path = tar(folder / f"{name}.tgz", {"+CONTENTS": f"@name {name}\n".encode(), f"lib/{name}": b"x"})
    sha1 = hashlib.sha1(path.read_bytes()).hexdigest()
    fields = [("PKGNAME", name), ("FILE_NAME", path.name), ("FILE_SIZE", path.stat().st_size)]
    fields.append(("FILE_CKSUM", f"SHA1 {sha1}"))
    return "".join(f"{key}={value}\n" for key, value in [*fields, *(("DEPENDS", one) for one in depends)])


def fill(release: Path, tree: Path) -> None:
    """Lay out a release like an official one: the source sets, three binary sets, their SHA512."""
    noise = {"usr/src/noise": hashlib.shake_128(b"pykq").digest(20 * CUT)}
    parts: dict[str, dict[str, bytes]] = {"syssrc": {}, "sharesrc": {}, "src": noise}
    for path in tree.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(tree))
            part = {"sys": "syssrc", "common": "syssrc", "share": "sharesrc"}.get(name.split("/")[0], "src")
            parts[part][f"usr/src/{name}"] = path.read_bytes()
    parts["gnusrc"] = {"usr/src/external/gpl3/gcc/README": b"gcc"}
    for part, files in parts.items():
        tar(release / f"source/sets/{part}.tgz", files)
    for part in ("base", "comp", "etc"):
        tar(release / f"amd64/binary/sets/{part}.tar.xz", {f"./{part}": b"x"})
    for folder in (release / "source/sets", release / "amd64/binary/sets"):
        write_sums(folder)


@pytest.fixture
def pub(tmp_path: Path, tree: Path) -> Path:
    """A folder laid out like cdn.NetBSD.org/pub, with one release and its packages."""
    top = tmp_path / "server/pub"
    fill(top / "NetBSD/NetBSD-10.1", tree)
    folder = top / ALL
    records = [
        package(folder, "python310-3.10.9", "none-[0-9]*"),
        package(folder, "python311-3.11.9", "libffi>=3.3nb1"),
        package(folder, "python312-3.12.4nb1", "libffi>=3.3nb1", "{readline,editline}-[0-9]*"),
        package(folder, "libffi-3.4.6", "gettext-lib"),
        package(folder, "libffi-3.3"),
        package(folder, "gettext-lib-0.22"),
        package(folder, "editline-3.1", "libffi>3<4"),
        package(folder, "py312-setuptools-70.0"),
    ]
    (folder / "pkg_summary.gz").write_bytes(gzip.compress("\n".join(records).encode()))
    return top


@pytest.fixture
def server(pub: Path) -> Iterator[Server]:
    """A web server for the folder pub, below /pub."""
    with Server(pub.parent) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's keyring out of the tests."""
    (tmp_path / "gnupg").mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(tmp_path / "gnupg"))


def get(server: Server, *parts: str, **chosen: str) -> config.Settings:
    return release_.resolve(config.load(release="10.1", mirror=f"{server.url}/pub", **chosen), *parts)


def left() -> list[str]:
    """The files that the cache holds, without its locks."""
    top = config.load().cache
    files = [path for path in top.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(str(path.relative_to(top)) for path in files)


def test_release_becomes_a_source_tree_sets_and_a_python(server: Server) -> None:
    settings = get(server)
    assert settings.source is not None
    assert settings.sets is not None
    assert settings.python is not None
    assert source.identify(settings.source).version == "10.99.12"
    assert [path.name for path in image.set_archives(settings.sets)] == ["base.tar.xz", "etc.tar.xz"]
    assert [path.name for path in image._packages(settings.python)] == [
        "editline-3.1.tgz",
        "gettext-lib-0.22.tgz",
        "libffi-3.4.6.tgz",
        "python312-3.12.4nb1.tgz",
    ]


def test_second_time_asks_no_server(server: Server) -> None:
    first = get(server)
    server.asked.clear()
    assert get(server) == first
    assert server.asked == []


def test_source_archives_do_not_stay(server: Server) -> None:
    get(server, "source")
    assert [name for name in left() if "source/" not in name] == ["pins.json", "release/10.1/manifest.json"]


def test_folder_serves_as_well(pub: Path) -> None:
    for name in (pub, pub / "NetBSD"):
        settings = release_.resolve(config.load(release="10.1", mirror=str(name)))
        assert settings.source == settings.cache / "release/10.1/source"
        shutil.rmtree(settings.cache)


def test_folder_that_is_no_mirror_is_named(tmp_path: Path) -> None:
    with pytest.raises(mirror.Missing, match=f"{tmp_path}/{SETS}/SHA512: no such file"):
        release_.resolve(config.load(release="10.1", mirror=str(tmp_path)), "source")


def test_gnu_sources_come_for_gcc_only_and_later(server: Server) -> None:
    first = get(server, "source").source
    assert first is not None
    assert not (first / "external/gpl3").exists()
    server.asked.clear()
    assert get(server, "source", toolchain="gcc").source == first
    assert [path for path, _ in server.asked if path.endswith(".tgz")] == [f"pub/{SETS}/gnusrc.tgz"]
    assert (first / "external/gpl3/gcc/README").read_bytes() == b"gcc"
    assert (first / "build.sh").exists()


def test_large_folders_that_nothing_is_built_from_are_left_out(pub: Path, server: Server) -> None:
    tar(pub / SETS / "sharesrc.tgz", {"usr/src/crypto/a": b"a", "usr/src/share/mk/bsd.own.mk": b"b"})
    write_sums(pub / SETS)
    found = get(server, "source").source
    assert found is not None
    assert (found / "share/mk/bsd.own.mk").exists()
    assert not (found / "crypto").exists()


def test_cut_download_goes_on_where_it_was_cut(server: Server) -> None:
    server.faults[SRC] = Handler.cut_once
    get(server, "source")
    assert [wanted for path, wanted in server.asked if path.endswith(SRC)] == ["", f"bytes={CUT}-"]


def test_server_without_ranges_sends_it_all_again(server: Server) -> None:
    server.faults[SRC] = Handler.cut_and_forget
    found = get(server, "source").source
    assert found is not None
    assert (found / "noise").stat().st_size == 20 * CUT


def test_what_came_before_the_last_cut_serves_the_next_command(server: Server) -> None:
    server.faults[SRC] = Handler.cut
    with pytest.raises(mirror.Unreachable, match=rf"{SRC}: the connection failed or was cut") as caught:
        get(server, "source")
    have = mirror._TRIES * CUT
    assert f"goes on after {have} bytes" in caught.value.hint
    assert [Path(name).suffix for name in left() if "/.src.tgz" in name] == [".part"]
    del server.faults[SRC]
    server.asked.clear()
    get(server, "source")
    assert (f"pub/{SRC}", f"bytes={have}-") in server.asked


def test_stalled_server_is_left_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_STALLED_AFTER_S", 0.3)
    server.faults[SRC] = Handler.stall
    began = time.monotonic()
    with pytest.raises(mirror.Unreachable, match=f"{SRC}: nothing came for"):
        get(server, "source")
    assert time.monotonic() - began < 10


def test_server_that_trickles_is_left_in_time_and_what_came_is_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_STALLED_AFTER_S", 0.4)
    server.faults[SRC] = Handler.trickle
    began = time.monotonic()
    with pytest.raises(mirror.Unreachable, match=rf"{SRC}: \d+ bytes came in") as caught:
        get(server, "source")
    assert time.monotonic() - began < 10
    assert re.search(r"goes on after \d{4} bytes", caught.value.hint)
    server.faults[f"{SETS}/SHA512"] = Handler.trickle
    server.faults[SRC] = Handler.whole
    with pytest.raises(mirror.Unreachable, match=r"SHA512: \d+ bytes came in"):
        get(server, "source")
    del server.faults[f"{SETS}/SHA512"]
    get(server, "source")


def test_web_page_is_known_by_its_beginning_however_it_is_cut() -> None:
    page = b"\n <!DOCTYPE html>\n<html>"
    with pytest.raises(Failure, match="gives a web page"):
        list(mirror._no_page("url", (bytes([one]) for one in page)))
    assert b"".join(mirror._no_page("url", iter([b"<", b"xml", bytes(999)]))) == b"<xml" + bytes(999)
    assert b"".join(mirror._no_page("url", iter([]))) == b""


def test_long_list_in_small_pieces_is_read_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pieces = 1 << 16

    @contextmanager
    def opened(url: str, *, page: bool) -> Iterator[tuple[int, int, Iterator[bytes]]]:
        yield 0, 0, (bytes(64) for _ in range(pieces))

    monkeypatch.setattr(mirror, "_opened", opened)
    began = time.monotonic()
    assert len(mirror.Mirrors(("",), tmp_path / "pins.json").read("x")) == 64 * pieces
    assert time.monotonic() - began < 3, "it took 14 s when each piece copied all before it"


@pytest.mark.parametrize(
    ("path", "fault", "complaint"),
    [
        (SRC, Handler.wrong, f"{SRC} is not what the mirror's SHA512 list says"),
        (SRC, Handler.page, f"{SRC} gives a web page, not the file"),
        (f"{SETS}/SHA512", Handler.page, f"{SETS}/SHA512 gives a web page, not the file"),
        (f"{ALL}/pkg_summary.gz", Handler.page, "pkg_summary.gz gives a web page, not the file"),
        (f"{ALL}/libffi-3.4.6.tgz", Handler.page, r"libffi-3\.4\.6\.tgz gives a web page, not the file"),
        (SRC, lambda self, body: self.send_error(404), f"{SRC}: HTTP 404 Not Found"),
        (f"{SETS}/SHA512", lambda self, body: self.send_error(404), f"{SETS}/SHA512: HTTP 404 Not Found"),
        (f"{SETS}/SHA512", lambda self, body: self.send_error(503), "HTTP 503 Service Unavailable"),
        (f"{SETS}/SHA512", lambda self, body: self.reply(200, b"nothing"), f"{SETS}/SHA512 lists no SHA512"),
        (f"{ALL}/pkg_summary.gz", lambda self, body: self.reply(200, b"x"), "not a compressed list"),
        (f"{ALL}/libffi-3.4.6.tgz", lambda self, body: self.reply(200, body[:-1]), "has not the size"),
        (f"{ALL}/libffi-3.4.6.tgz", Handler.wrong, "has not the size or checksum that is listed"),
    ],
)
def test_what_a_server_does_wrong_is_one_line_and_leaves_no_half_file(
    server: Server, path: str, fault: Callable[[Handler, bytes], object], complaint: str
) -> None:
    server.faults[path] = fault
    with pytest.raises(Failure, match=complaint) as caught:
        get(server, "python" if path.startswith("pkgsrc") else "source")
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value) + caught.value.hint
    assert caught.value.hint
    name = path.rpartition("/")[2]
    assert not any(Path(one).name.startswith((name, f".{name}")) for one in left())
    del server.faults[path]
    get(server)


def test_nobody_listening_is_one_line_with_the_ways_on() -> None:
    with Server(Path("/")) as nobody:
        port = nobody.server_port
    began = time.monotonic()
    with pytest.raises(mirror.Unreachable, match=f"http://127.0.0.1:{port}/") as caught:
        release_.resolve(config.load(release="10.1", mirror=f"http://127.0.0.1:{port}/pub"))
    assert time.monotonic() - began < 5
    assert all(way in caught.value.hint for way in ("--mirror", "--source", "--sets"))


def test_next_mirror_is_asked_when_one_fails(server: Server, tmp_path: Path) -> None:
    mirrors = mirror.Mirrors((f"{server.url}/none", f"{server.url}/pub"), tmp_path / "pins.json")
    listed = mirrors.read(f"{SETS}/SHA512").decode()
    sha512 = next(line for line in listed.splitlines() if "(src.tgz)" in line)[-128:]
    with step("test") as work:
        found = mirrors.fetch(SRC, tmp_path / "to", work, sha512=sha512)
    assert cache.file_digest(found) == cache.file_digest(server.folder / "pub" / SRC)


def test_two_releases_that_pin_at_once_lose_no_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def read(path: Path) -> dict[str, object]:
        pins = cache.read_json(path)
        with suppress(threading.BrokenBarrierError):  # the other one waits for its turn
            both.wait(0.3)
        return pins

    monkeypatch.setattr(mirror, "read_json", read)
    mirrors = mirror.Mirrors(("",), tmp_path / "pins.json")
    pin = [threading.Thread(target=mirrors._pin, args=(name, "0")) for name in "ab"]
    for thread in pin:
        thread.start()
    for thread in pin:
        thread.join()
    assert cache.read_json(mirrors.pins) == {"a": "0", "b": "0"}


def test_file_that_has_changed_on_the_mirror_is_an_error(pub: Path, server: Server) -> None:
    settings = get(server)
    for name in ("release/10.1/source", "release/10.1/python", "release/10.1/manifest.json"):
        path = settings.cache / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tar(pub / SETS / "syssrc.tgz", {"usr/src/sys/new.c": b"new"})
    write_sums(pub / SETS)
    with pytest.raises(Failure, match=r"syssrc\.tgz is not the file that it was when") as caught:
        get(server, "source")
    assert str(settings.cache / "pins.json") in caught.value.hint
    same_size = (pub / ALL / "libffi-3.4.6.tgz").read_bytes()
    (pub / ALL / "libffi-3.4.6.tgz").write_bytes(same_size[:-1] + b"x")
    with pytest.raises(Failure, match=r"libffi-3\.4\.6\.tgz is not the file that it was when"):
        get(server, "python")


def test_what_is_named_is_not_taken_from_the_release(server: Server, tmp_path: Path) -> None:
    settings = get(server, source="/own", sets="/own/sets", python="/own/python.tgz")
    assert (settings.source, settings.sets) == (Path("/own"), Path("/own/sets"))
    assert server.asked == []


def test_release_on_the_command_line_wins_over_a_source_in_the_file() -> None:
    config.config_file().write_text('source = "/file"\npython = "/file.tgz"\n')
    assert config.load().release == ""
    chosen = config.load(release="10.1", sets="/line")
    assert (chosen.source, chosen.sets, chosen.python) == (None, Path("/line"), None)


def test_newest_release_is_the_default_without_a_source() -> None:
    assert config.load().release == config.NEWEST
    assert config.load(source="/usr/src").release == ""


@pytest.mark.parametrize("url", ["ftp://ftp.NetBSD.org/pub", "file:///pub"])
def test_mirror_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(Failure, match=f"no mirror '{url}'"):
        config.load(mirror=url)


@pytest.mark.parametrize("name", ["../11.0", "11", "11.0/..", "HEAD", "11.0 "])
def test_release_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(Failure, match="is not the name of a release"):
        config.load(release=name)


def test_current_is_the_newest_whole_daily_build_and_stays_it(
    pub: Path, server: Server, tree: Path
) -> None:
    head = pub / "NetBSD-daily/HEAD"
    fill(head / "20261120101010Z", tree)
    fill(head / "20261121101010Z", tree)
    (head / "20261122101010Z/source").mkdir(parents=True)
    settings = config.load(release="current", mirror=f"{server.url}/pub")
    release_.resolve(settings, "source")
    fill(head / "20261123101010Z", tree)
    server.asked.clear()
    release_.resolve(settings, "sets")
    assert {path.split("/")[3] for path, _ in server.asked} == {"20261121101010Z"}


def test_parts_of_current_are_of_one_build_when_the_mirror_drops_it(
    pub: Path, server: Server, tree: Path
) -> None:
    head = pub / "NetBSD-daily/HEAD"
    fill(head / "20261120101010Z", tree)
    settings = config.load(release="current", mirror=f"{server.url}/pub")
    source_ = release_.resolve(settings, "source").source
    assert source_ is not None
    shutil.rmtree(head / "20261120101010Z")
    with pytest.raises(Failure, match="no whole daily build"):
        release_.resolve(settings, "sets")
    assert release_.resolve(settings, "source").source == source_, "nothing is dropped without a better one"
    (tree / "new").write_text("new")
    fill(head / "20261121101010Z", tree)
    with pytest.raises(Failure, match=r"20261120101010Z is gone .* 20261121101010Z takes") as caught:
        release_.resolve(settings, "sets")
    assert caught.value.hint == "run the same command again"
    release_.resolve(settings, "source", "sets")
    assert (source_ / "new").exists()


def test_current_that_was_not_begun_takes_the_next_build_by_itself(
    pub: Path, server: Server, tree: Path
) -> None:
    head = pub / "NetBSD-daily/HEAD"
    fill(head / "20261120101010Z", tree)
    settings = config.load(release="current", mirror=f"{server.url}/pub")
    release_.Release(settings).reach()
    (head / "20261120101010Z").rename(head / "20261121101010Z")
    assert release_.resolve(settings, "sets").sets is not None


def test_folder_without_daily_builds_is_named(pub: Path) -> None:
    with pytest.raises(mirror.Missing, match=r"NetBSD-daily/HEAD: no such file"):
        release_.resolve(config.load(release="current", mirror=str(pub)), "source")


def test_current_says_that_its_lists_are_not_checked(
    pub: Path, server: Server, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(pub / "NetBSD-daily/HEAD/20261120101010Z", tree)
    release_.resolve(config.load(release="current", mirror=f"{server.url}/pub"), "source")
    assert "NetBSD current: signature not checked (daily builds" in capsys.readouterr().out


# Signatures


def sign(pub: Path) -> Path:
    """Sign the list of the hashes of all that is below NetBSD, as NetBSD does."""
    lines = []
    for path in sorted((pub / "NetBSD").rglob("SHA512")):
        folder = path.parent.relative_to(pub / "NetBSD")
        lines.append(path.read_text().replace("(", f"({folder}/"))
    target = pub / "NetBSD/security/hashes/NetBSD-10.1_hashes.asc"
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*GPG, "--yes", "--clear-sign", "-o", str(target)]
    subprocess.run(command, input="".join(lines).encode(), check=True)
    return target


@pytest.fixture
def signed(pub: Path) -> Iterator[Path]:
    """The list of the release's hashes, signed with a key that the keyring has as NetBSD's."""
    if shutil.which("gpg") is None:
        pytest.skip("gpg not found (apt-get install gnupg)")
    who = f"NetBSD Security Officer <{release_.SIGNER}>"
    try:
        subprocess.run([*GPG, "--quick-generate-key", who, "ed25519", "sign", "never"], check=True)
        yield sign(pub)
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], check=True)


def test_signed_list_that_agrees_is_accepted(
    server: Server, signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get(server, "source")
    assert "not checked" not in capsys.readouterr().out


def test_hash_that_was_not_signed_is_refused(pub: Path, server: Server, signed: Path) -> None:
    tar(pub / SRC, {"usr/src/evil": b"evil"})
    write_sums(pub / SETS)
    with pytest.raises(Failure, match=r"of source/sets/src\.tgz is not the one that .* signed"):
        get(server, "source")


def test_list_that_was_changed_after_signing_is_refused(server: Server, signed: Path) -> None:
    signed.write_text(signed.read_text().replace("src.tgz) = ", "src.tgz) = 0", 1))
    with pytest.raises(Failure, match="has no good signature"):
        get(server, "source")


def test_list_signed_by_somebody_else_is_refused(
    server: Server, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vm.signature._keys", lambda: {"0" * 40})
    with pytest.raises(Failure, match="has no good signature"):
        get(server, "source")


def test_signed_list_of_another_release_is_refused(pub: Path, server: Server, signed: Path) -> None:
    (pub / "NetBSD/NetBSD-10.1").rename(pub / "NetBSD/NetBSD-9.4")
    sign(pub)
    (pub / "NetBSD/NetBSD-9.4").rename(pub / "NetBSD/NetBSD-10.1")
    with pytest.raises(Failure, match=r"is not the one that .* signed"):
        get(server, "source")


def test_server_without_the_signed_list_does_not_switch_the_check_off(server: Server, signed: Path) -> None:
    signed.unlink()
    with pytest.raises(Failure, match=f"signature not checked .*{signed.name}: HTTP 404") as caught:
        get(server, "source")
    assert "--mirror" in caught.value.hint
    assert not any("src" in name for name in left())


def test_folder_without_the_signed_list_is_one_line(
    pub: Path, signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signed.unlink()
    release_.resolve(config.load(release="10.1", mirror=str(pub)))
    assert capsys.readouterr().out.count("signature not checked") == 1


def test_missing_key_is_one_line_that_takes_it_from_no_mirror(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    get(server)
    said = capsys.readouterr().out
    assert said.count("signature not checked (gpg --fetch-keys https://cdn.NetBSD.org/pub/NetBSD/") == 1
    assert server.url not in said


# Archives


def attack(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, mode
    return member


@pytest.mark.parametrize(
    "member",
    [
        attack("../evil"),
        attack("usr/src/../../../evil"),
        attack("usr/src/evil", tarfile.SYMTYPE, "/etc"),
        attack("usr/src/evil", tarfile.SYMTYPE, "build.sh"),
        attack("usr/src/evil", tarfile.LNKTYPE, "/etc/passwd"),
        attack("usr/src/evil", tarfile.CHRTYPE),
        attack("usr/src/evil", tarfile.BLKTYPE),
        attack("usr/src/evil", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.type.decode()}",
)
def test_hostile_source_set_is_refused(pub: Path, server: Server, member: tarfile.TarInfo) -> None:
    tar(pub / SRC, {"usr/src/build.sh": b""}, member)
    write_sums(pub / SETS)
    with pytest.raises(Failure, match=re.escape("src.tgz: the member ")):
        get(server, "source")
    assert not any("source/" in name or "source.part/" in name for name in left())
    assert not any("evil" in name for name in left())


def test_file_outside_the_source_is_left_where_it_is(pub: Path, server: Server) -> None:
    outside = attack("/etc/evil"), attack("etc/evil"), attack("usr/evil", tarfile.CHRTYPE)
    tar(pub / SETS / "sharesrc.tgz", {"usr/src/share/mk/bsd.own.mk": b"b"}, *outside)
    write_sums(pub / SETS)
    get(server, "source")
    assert not any("evil" in name for name in left())


def unpack(target: Path, *archives: Path, links: bool = True) -> None:
    with step("test") as work:
        archive.unpack(archives, target, lambda name: name.removeprefix("usr/src/"), work, links=links)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    link = attack("lib/a", tarfile.SYMTYPE, str(tmp_path / "victim"))
    path = tar(tmp_path / "set.tgz", {}, link, attack("lib/a/evil"))
    with pytest.raises(Failure, match="lib/a"):
        unpack(tmp_path / "to", path)
    assert list((tmp_path / "victim").iterdir()) == []


def test_nothing_is_written_through_a_link_of_an_archive_before(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    base = tar(tmp_path / "base.tgz", {}, attack("lib/a", tarfile.SYMTYPE, str(tmp_path / "victim")))
    comp = tar(tmp_path / "comp.tgz", {"lib/a/evil": b"evil"})
    with pytest.raises(Failure, match="lib/a"):
        unpack(tmp_path / "to", base, comp)
    assert list((tmp_path / "victim").iterdir()) == []


def test_sysroot_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    link = attack("./usr/lib/a", tarfile.SYMTYPE, str(tmp_path / "victim"))
    tar(tmp_path / "sets/base.tgz", {}, link)
    tar(tmp_path / "sets/comp.tgz", {"./usr/lib/a/evil": b"evil"})
    with pytest.raises(Failure, match="usr/lib/a"):
        programs._sysroot(config.load(sets=str(tmp_path / "sets")))
    assert list((tmp_path / "victim").iterdir()) == []


def test_link_to_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "set.tgz", {}, attack("lib/a", tarfile.LNKTYPE, "lib/none"))
    with pytest.raises(Failure, match=r"set\.tgz: .*none"):
        unpack(tmp_path / "to", path)


def test_later_file_takes_the_place_of_a_link(tmp_path: Path) -> None:
    base = tar(tmp_path / "base.tgz", {}, attack("lib/a", tarfile.SYMTYPE, "b"))
    comp = tar(tmp_path / "comp.tgz", {"lib/a": b"a"})
    unpack(tmp_path / "to", base, comp)
    assert not (tmp_path / "to/lib/a").is_symlink()


@pytest.mark.parametrize("headers", [{"path": "usr/src/a\0b"}, {"mtime": "1e30"}, {"mtime": "nan"}])
def test_value_that_no_file_can_have_is_one_failure(tmp_path: Path, headers: dict[str, str]) -> None:
    member = attack("usr/src/a")
    member.pax_headers = headers
    path = tar(tmp_path / "src.tgz", {}, member)
    with pytest.raises(Failure, match=re.escape(str(path))):
        unpack(tmp_path / "to", path, links=False)


def test_links_of_a_set_lead_where_they_did(tmp_path: Path) -> None:
    links = attack("lib/a", tarfile.SYMTYPE, "b.so.1"), attack("lib/c", tarfile.LNKTYPE, "./lib/b.so.1")
    path = tar(tmp_path / "set.tgz", {"./lib/b.so.1": b"b"}, *links)
    unpack(tmp_path / "to", path)
    assert (tmp_path / "to/lib/a").read_bytes() == b"b"
    assert (tmp_path / "to/lib/c").samefile(tmp_path / "to/lib/b.so.1")


def test_source_file_has_no_special_bits_and_its_time(tmp_path: Path) -> None:
    path = tar(tmp_path / "src.tgz", {"usr/src/a": b"a"}, attack("usr/src/su", mode=0o6777))
    unpack(tmp_path / "to", path, links=False)
    assert (tmp_path / "to/su").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "to/a").stat().st_mode & 0o7777 == 0o644
    assert (tmp_path / "to/a").stat().st_mtime == 1_700_000_000


# Packages

versions = st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){0,2}(alpha1|beta|rc2|pl1|a)?(nb[0-9])?", fullmatch=True)


@given(versions, versions, versions)
def test_versions_have_one_order(a: str, b: str, c: str) -> None:
    assert (pkgsrc.compare(a, b) > 0) == (pkgsrc.compare(b, a) < 0)
    assert pkgsrc.compare(a, a) == 0
    low, middle, high = sorted([a, b, c], key=cmp_to_key(pkgsrc.compare))
    assert pkgsrc.compare(low, middle) <= 0
    assert pkgsrc.compare(low, high) <= 0


@given(versions, versions)
def test_relations_say_what_the_order_says(version: str, bound: str) -> None:
    order = pkgsrc.compare(version, bound)
    for operator, holds in {"<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0}.items():
        assert pkgsrc.matches(f"a-b{operator}{bound}", f"a-b-{version}") is holds
        assert not pkgsrc.matches(f"a{operator}{bound}", f"a-b-{version}")


@given(versions, st.integers(0, 9))
def test_package_revision_counts_last(version: str, revision: int) -> None:
    base = version.partition("nb")[0]
    assert pkgsrc.compare(f"{base}nb{revision + 1}", f"{base}nb{revision}") > 0
    assert pkgsrc.compare(f"{base}.1", f"{base}nb9") > 0


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.0alpha2", "1.0beta1"),
        ("1.0beta1", "1.0rc1"),
        ("1.0rc1", "1.0"),
        ("1.0", "1.0a"),
        ("1.0", "1.0nb1"),
        ("1.9", "1.10"),
        ("3.13.0", "3.13.1nb2"),
    ],
)
def test_known_versions_are_in_order(older: str, newer: str) -> None:
    assert pkgsrc.compare(older, newer) < 0


@pytest.mark.parametrize(
    ("one", "other"), [("1.0", "1"), ("1.0pre1", "1.0rc1"), ("1.0pl0", "1.0"), ("1a", "1.1")]
)
def test_different_spellings_of_one_version_are_equal(one: str, other: str) -> None:
    assert pkgsrc.compare(one, other) == 0


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("libffi-[0-9]*", "libffi-3.4", True),
        ("libffi-[0-9]*", "libffi-devel-3.4", False),
        ("libffi", "libffi-3.4", True),
        ("libffi-3.4", "libffi-3.4", True),
        ("libffi-3.4", "libffi-3.4nb1", False),
        ("libffi>=3.3<4", "libffi-3.4", True),
        ("libffi>=3.3<4", "libffi-4.0", False),
        ("{a,b}-[0-9]*", "b-1", True),
        ("{a>=2,{b,c}>=1}", "c-1", True),
        ("{a>=2,{b,c}>=1}", "a-1", False),
        ("p{y,erl}{3,}-1", "perl-1", True),
    ],
)
def test_pattern_fits_as_pkg_install_says(pattern: str, name: str, fits: bool) -> None:
    assert pkgsrc.matches(pattern, name) is fits


names = st.sampled_from(["a", "bc", "d-e", "f"])


@given(st.lists(names, min_size=1, max_size=3), names)
def test_alternatives_fit_when_one_of_them_does(choices: list[str], name: str) -> None:
    assert pkgsrc.matches("{" + ",".join(choices) + "}-[0-9]*", f"{name}-1.0") is (name in choices)


def test_package_that_needs_itself_in_a_ring_is_taken_once() -> None:
    one = pkgsrc.Package("a-1", "a.tgz", 0, None, ("b>=1",))
    other = pkgsrc.Package("b-1", "b.tgz", 0, None, ("a",))
    assert pkgsrc.closure([one, other], one) == [one, other]


def test_missing_dependency_is_named() -> None:
    lone = pkgsrc.Package("a-1", "a.tgz", 0, None, ("b>=2",))
    with pytest.raises(Failure, match="a-1 needs b>=2"):
        pkgsrc.closure([lone, pkgsrc.Package("b-1", "b.tgz", 0, None, ())], lone)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30))
def test_package_file_names_lead_nowhere_else(name: str) -> None:
    summary = gzip.compress(f"PKGNAME=a-1\nFILE_NAME={name}\n".encode())
    try:
        found = pkgsrc.parse(summary)
    except ValueError:
        return
    assert all("/" not in one.file and not one.file.startswith(".") for one in found)


def rewrite_summary(pub: Path, change: Callable[[str], str]) -> None:
    path = pub / ALL / "pkg_summary.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()).decode()).encode()))


def without_checksums(text: str) -> str:
    return re.sub("FILE_CKSUM=.*\n", "", text)


@pytest.mark.parametrize(
    "change", [without_checksums, lambda text: text.replace("SHA1", "SHAKE_128")], ids=["none", "unknown"]
)
def test_package_without_a_checksum_is_refused(
    pub: Path, server: Server, change: Callable[[str], str]
) -> None:
    rewrite_summary(pub, change)
    with pytest.raises(Failure, match=r"\.tgz: no checksum of it is listed") as caught:
        get(server, "python")
    assert server.url in str(caught.value)
    assert not any(name.endswith(".tgz") for name in left())


def test_folder_without_checksums_of_packages_is_one_line_a_package(
    pub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_summary(pub, without_checksums)
    release_.resolve(config.load(release="10.1", mirror=str(pub)), "python")
    assert capsys.readouterr().out.count("no checksum of it is listed") == 4


def test_list_beside_the_packages_stands_in_for_their_checksums(pub: Path, server: Server) -> None:
    rewrite_summary(pub, without_checksums)
    lines = [
        f"SHA512 (All/{path.name}) = {hashlib.sha512(path.read_bytes()).hexdigest()}\n"
        for path in (pub / ALL).iterdir()
    ]
    (pub / ALL).with_name("SHA512.bz2").write_bytes(bz2.compress("".join(lines).encode()))
    server.faults[f"{ALL}/libffi-3.4.6.tgz"] = Handler.wrong
    with pytest.raises(Failure, match=r"libffi-3\.4\.6\.tgz is not what the mirror's SHA512 list says"):
        get(server, "python")
    del server.faults[f"{ALL}/libffi-3.4.6.tgz"]
    get(server, "python")


def test_list_that_unpacks_without_end_is_refused(
    pub: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pkgsrc, "_LIST_BYTES", 1 << 20)
    (pub / ALL).with_name("SHA512.bz2").write_bytes(bz2.compress(bytes(2 << 20)))
    rewrite_summary(pub, without_checksums)
    with pytest.raises(Failure, match=r"SHA512\.bz2: it unpacks to more than 1 MiB"):
        get(server, "python")
    (pub / ALL / "pkg_summary.gz").write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(Failure, match=r"pkg_summary\.gz: it unpacks to more than 1 MiB"):
        get(server, "python")


# Cleaning


def test_clean_removes_what_the_settings_do_not_use(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = get(server)
    assert settings.source is not None
    name = source.identify(settings.source).name
    used = [f"build/{name}-clang/tools", f"rump/{name}/stock", "release/10.1/python"]
    unused = ["build/10.1-abcdef-clang/tools", "rump/10.1-abcdef", "image/0123456789ab", "release/9.4"]
    for folder in used + unused:
        (settings.cache / folder).mkdir(parents=True, exist_ok=True)
        (settings.cache / folder / "file").write_bytes(bytes(3 << 20))
    clean.clean(config.load(release="10.1"), dry_run=True)
    assert "would free    12 MiB of" in capsys.readouterr().out
    assert all((settings.cache / folder).exists() for folder in used + unused)
    clean.clean(config.load(release="10.1"))
    assert "freed    12 MiB of" in capsys.readouterr().out
    assert all((settings.cache / folder / "file").exists() for folder in used)
    assert not any((settings.cache / folder).exists() for folder in unused)


def test_clean_all_leaves_nothing_but_its_own_log_and_what_is_not_ours(server: Server) -> None:
    get(server)
    ours = ["accelerators.json", "bench-host.json", "bench/full.json", "bench/host.json"]
    ours += ["bench/throughput.svg", "hosts/nb1-22.xml", "image/.lock", "log/build-kernel.log", "log/up.log"]
    ours += ["regress/libkqueue-test", "run/a/.lock", "run/a/console.log", "stress/corpus/0a"]
    ours += ["stress/crash-0a", "suite/.lock"]
    ours += ["stress/patched-2.xml", "timings/clean.json"]
    others = ["build/mine/file", "log/clean.log", "log/kern.log", "mine.json", "run/dbus/pid"]
    top = config.load().cache
    for name in ours + others:
        cache.write_whole(top / name, "x")
    before = left()
    clean.clean(config.load(release="10.1"), everything=True, dry_run=True)
    assert left() == before
    clean.clean(config.load(release="10.1"), everything=True)
    assert left() == sorted(others)
    assert list(top.rglob(".lock")) == []
    folders = {path.name for path in top.iterdir() if path.is_dir()}
    assert not folders & {"bench", "hosts", "regress", "stress", "suite", "timings"}
    assert not (top / "run/a").exists()


def test_clean_knows_the_log_of_every_command() -> None:
    commands = {name.rpartition(".")[2] for name in tasks.namespace.task_names}
    assert commands == {*clean._COMMANDS.split("|"), "clean"}


@contextmanager
def clean_waits_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, everything: bool = False
) -> Iterator[Path]:
    """Hold a folder as somebody who works in it does, until clean() waits for that and the context ends."""
    waits = threading.Event()
    monkeypatch.setattr(cache, "say", lambda text: waits.set())
    with ThreadPoolExecutor(1) as pool:
        with cache.locked(folder):
            done = pool.submit(clean.clean, config.load(release="10.1"), everything=everything)
            assert waits.wait(5)
            yield folder
        done.result()


@contextmanager
def guest(image: Path, folder: Path, sockets: Path) -> Iterator[None]:
    """What a guest that runs leaves in the cache, and the lock that its QEMU holds."""
    sockets.mkdir()
    fields = {"name": folder.name, "variant": "stock", "netbsd": "10.1", "kernel": "/k", "boot": "pvh"}
    fields |= {"folder": str(folder), "image": str(image), "sockets": str(sockets)}
    with (sockets / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.write_whole(folder / "machine.json", json.dumps(fields))
        yield


@pytest.mark.parametrize("kind", ["image", "sysroot"])
def test_clean_waits_for_what_is_being_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config.load().cache / kind
    cache.write_whole(folder / "0123456789ab.part/file", "x")
    with clean_waits_for(folder, monkeypatch):
        (folder / "0123456789ab.part").rename(folder / "0123456789ab")
    assert (folder / "0123456789ab/file").exists()


def test_clean_waits_for_a_build_before_it_takes_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    top = config.load().cache
    cache.write_whole(top / "release/9.4/source/file", "x")
    with clean_waits_for(top / "build/9.4-abcdef-clang", monkeypatch):
        assert (top / "release/9.4/source/file").exists()
    assert not (top / "release/9.4").exists()


def test_clean_leaves_the_image_of_a_guest_that_was_started_while_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    top = config.load().cache
    used = top / "image/0123456789ab"
    cache.write_whole(used / "root.img", "x")
    with ExitStack() as stack, clean_waits_for(top / "image", monkeypatch):
        stack.enter_context(guest(used, top / "run/late", tmp_path / "sockets"))
    assert (used / "root.img").exists()
    assert f"guest late runs: {used} stays (invoke vm.down --name late)" in capsys.readouterr().out


def test_clean_all_leaves_the_folder_of_a_guest_that_was_started_while_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.load().cache / "run/late"
    with ExitStack() as stack, clean_waits_for(folder, monkeypatch, everything=True):
        stack.enter_context(guest(tmp_path, folder, tmp_path / "sockets"))
    assert (folder / "machine.json").exists()
    assert "guest late runs" in capsys.readouterr().out


def test_clean_all_with_a_guest_that_runs_removes_nothing(tmp_path: Path, server: Server) -> None:
    get(server, "sets")
    before = left()
    top = config.load().cache
    runs = guest(tmp_path, top / "run/a", tmp_path / "sockets")
    with runs, pytest.raises(Failure, match="guest a runs") as caught:
        clean.clean(config.load(release="10.1"), everything=True)
    assert caught.value.hint == "invoke vm.down --name a"
    assert left() == sorted([*before, "run/a/machine.json"])


def test_clean_takes_what_an_interrupted_download_left(server: Server) -> None:
    server.faults[SRC] = Handler.cut
    with pytest.raises(Failure):
        get(server, "source")
    assert any(name.endswith(".part") for name in left())
    clean.clean(config.load(release="10.1"))
    assert left() == ["pins.json"]
