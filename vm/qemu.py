"""A guest under QEMU: its command line, its console, its life and its death."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from .backtrace import with_names
from .build import VARIANTS, kernel_folder, select
from .cache import locked, read_json, write_whole
from .config import Settings
from .image import Image, build_image
from .log import Failure, GuestDied, say, step, tail
from .run import need

QEMU = "qemu-system-x86_64"
READY = b"pykq: guest ready"  # vm/guest/rc prints it when sshd listens

# The kernel's first line: proof that the processor really runs it.
_ALIVE = b"The NetBSD Foundation"
_ALIVE_WITHIN_S = {"kvm": 4.0, "tcg": 60.0}
BOOT_WITHIN_S = 120.0

# Console text after which nothing good comes.
DEATH = re.compile(
    rb"panic: |fatal .* in supervisor mode|uvm_fault\(|db\{\d+\}>|Mutex error|cannot mount root"
    rb"|unknown device major|init died|ERROR: can't find /boot|not a bootable disk"
)


@dataclass(frozen=True)
class Machine:
    """A guest that runs, or ran: everything that another command needs to reach it."""

    name: str
    variant: str
    netbsd: str
    kernel: str
    image: str
    boot: str  # "pvh" or "disk"
    accelerator: str
    ssh_port: int
    pid: int
    sockets: str  # the folder of qmp and console, mode 0700
    folder: str
    started: float

    @property
    def console_log(self) -> Path:
        """All that the guest has printed on its serial console."""
        return Path(self.folder) / "console.log"

    @property
    def qmp(self) -> Path:
        """QEMU's control socket."""
        return Path(self.sockets) / "qmp"

    @property
    def console(self) -> Path:
        """The socket of the serial console."""
        return Path(self.sockets) / "console"

    def alive(self) -> bool:
        """Tell whether its QEMU runs: whether somebody listens on its control socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(str(self.qmp))
            except OSError:
                return False
        return True

    def death(self) -> str:
        """Return what killed the guest, '' while it seems to live."""
        match = DEATH.search(_read(self.console_log))
        if match is not None:
            return _line_at(_read(self.console_log), match.start())
        return "" if self.alive() else "QEMU has ended"

    def last_lines(self) -> str:
        """Return the end of its console, with names in a backtrace."""
        return with_names(tail(self.console_log, 25), Path(self.kernel))

    def raise_if_dead(self) -> None:
        """Raise GuestDied with the last console lines when the guest is dead."""
        cause = self.death()
        if cause:
            raise GuestDied(
                f"the guest died: {cause}",
                hint=f"its console is in {self.console_log}; invoke vm.up starts it again",
                tail=self.last_lines(),
            )


def folder_of(settings: Settings, name: str) -> Path:
    """Return the folder that holds a guest's state."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}", name):
        raise Failure(f"{name!r} is no name for a guest", hint="letters, digits, dot, dash and underscore")
    return settings.cache / "run" / name


def last(settings: Settings, name: str) -> Machine | None:
    """Return the guest of this name that was started last and not ended, dead or alive."""
    state = read_json(folder_of(settings, name) / "machine.json")
    try:
        return Machine(**state)
    except TypeError:  # none, or written by another version of pykq
        return None


def find(settings: Settings, name: str) -> Machine | None:
    """Return the guest of this name when it runs."""
    machine = last(settings, name)
    return machine if machine is not None and machine.alive() else None


def must_find(settings: Settings, name: str) -> Machine:
    """Return the guest of this name; raise Failure when it does not run."""
    machine = last(settings, name)
    if machine is None:
        raise Failure(f"guest {name} is not up", hint="invoke vm.up")
    machine.raise_if_dead()
    return machine


def status(settings: Settings, name: str, *, as_json: bool = False) -> bool:
    """Print what is known of a guest; return whether it runs."""
    machine = last(settings, name)
    death = machine.death() if machine is not None else ""
    up = machine is not None and not death
    if as_json:
        state = asdict(machine) if machine is not None else {}
        print(json.dumps({"name": name, "up": up, "death": death, **state}))
    elif machine is None:
        say(f"guest {name} is not up")
    elif death:
        say(f"guest {name} died: {death} (its console is in {machine.console_log})")
    else:
        say(
            f"guest {name} is up: NetBSD {machine.netbsd}, {machine.variant} kernel, {machine.boot} boot, "
            f"{machine.accelerator}, ssh on 127.0.0.1 port {machine.ssh_port}, pid {machine.pid}, "
            f"for {time.time() - machine.started:.0f} s"
        )
    return up


def command_line(machine: Machine, disk: Path, *, memory_mib: int, cpus: int) -> list[str]:
    """Return the QEMU command, an option and its value beside each other."""
    accelerator = "tcg,thread=multi" if machine.accelerator == "tcg" else machine.accelerator
    forward = f"hostfwd=tcp:127.0.0.1:{machine.ssh_port}-:22"
    line = [QEMU]
    line += ["-name", f"pykq-{machine.name}"]
    line += ["-nodefaults"]
    line += ["-no-user-config"]
    line += ["-no-reboot"]
    line += ["-display", "none"]
    line += ["-machine", "pc"]
    line += ["-accel", accelerator]
    if machine.accelerator == "kvm":
        line += ["-cpu", "host"]
    line += ["-smp", str(cpus)]
    line += ["-m", f"{memory_mib}M"]
    line += ["-chardev", f"socket,id=console,path={_value(machine.console)},server=on,wait=off,"
                         f"logfile={_value(machine.console_log)},logappend=off"]
    line += ["-serial", "chardev:console"]
    line += ["-qmp", f"unix:{_value(machine.qmp)},server=on,wait=off"]
    line += ["-drive", f"if=none,id=root,format=raw,snapshot=on,file={_value(disk)}"]
    line += ["-device", "virtio-blk-pci,drive=root"]
    line += ["-netdev", f"user,id=net,restrict=on,ipv6=off,{forward}"]
    line += ["-device", "virtio-net-pci,netdev=net,romfile="]
    line += ["-device", "virtio-rng-pci"]
    line += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    if machine.boot == "pvh":
        line += ["-kernel", machine.kernel]
        line += ["-append", "console=com root=ld0a"]
    return line


def up(
    settings: Settings,
    *,
    variant: str = "patched",
    name: str = "pykq",
    memory_mib: int = 512,
    cpus: int = 2,
    ssh_port: int = 0,
    dry_run: bool = False,
) -> Machine:
    """Start a guest and return when its sshd answers; a guest that runs is left as it is.

    Raises Failure when it cannot be started, and GuestDied, with the last
    console lines, when QEMU ends, the kernel panics or drops into ddb, or
    sshd does not listen within two minutes.
    """
    if variant not in VARIANTS:
        raise Failure(f"there is no kernel {variant!r}", hint=" or ".join(VARIANTS))
    folder = folder_of(settings, name)
    builder = select(settings)
    kernel = kernel_folder(builder, variant) / "netbsd"
    if not kernel.exists():
        raise Failure(f"there is no {variant} kernel", hint="invoke build-kernel")
    need(QEMU)
    manifest = read_json(kernel.parent / "manifest.json")
    with locked(folder):
        running = find(settings, name)
        if running is not None and running.death():
            say(f"guest {name} died ({running.death()}) and is started anew")
            _end(running)
        elif running is not None:
            if running.variant != variant or running.kernel != str(kernel):
                raise Failure(
                    f"guest {name} is up with the {running.variant} kernel of NetBSD {running.netbsd}",
                    hint="invoke vm.down first, or another --name",
                )
            say(f"guest {name} is up already, ssh on port {running.ssh_port}")
            return running
        if ssh_port and not _is_free(ssh_port):
            raise Failure(f"port {ssh_port} is in use", hint="without --port a free one is found")
        boot = "pvh" if manifest.get("pvh") else "disk"
        image = build_image(builder, None if boot == "pvh" else kernel)
        for accelerator in _accelerators(settings):
            machine = Machine(
                name=name,
                variant=variant,
                netbsd=builder.source.version,
                kernel=str(kernel),
                image=str(image.folder),
                boot=boot,
                accelerator=accelerator,
                ssh_port=ssh_port or _free_port(),
                pid=0,
                sockets=tempfile.mkdtemp(prefix="pykq-"),
                folder=str(folder),
                started=time.time(),
            )
            line = command_line(machine, image.disk, memory_mib=memory_mib, cpus=cpus)
            if dry_run:
                os.rmdir(machine.sockets)
                print(shlex.join(line))
                return machine
            try:
                return _boot(machine, line, image)
            except _NoAccelerator as error:
                say(f"{accelerator} is there but does not run NetBSD ({error}): software emulation instead")
                _remember(settings, accelerator)
    raise AssertionError("tcg is always tried")


class _NoAccelerator(Exception):
    """The accelerator does not run the guest."""


def _boot(machine: Machine, line: list[str], image: Image) -> Machine:
    """Start QEMU, wait until the guest is ready, and write its state down."""
    machine.console_log.unlink(missing_ok=True)
    how = f"{machine.boot} boot, {machine.accelerator}"
    with step(f"{machine.variant} guest {machine.name}, NetBSD {machine.netbsd}, {how}"):
        with (Path(machine.folder) / "qemu.log").open("wb") as errors:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
            )
        try:
            _wait_for_console(machine, process, _ALIVE, _ALIVE_WITHIN_S.get(machine.accelerator, 60.0))
            _wait_for_console(machine, process, READY, BOOT_WITHIN_S)
        except BaseException as error:
            _kill(process)
            shutil.rmtree(machine.sockets, ignore_errors=True)
            dumb = machine.accelerator != "tcg" and _ALIVE not in _read(machine.console_log)
            if dumb and isinstance(error, GuestDied):
                raise _NoAccelerator(str(error)) from error
            raise
        machine = Machine(**{**asdict(machine), "pid": process.pid})
        write_whole(Path(machine.folder) / "machine.json", json.dumps(asdict(machine), indent=1))
        write_whole(
            Path(machine.folder) / "known_hosts", f"[127.0.0.1]:{machine.ssh_port} {image.host_key}\n", 0o600
        )
    return machine


def _wait_for_console(
    machine: Machine, process: subprocess.Popen[bytes], wanted: bytes, within_s: float
) -> None:
    """Wait until the console shows wanted; raise GuestDied when it shows a death, QEMU ends or time is up."""
    deadline = time.monotonic() + within_s
    while True:
        ended = process.poll() is not None
        seen = _read(machine.console_log)
        if wanted in seen:
            return
        match = DEATH.search(seen)
        if match is not None:
            cause = _line_at(seen, match.start())
        elif ended:
            errors = tail(Path(machine.folder) / "qemu.log", 3)
            cause = f"QEMU ended with status {process.returncode} {errors}".rstrip()
        elif time.monotonic() > deadline:
            cause = f"no {wanted.decode()!r} on its console within {within_s:.0f} s"
        else:
            time.sleep(0.02)
            continue
        raise GuestDied(
            f"the guest did not start: {cause}",
            hint=f"its console is in {machine.console_log}",
            tail=machine.last_lines(),
        )


def down(settings: Settings, name: str = "pykq") -> bool:
    """End a guest; return False when there was none.

    The disk is a snapshot that goes with QEMU, so there is nothing to be saved
    by an orderly shutdown.
    """
    folder = folder_of(settings, name)
    with locked(folder):
        machine = last(settings, name)
        if machine is None:
            return False
        _end(machine)
        (folder / "machine.json").unlink(missing_ok=True)
    return True


def _end(machine: Machine) -> None:
    """End a guest's QEMU, if it runs, and remove its sockets."""
    with suppress(GuestDied):
        if machine.alive():
            qmp(machine, "quit")
    deadline = time.monotonic() + 5.0
    while machine.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    if machine.alive():
        os.kill(machine.pid, signal.SIGKILL)
    shutil.rmtree(machine.sockets, ignore_errors=True)


def qmp(machine: Machine, command: str, **arguments: Any) -> Any:
    """Run one QMP command and return its result; raise GuestDied when QEMU does not answer."""

    async def talk() -> Any:
        client = QMPClient("pykq")
        await client.connect(str(machine.qmp))
        try:
            return await client.execute(command, arguments or None)
        finally:
            with suppress(QMPError, EOFError, OSError):
                await client.disconnect()

    try:
        return asyncio.run(asyncio.wait_for(talk(), 5.0))
    except (QMPError, OSError, EOFError, TimeoutError) as error:
        raise GuestDied(f"QEMU does not answer: {error}", hint="invoke vm.down, then vm.up") from error


def _accelerators(settings: Settings) -> list[str]:
    """Return the accelerators worth a try, the fastest first; tcg is always the last.

    /dev/kvm that opens is no proof: hosts were seen whose KVM answers its API
    and then hangs.  So a processor must have the extension, and the guest's
    first line must come within seconds; the answer is kept until the host's
    next boot.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return ["tcg"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not re.search(r"^flags\s*:.*\b(vmx|svm)\b", flags, re.MULTILINE):
        return ["tcg"]
    if read_json(settings.cache / "accelerators.json").get("kvm") == _host_boot():
        return ["tcg"]
    return ["kvm", "tcg"]


def _remember(settings: Settings, accelerator: str) -> None:
    """Write down that an accelerator does not work during this boot of the host."""
    write_whole(settings.cache / "accelerators.json", json.dumps({accelerator: _host_boot()}))


def _host_boot() -> str:
    """Return a value that changes with every boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _is_free(port: int) -> bool:
    """Tell whether a TCP port of 127.0.0.1 can be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def _free_port() -> int:
    """Return a TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End QEMU and wait for it."""
    process.kill()
    process.wait()


def _value(path: Path) -> str:
    """Quote a path for an option of QEMU, where a comma ends a value."""
    return str(path).replace(",", ",,")


def _read(path: Path) -> bytes:
    """Return a file's content, nothing when it is not there."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _line_at(text: bytes, position: int) -> str:
    """Return the line of text that a position is in."""
    start = text.rfind(b"\n", 0, position) + 1
    end = text.find(b"\n", position)
    return text[start : end if end >= 0 else None].decode(errors="replace").strip()
