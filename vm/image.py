"""The guest's disk image: binary sets, Python and vm/guest/, made by makefs without root rights."""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from py_compile import PycInvalidationMode

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from . import wheels
from .archive import inside, opened
from .build import MACHINE, Builder, make_tool
from .cache import digest, locked, read_json, whole_folder, write_whole
from .config import Settings
from .log import Failure, Step, step
from .patches import NoFit
from .run import need, run
from .upstream import PAGE, manual_page

GUEST = Path(__file__).resolve().parent / "guest"

# The sets that a guest is made of, and the endings they come with.
SETS = ("base", "etc")
ENDINGS = (".tar.xz", ".tgz")

# What goes into the image from vm/guest/, and where.
_FILES = {
    "boot.cfg": ("boot.cfg", 0o644),
    "environment": ("root/.ssh/environment", 0o600),
    "fstab": ("etc/fstab", 0o644),
    "pam_login": ("etc/pam.d/login", 0o644),
    "rc": ("etc/rc", 0o755),
    "sshd_config": ("etc/ssh/sshd_config", 0o600),
    "ttys": ("etc/ttys", 0o644),
}

# NetBSD's own programs that make an image, in the order of their needs (tools/).
_TOOLS = ("pax", "mtree", "makefs", "disklabel", "installboot")

_SECTOR_BYTES = 512
_FREE_MIB = 256
_FREE_INODES = 20000


@dataclass(frozen=True)
class Image:
    """A disk image that is never written to, and the keys that were made with it."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The root disk: a disklabel, and one FFS on partition a."""
        return self.folder / "root.img"

    @property
    def manifest(self) -> Path:
        """What it was made from; it is there when the image is whole."""
        return self.folder / "manifest.json"

    @property
    def key(self) -> Path:
        """The private key that root's sshd accepts, mode 0600."""
        return self.folder / "id_ed25519"

    @property
    def host_key(self) -> str:
        """The guest's public host key, as known_hosts has it: type and base64."""
        return (self.folder / "host_ed25519.pub").read_text().strip()


@dataclass
class _Root:
    """The file tree of an image in the making: contents on disk, everything else in an mtree spec."""

    folder: Path
    spec: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: bytes, mode: int) -> Path:
        """Add a file that belongs to root; return where it is."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        self.spec[name] = f"type=file uid=0 gid=0 mode={mode:04o}"
        return path

    def write_spec(self, path: Path) -> None:
        """Write the spec for makefs, parents before what is in them."""
        for name in list(self.spec):
            for parent in PurePosixPath(name).parents:
                self.spec.setdefault(str(parent), "type=dir uid=0 gid=0 mode=0755")
        lines = ["#mtree 2.0", ". type=dir uid=0 gid=0 mode=0755"]
        lines += [f"./{_quote(name)} {self.spec[name]}" for name in sorted(self.spec) if name != "."]
        path.write_text("\n".join(lines) + "\n")


def build_image(builder: Builder, kernel: Path | None = None, *, sets: Sequence[str] = SETS) -> Image:
    """Make the image, or find the one that was made from the same parts.

    With kernel the image boots by itself: the kernel is in it, and the boot
    blocks.  Raises Failure for sets or a Python that are not there or are not
    what they should be, BuildFailed when a program fails.
    """
    image = image_of(builder, kernel, sets=sets)
    with locked(image.folder.parent):
        image.folder.parent.chmod(0o700)  # there are private keys on the disks
        if read_json(image.manifest):
            return image
        archives, page = _archives(builder.settings, sets), _manual_page(builder)
        tools = image_tools(builder)
        with step("guest image") as work, whole_folder(image.folder) as folder:
            part = Image(folder)
            _make(part, archives, page, kernel, tools, work)
            made_of = {"parts": _stamps(archives), "kernel": str(kernel)}
            write_whole(part.manifest, json.dumps(made_of, indent=1))
        return image


def image_of(builder: Builder, kernel: Path | None = None, *, sets: Sequence[str] = SETS) -> Image:
    """Return where build_image() leaves an image, which may not be there yet; raise its Failures."""
    ours = {path.name: path.read_text() for path in sorted(GUEST.iterdir())}
    boots = None if kernel is None else _stamps([kernel])
    made_by = sys.implementation.cache_tag  # _compile_python
    parts = _stamps(_archives(builder.settings, sets))
    key = digest(parts, ours, wheels.folder(), _manual_page(builder), boots, made_by)
    return Image(builder.settings.cache / "image" / key)


def _archives(settings: Settings, sets: Sequence[str]) -> list[Path]:
    """Return what a guest's files come from: binary sets, then Python."""
    if settings.sets is None:
        raise Failure(
            "no binary sets for the guest",
            hint="--sets DIR, PYKQ_SETS or the configuration file names a folder with base and etc",
        )
    if settings.python is None:
        raise Failure(
            "no Python for the guest",
            hint="--python FILE, PYKQ_PYTHON or the configuration file names a tarball rooted at usr/pkg",
        )
    return set_archives(settings.sets, sets) + _packages(settings.python)


def _stamps(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what tells files from what was or will be at their paths."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _make(
    image: Image, archives: list[Path], page: str, kernel: Path | None, tools: Path, work: Step
) -> None:
    """Fill a folder with an image and its keys."""
    root = _Root(image.folder / "root")
    root.folder.mkdir(parents=True)
    for archive in archives:
        work.update(archive.name)
        if archive.name == "METALOG":
            _take_destdir(archive, root)
        else:
            _unpack(archive, root)
    _compile_python(root, work)
    for name, (target, mode) in _FILES.items():
        root.add(target, (GUEST / name).read_bytes(), mode)
    for name, path in wheels.files().items():
        copy = root.add(f"{wheels.folder()}/{name}", path.read_bytes(), 0o644)
        shutil.copystat(path, copy)  # its time, which its bytecode names
    if page:
        root.add("usr/share/man/man2/kqueue.2", page.encode(), 0o444)
    _add_keys(image, root)
    _add_devices(root)
    if kernel is not None:
        root.add("netbsd", kernel.read_bytes(), 0o755)
        root.add("boot", (root.folder / "usr/mdec/boot").read_bytes(), 0o444)
    spec = image.folder / "spec"
    root.write_spec(spec)
    work.update("makefs")
    command: list[str | Path] = [tools / "nbmakefs", "-t", "ffs", "-B", "le"]
    command += ["-o", "version=2,bsize=16384,fsize=2048"]
    command += ["-b", f"{_FREE_MIB}m"]
    command += ["-f", str(_FREE_INODES)]
    command += ["-Z"]  # free blocks take no room on the host
    command += ["-F", spec]
    command += ["-N", root.folder / "etc"]
    run([*command, image.disk, root.folder])
    label = image.folder / "label"
    label.write_text(_disklabel(image.disk.stat().st_size // _SECTOR_BYTES))
    run([tools / "nbdisklabel", "-M", MACHINE, "-B", "le", "-R", "-F", image.disk, label])
    if kernel is not None:
        command = [tools / "nbinstallboot", "-m", MACHINE, "-o", "timeout=0"]
        run([*command, image.disk, root.folder / "usr/mdec/bootxx_ffsv2"])
    shutil.rmtree(root.folder)


def image_tools(builder: Builder) -> Path:
    """Build the programs that make images, once, with the wrapper that build.sh left; return their folder."""
    folder = builder.tools / "bin"
    if not (folder / "nbmake-amd64").exists():
        raise Failure("the host tools are not built", hint="invoke build-kernel")
    if all((folder / f"nb{name}").exists() for name in _TOOLS):
        return folder
    need("cc")
    with step("image tools"), locked(builder.root):
        for name in _TOOLS:
            make_tool(builder, name)
    return folder


def set_archives(sets: Path, names: Sequence[str] = SETS) -> list[Path]:
    """Return the archives of a sets folder, or the METALOG of a DESTDIR."""
    if (sets / "METALOG").is_file():
        return [sets / "METALOG"]
    if not sets.is_dir():
        raise Failure(f"{sets}: no such folder", hint="--sets names a folder with base.tgz and etc.tgz")
    found = []
    for name in names:
        paths = [sets / f"{name}{ending}" for ending in ENDINGS if (sets / f"{name}{ending}").is_file()]
        if not paths:
            raise Failure(f"{sets} has no {name}.tar.xz or .tgz", hint="a release has amd64/binary/sets")
        found.append(paths[0])
    return found


def _packages(python: Path) -> list[Path]:
    """Return the archives that bring Python: one tarball, or a folder of pkgsrc packages."""
    if python.is_file():
        return [python]
    found = sorted(path for path in python.glob("*") if path.name.endswith((".tgz", ".tar.xz", ".txz")))
    if not found:
        raise Failure(
            f"{python}: no such tarball, and no folder of packages",
            hint="--python names a tarball rooted at usr/pkg, or a folder of pkgsrc binary packages",
        )
    return found


def _manual_page(builder: Builder) -> str:
    """Return kqueue(2) of the source tree with the ioctl; '' where that has no page, or no place in it."""
    try:
        return manual_page((builder.source.top / PAGE).read_text())
    except (FileNotFoundError, NoFit):
        return ""


def _unpack(archive: Path, root: _Root) -> None:
    """Add an archive's files to a root; owners, modes, links and devices go to the spec only.

    A pkgsrc package (its first member is +CONTENTS) is taken as relative to
    usr/pkg.  A name that leads out of the root is refused.
    """
    prefix = ""
    with opened(archive) as tar:
        for member in tar:
            if member.name.startswith("+"):
                prefix = "usr/pkg"
                continue
            name = inside(f"{prefix}/{member.name}", archive)
            if name != ".":
                _add_member(tar, member, name, root, prefix)


def _add_member(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, root: _Root, prefix: str) -> None:
    """Add one member of an archive under a checked name."""
    path = root.folder / name
    common = f"uid={member.uid} gid={member.gid} mode={member.mode:04o}"
    if member.isfile() or member.islnk():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    if member.isfile():
        content = tar.extractfile(member)
        assert content is not None
        with path.open("wb") as out:
            shutil.copyfileobj(content, out, 1 << 20)
        os.utime(path, (member.mtime, member.mtime))  # Python compares it with what its bytecode says
        root.spec[name] = f"type=file {common}"
    elif member.islnk():
        target = inside(f"{prefix}/{member.linkname}", Path(str(tar.name)))
        os.link(root.folder / target, path)
        root.spec[name] = root.spec[target]
    elif member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        root.spec[name] = f"type=dir {common}"
    elif member.issym():
        with suppress(FileNotFoundError):
            path.unlink()
        root.spec[name] = f"type=link link={_quote(member.linkname)} {common}"


def _take_destdir(metalog: Path, root: _Root) -> None:
    """Add the files of a DESTDIR that its METALOG lists."""
    for line in metalog.read_text(errors="surrogateescape").splitlines():
        name, _, keywords = line.partition(" ")
        name = inside(_unquote(name), metalog)
        kind = re.search(r"\btype=(\w+)", keywords)
        if kind is None or name == ".":
            continue
        words = [word for word in keywords.split() if not word.startswith("tags=")]
        owned = any(word.startswith(("uname=", "uid=")) for word in words)
        root.spec[name] = " ".join(words if owned else [*words, "uid=0", "gid=0"])
        path = root.folder / name
        if kind[1] == "dir":
            path.mkdir(parents=True, exist_ok=True)
        elif kind[1] == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            shutil.copyfile(metalog.parent / name, path)


def _compile_python(root: _Root, work: Step) -> None:
    """Compile the library of a Python that comes without bytecode, if this Python makes the same bytecode.

    A package of pkgsrc has it.  Without it a start takes seconds, and each guest pays.
    """
    library = root.folder / "usr/pkg/lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not library.is_dir() or (library / "__pycache__").is_dir():
        return
    work.update("compiling Python's library")
    compileall.compile_dir(
        library,
        quiet=2,
        rx=re.compile(r"/(test|tests|idlelib|lib2to3|turtledemo|ensurepip)/"),
        stripdir=root.folder,
        prependdir="/",
        invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
        workers=0,
    )
    for path in library.rglob("*.pyc"):
        root.spec[str(path.relative_to(root.folder))] = "type=file uid=0 gid=0 mode=0644"


def _add_devices(root: _Root) -> None:
    """Put the device nodes into the spec: MAKEDEV(8) of the sets writes it."""
    need("sh")
    makedev = root.folder / "dev/MAKEDEV"
    if not makedev.is_file():
        raise Failure("the sets have no dev/MAKEDEV", hint="is the etc set whole?")
    done = subprocess.run(
        ["sh", makedev, "-s", "all"],
        cwd=root.folder / "dev",
        env={"PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        name, _, keywords = line.partition(" ")
        if "type=" in keywords and name != ".":
            root.spec[f"dev/{inside(name, makedev)}"] = keywords
    if "dev/console" not in root.spec:
        raise Failure(f"MAKEDEV -s listed no devices: {done.stderr.strip()[:200]}", hint="see makedev(8)")


def _add_keys(image: Image, root: _Root) -> None:
    """Make a key to log in with and the guest's host key, and put their halves where they belong."""
    login, host = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    write_whole(image.key, _private(login), 0o600)
    write_whole(image.folder / "host_ed25519.pub", _public(host) + "\n")
    root.add("etc/ssh/authorized_keys", f"{_public(login)}\n".encode(), 0o600)
    root.add("etc/ssh/ssh_host_ed25519_key", _private(host), 0o600)
    root.add("etc/ssh/ssh_host_ed25519_key.pub", f"{_public(host)}\n".encode(), 0o644)


def _private(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _disklabel(sectors: int) -> str:
    """Return a disklabel(5) prototype: partition a is the whole disk, and so is d, the raw one of x86."""
    cylinders = sectors // (16 * 63)
    return f"""type: ESDI
disk: pykq
label: pykq
flags:
bytes/sector: {_SECTOR_BYTES}
sectors/track: 63
tracks/cylinder: 16
sectors/cylinder: {16 * 63}
cylinders: {cylinders}
total sectors: {sectors}
rpm: 3600
interleave: 1
trackskew: 0
cylinderskew: 0
headswitch: 0
track-to-track seek: 0
drivedata: 0

4 partitions:
 a: {sectors} 0 4.2BSD 2048 16384 0
 d: {sectors} 0 unused 0 0
"""


def _quote(name: str) -> str:
    """Encode a name as mtree(5) wants it: space, backslash, # and what does not print as octal."""
    plain = set(range(0x21, 0x7F)) - set(b"\\#*?[")
    raw = name.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in raw)


def _unquote(name: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), name)
