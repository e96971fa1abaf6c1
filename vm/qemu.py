"""A guest under QEMU: its command line, its console, its life and its death."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from . import state
from .backtrace import with_names
from .build import VARIANTS, kernel_folder, select
from .cache import locked, read_json, write_whole
from .config import Settings
from .image import Image, build_image, image_of
from .log import Failure, GuestDied, say, step, tail, timed
from .run import end_with_others, need, uninterrupted

QEMU = "qemu-system-x86_64"

# What vm/guest/rc prints: when it waits for a line (_answered), and when sshd listens.
ASKS = b"pykq: guest asks for random bytes and the time"
READY = b"pykq: guest ready"

# What QEMU can use besides software emulation, by the host's system.  Those of macOS and NetBSD have not
# been tried by us.
_ACCELERATORS = {"Linux": "kvm", "Darwin": "hvf", "NetBSD": "nvmm"}

# The kernel's first line: proof that the processor really runs it.
_ALIVE = b"The NetBSD Foundation"
_ALIVE_WITHIN_S = {"kvm": 4.0, "tcg": 60.0}
BOOT_WITHIN_S = 120.0
_RESUME_WITHIN_S = 20.0
_END_WITHIN_S = 10.0
_READ_BYTES = 1 << 20

# What NetBSD's kernels for amd64 take (MAXCPUS of GENERIC), and what the guest's userland needs.
_MOST_CPUS, _LEAST_MIB = 256, 128

# What QEMU says when it cannot have the port on 127.0.0.1.
_PORT_TAKEN = b"Could not set up host forwarding rule"
_ANY_PORT = "without --port a free one is found"

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
    boot: str  # "pvh" or "disk"
    folder: str
    arguments: str = "console=com root=ld0a"  # the kernel's, by PVH
    image: str = ""
    disk: str = ""  # a second one, which keeps what is written to it; the guest may then reboot
    cpus: int = 2
    memory_mib: int = 512
    made: str = ""  # what tells this kernel from what was or will be at its path
    accelerator: str = ""
    ssh_port: int = 0
    pid: int = 0
    sockets: str = ""  # the folder of qmp, console and lock, mode 0700
    started: float = 0.0
    ready: bool = False  # it has booted; False is a guest whose start is under way, or was cut short

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

    @property
    def lock(self) -> Path:
        """The file that its QEMU keeps locked."""
        return Path(self.sockets) / "lock"

    def alive(self) -> bool:
        """Tell whether its QEMU runs: it holds a lock, which the kernel drops however it ends."""
        try:
            with self.lock.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def death(self) -> str:
        """Return what killed the guest, '' while it seems to live."""
        match = DEATH.search(_read(self.console_log))
        if match is not None:
            return _line_at(_read(self.console_log), match.start())
        return "" if self.alive() else "QEMU has ended"

    def same_as(self, other: Machine) -> bool:
        """Tell whether two guests are of one kernel, disk and size."""
        fields = ("variant", "kernel", "made", "disk", "cpus", "memory_mib")
        return all(getattr(self, name) == getattr(other, name) for name in fields)

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
    state = read_json(_state(folder_of(settings, name)))
    known = {item.name for item in fields(Machine)}
    try:
        return Machine(**{key: value for key, value in state.items() if key in known})
    except TypeError:  # none, or written by a version of pykq that knew too little
        return None


def find(settings: Settings, name: str) -> Machine | None:
    """Return the guest of this name when it runs."""
    machine = last(settings, name)
    return machine if machine is not None and machine.ready and machine.alive() else None


def must_find(settings: Settings, name: str) -> Machine:
    """Return the guest of this name; raise Failure when it does not run."""
    machine = last(settings, name)
    if machine is None or not machine.ready:
        raise Failure(f"guest {name} is not up", hint="invoke vm.up")
    machine.raise_if_dead()
    return machine


def status(settings: Settings, name: str, *, as_json: bool = False) -> bool:
    """Print what is known of a guest; return whether it runs."""
    machine = last(settings, name)
    death = machine.death() if machine is not None else ""
    up = machine is not None and machine.ready and not death
    if as_json:
        state = asdict(machine) if machine is not None else {}
        print(json.dumps({"name": name, "up": up, "death": death, **state}))
    elif machine is None:
        say(f"guest {name} is not up")
    elif death:
        say(f"guest {name} died: {death} (its console is in {machine.console_log})")
    elif not up:
        say(f"guest {name} is being started")
    else:
        say(
            f"guest {name} is up: NetBSD {machine.netbsd}, {machine.variant} kernel, {machine.boot} boot, "
            f"{machine.accelerator}, ssh on 127.0.0.1 port {machine.ssh_port}, pid {machine.pid}, "
            f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(machine.started))}"
        )
    return up


def command_line(machine: Machine, disk: Path) -> list[str]:
    """Return the QEMU command, an option and its value beside each other."""
    accelerator = "tcg,thread=multi" if machine.accelerator == "tcg" else machine.accelerator
    forward = f"hostfwd=tcp:127.0.0.1:{machine.ssh_port}-:22"
    drive = "format=raw,werror=report"  # else the guest stops, and says nothing, when the host's disk is full
    line = [QEMU]
    line += ["-name", f"pykq-{machine.name}"]
    line += ["-nodefaults"]
    line += ["-no-user-config"]
    line += [] if machine.disk else ["-no-reboot"]
    line += ["-display", "none"]
    line += ["-machine", "q35"]
    line += ["-accel", accelerator]
    if machine.accelerator == "kvm":
        line += ["-cpu", "host"]
    line += ["-smp", str(machine.cpus)]
    line += ["-m", f"{machine.memory_mib}M"]
    line += ["-chardev", f"socket,id=console,path={_value(machine.console)},server=on,wait=off,"
                         f"logfile={_value(machine.console_log)},logappend=off"]
    line += ["-serial", "chardev:console"]
    line += ["-qmp", f"unix:{_value(machine.qmp)},server=on,wait=off"]
    line += ["-drive", f"if=none,id=root,{drive},snapshot=on,file={_value(disk)}"]
    line += ["-device", "virtio-blk-pci,drive=root"]
    if machine.disk:
        line += ["-drive", f"if=none,id=second,{drive},file={_value(Path(machine.disk))}"]
        line += ["-device", "virtio-blk-pci,drive=second"]
    line += ["-netdev", f"user,id=net,restrict=on,ipv6=off,{forward}"]
    line += ["-device", "virtio-net-pci,netdev=net,romfile="]
    line += ["-device", "virtio-rng-pci"]
    if platform.system() == "Linux":  # elsewhere QEMU has none, and does not start
        line += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    if machine.boot == "pvh":
        line += ["-kernel", machine.kernel]
        line += ["-append", machine.arguments]
    return line


def up(
    settings: Settings,
    *,
    variant: str = "patched",
    name: str = "pykq",
    memory_mib: int = 512,
    cpus: int = 2,
    ssh_port: int = 0,
    saved: bool = True,
    dry_run: bool = False,
) -> Machine:
    """Start a guest and return when its sshd answers; a guest that runs is left as it is.

    With saved it starts from a saved state, or, where there is none, boots and
    leaves one for the next.  Raises Failure when it cannot be started, or runs
    with another kernel or size, and GuestDied, with the last console lines,
    when QEMU ends, the kernel panics or drops into ddb, or the guest does not
    get on: two minutes for each line of its console that is waited for.
    """
    if variant not in VARIANTS:
        raise Failure(f"there is no kernel {variant!r}", hint=" or ".join(VARIANTS))
    if not (0 < cpus <= _MOST_CPUS and memory_mib >= _LEAST_MIB):
        limits = f"1 to {_MOST_CPUS} CPUs, and {_LEAST_MIB} MiB or more"
        raise Failure(f"a guest cannot have {cpus} CPUs and {memory_mib} MiB", hint=limits)
    folder = folder_of(settings, name)
    builder = select(settings)
    kernel = kernel_folder(builder, variant) / "netbsd"
    if not kernel.exists():
        raise Failure(f"there is no {variant} kernel", hint="invoke build-kernel")
    boot = "pvh" if read_json(kernel.parent / "manifest.json").get("pvh") else "disk"
    wanted = Machine(
        name=name,
        variant=variant,
        netbsd=builder.source.version,
        kernel=str(kernel),
        boot=boot,
        folder=str(folder),
        ssh_port=ssh_port,
        cpus=cpus,
        memory_mib=memory_mib,
    )
    return start(
        settings,
        wanted,
        lambda: (image_of if dry_run else build_image)(builder, None if boot == "pvh" else kernel),
        saved=saved and state.can_be_shared(builder.source.top),
        dry_run=dry_run,
    )


@contextmanager
def fresh(settings: Settings, name: str, variant: str, *, cpus: int = 2) -> Iterator[Machine]:
    """Start a guest that nothing has used before, and end it afterwards; GuestDied: it died meanwhile."""
    down(settings, name)  # left by a command that was killed
    machine = up(settings, variant=variant, name=name, cpus=cpus)
    try:
        yield machine
        machine.raise_if_dead()
    finally:
        with uninterrupted():
            down(settings, name)


def start(
    settings: Settings,
    wanted: Machine,
    image: Callable[[], Image],
    *,
    saved: bool = True,
    dry_run: bool = False,
) -> Machine:
    """Start a machine with any kernel and the image that image() makes or finds; see up()."""
    need(QEMU)
    folder = Path(wanted.folder)
    status = Path(wanted.kernel).stat()
    wanted = replace(wanted, made=f"{status.st_size} {status.st_mtime_ns}")
    with locked(folder):
        name = wanted.name
        running = None if dry_run else last(settings, name)
        if running is not None and not running.ready:
            say(f"the start of guest {name} was cut short and is done anew")
            _end(running)
        elif running is not None and running.death():
            say(f"guest {name} died ({running.death()}) and is started anew")
            _end(running)
        elif running is not None:
            if not running.same_as(wanted):
                which = "the" if running.made == wanted.made else "another"
                raise Failure(
                    f"guest {name} is up with {which} {running.variant} kernel of NetBSD {running.netbsd},"
                    f" {running.cpus} CPUs and {running.memory_mib} MiB",
                    hint="invoke vm.down first, or another --name",
                )
            say(f"guest {name} is up already, ssh on port {running.ssh_port}")
            return running
        if wanted.ssh_port and not _is_free(wanted.ssh_port):
            raise Failure(f"port {wanted.ssh_port} is in use", hint=_ANY_PORT)
        disk_and_keys = image()
        candidates, broken = accelerators(settings), []
        while True:
            machine = replace(
                wanted,
                image=str(disk_and_keys.folder),
                accelerator=candidates[0],
                ssh_port=wanted.ssh_port or _free_port(),
                sockets=f"{tempfile.gettempdir()}/pykq-{secrets.token_hex(8)}",
                started=time.time(),
            )
            line = command_line(machine, disk_and_keys.disk)
            if dry_run:
                print(shlex.join(line))
                return machine
            any_guest = replace(machine, name="", folder="", sockets="", ssh_port=0)
            path = state.path_of(
                Path(machine.kernel),
                disk_and_keys.disk,
                command_line(any_guest, disk_and_keys.disk),
                machine.accelerator,
            )
            try:
                machine = _boot(machine, line, disk_and_keys, path if saved else None)
            except _PortTaken:
                if wanted.ssh_port:
                    raise Failure(f"port {wanted.ssh_port} is in use", hint=_ANY_PORT) from None
                say(f"port {machine.ssh_port} was taken in the meantime: another one")
            except state.StateFailed as error:
                say(f"the saved state is dropped ({error}): a normal boot instead")
                path.unlink(missing_ok=True)
            except _NoAccelerator as error:
                broken.append(candidates.pop(0))
                say(f"{broken[-1]} is there but does not run NetBSD ({error}): software emulation instead")
            else:
                for accelerator in broken:  # now that it is known to be the accelerator's fault
                    _remember(settings, accelerator)
                return machine


class _PortTaken(Exception):
    """Another program was faster to listen on the port that was found."""


class _NoAccelerator(Exception):
    """The accelerator does not run the guest."""


def _boot(machine: Machine, line: list[str], image: Image, saved: Path | None) -> Machine:
    """Start QEMU, wait until the guest is ready, and write down where it is.

    The guest starts from the state saved, when that is there; else it boots,
    and saves its state on the way.  Raises StateFailed when it cannot be
    started from the state.
    """
    machine.console_log.unlink(missing_ok=True)
    state_there = saved if saved is not None and saved.exists() else None
    how = "from its saved state" if state_there else f"{machine.boot} boot"
    process = None
    try:
        title = f"{machine.variant} guest {machine.name}, NetBSD {machine.netbsd}"
        with step(f"{title}, {how}, {machine.accelerator}"):
            with uninterrupted():
                os.mkdir(machine.sockets, 0o700)  # which fails when it is somebody else's
                process = _launch(machine, line, state_there)
                machine = replace(machine, pid=process.pid)
                _write(machine)
            end_with_others(process)
            if state_there:
                with timed(f"{machine.name}: the state into QEMU"):
                    state.load(process, machine.qmp, state_there)
                _get_ready(machine, process, _RESUME_WITHIN_S, resumed=True)
            else:
                with timed(f"{machine.name}: QEMU, and the kernel's first line"):
                    alive_within_s = _ALIVE_WITHIN_S.get(machine.accelerator, 60.0)
                    _wait_for_console(machine, process, alive_within_s, _ALIVE)
                with timed(f"{machine.name}: the kernel, and what is in a state"):
                    seen = _wait_for_console(machine, process, BOOT_WITHIN_S, READY, ASKS)
                if ASKS in seen:
                    if saved:
                        sshd_read = timed(f"{machine.name}: what sshd reads, into memory")
                        before = machine.console_log.stat().st_size
                        with _answered(machine, "state"), sshd_read:
                            _wait_for_console(machine, process, BOOT_WITHIN_S, ASKS, after=before)
                    with state.saving(machine.qmp, saved) if saved else nullcontext():
                        _get_ready(machine, process, BOOT_WITHIN_S)
            pinned = f"[127.0.0.1]:{machine.ssh_port} {image.host_key}\n"
            write_whole(Path(machine.folder) / "known_hosts", pinned, 0o600)
            machine = replace(machine, ready=True)
            _write(machine)
    except BaseException as error:
        with uninterrupted():
            if process is not None:
                process.kill()
                process.wait()
            _forget(machine)
        if isinstance(error, (GuestDied, state.StateFailed)) and _PORT_TAKEN in _read(_errors(machine)):
            raise _PortTaken from error
        if state_there and isinstance(error, GuestDied):
            raise state.StateFailed(str(error)) from error
        dumb = machine.accelerator != "tcg" and _ALIVE not in _read(machine.console_log)
        if dumb and isinstance(error, GuestDied):
            raise _NoAccelerator(str(error)) from error
        raise
    return machine


def _launch(machine: Machine, line: list[str], saved: Path | None) -> subprocess.Popen[bytes]:
    """Start QEMU, which inherits the lock that tells that it lives, and the state that it starts from."""
    with ExitStack() as files:
        errors = files.enter_context(_errors(machine).open("wb"))
        lock = files.enter_context(machine.lock.open("wb"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        inherited = [lock.fileno()]
        if saved is not None:
            inherited.append(files.enter_context(saved.open("rb")).fileno())
            line = [*line, "-incoming", f"fd:{inherited[-1]}"]
        return subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            pass_fds=inherited,
        )


def reboot(machine: Machine, order: Callable[[], object]) -> None:
    """Have a guest reboot, by an order that is given to it, and return when it is ready again."""
    before = machine.console_log.stat().st_size
    with step(f"guest {machine.name} reboots"):
        order()
        if ASKS in _wait_for_console(machine, None, BOOT_WITHIN_S, READY, ASKS, after=before):
            _get_ready(machine, None, BOOT_WITHIN_S, after=before)


def _get_ready(
    machine: Machine,
    process: subprocess.Popen[bytes] | None,
    within_s: float,
    *,
    after: int = 0,
    resumed: bool = False,
) -> None:
    """Give a guest the line that it asks for, and wait until it is ready.

    resumed: it comes from a saved state, and its clock stands still since then.
    """
    to_the_second = time.gmtime(time.time() + 0.5)  # as date(1) takes it
    now = time.strftime("%Y%m%d%H%M.%S", to_the_second) if resumed else ""
    with _answered(machine, now), timed(f"{machine.name}: random bytes, the time, sshd"):
        _wait_for_console(machine, process, within_s, READY, after=after)


@contextmanager
def _answered(machine: Machine, word: str) -> Iterator[None]:
    """Give a guest random bytes, and the time, nothing, or "state", after which it asks again (guest/rc)."""
    with socket.socket(socket.AF_UNIX) as console:
        with suppress(ConnectionError, FileNotFoundError):  # QEMU has ended: the wait says how
            console.connect(str(machine.console))
            console.sendall(f"{secrets.token_hex(32)} {word}\n".encode())
        yield  # hung up, QEMU would drop what is not read yet


def _wait_for_console(
    machine: Machine,
    process: subprocess.Popen[bytes] | None,
    within_s: float,
    wanted: bytes,
    *other: bytes,
    after: int = 0,
) -> bytes:
    """Return what the console shows once it shows wanted, or something other, after so many bytes.

    process is its QEMU, None for one that another command has started.
    Raises GuestDied when it shows a death, QEMU ends or time is up.
    """
    deadline = time.monotonic() + within_s
    while True:
        ended = process.poll() is not None if process is not None else not machine.alive()
        seen = _read(machine.console_log, after)
        if any(text in seen for text in (wanted, *other)):
            return seen
        match = DEATH.search(seen)
        if match is not None:
            cause = _line_at(seen, match.start())
        elif ended:
            errors = tail(_errors(machine), 3)
            status = process.returncode if process is not None else "unknown"
            cause = f"QEMU ended with status {status} {errors}".rstrip()
            if status == 0:
                cause = "it rebooted or powered off"
        elif time.monotonic() > deadline:
            cause = f"no {wanted.decode()!r} on its console within {within_s:.0f} s"
        else:
            time.sleep(0.005)
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
    return True


def _end(machine: Machine) -> None:
    """End a guest's QEMU, if it runs, and forget it."""
    if machine.alive():
        os.kill(machine.pid, signal.SIGKILL)
    deadline = time.monotonic() + _END_WITHIN_S
    while machine.alive():
        if time.monotonic() > deadline:
            raise Failure(f"QEMU (pid {machine.pid}) does not end", hint="is the disk of the cache stuck?")
        time.sleep(0.01)
    _forget(machine)


def _errors(machine: Machine) -> Path:
    """Return the file with what QEMU says on standard error."""
    return Path(machine.folder) / "qemu.log"


def _state(folder: Path) -> Path:
    """Return the file that tells other commands of a guest."""
    return folder / "machine.json"


def _write(machine: Machine) -> None:
    """Tell other commands of a guest."""
    write_whole(_state(Path(machine.folder)), json.dumps(asdict(machine), indent=1))


def _forget(machine: Machine) -> None:
    """Remove what was left of a guest that has ended, but for its console's text."""
    _state(Path(machine.folder)).unlink(missing_ok=True)
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


def pin(machine: Machine) -> None:
    """Bind each of a guest's processors to one of the host's, where its system can, for measurements.

    Linux may queue the threads of two behind one another while another processor is idle, until its
    scheduler's next tick: with 250 of these a second, 4 ms that are not the guest's.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    hosts = sorted(os.sched_getaffinity(0))
    for processor in qmp(machine, "query-cpus-fast"):
        os.sched_setaffinity(processor["thread-id"], {hosts[processor["cpu-index"] % len(hosts)]})


def accelerators(settings: Settings) -> list[str]:
    """Return the accelerators worth a try, the fastest first; tcg is always the last.

    /dev/kvm that opens is no proof: hosts were seen whose KVM answers its API
    and then hangs.  So a processor must have the extension, and the guest's
    first line must come within seconds; the answer is kept until the host's
    next boot.
    """
    fast = _ACCELERATORS.get(platform.system())
    if fast is None or read_json(settings.cache / "accelerators.json").get(fast) == _host_boot():
        return ["tcg"]
    extension = re.search(rb"^flags\s*:.*\b(vmx|svm)\b", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    if fast == "kvm" and not (extension and os.access("/dev/kvm", os.R_OK | os.W_OK)):
        return ["tcg"]
    return [fast, "tcg"]


def _remember(settings: Settings, accelerator: str) -> None:
    """Write down that an accelerator does not work during this boot of the host."""
    write_whole(settings.cache / "accelerators.json", json.dumps({accelerator: _host_boot()}))


def _host_boot() -> str:
    """Return a value that changes with every boot of a Linux host."""
    return _read(Path("/proc/sys/kernel/random/boot_id")).decode().strip()


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


def _value(path: Path) -> str:
    """Quote a path for an option of QEMU, where a comma ends a value."""
    return str(path).replace(",", ",,")


def _read(path: Path, after: int = 0) -> bytes:
    """Return what a file holds after so many bytes, nothing when it is not there.

    Of much only the end: a guest may print for ever.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(after, file.seek(0, os.SEEK_END) - _READ_BYTES))
            return file.read()
    except OSError:
        return b""


def _line_at(text: bytes, position: int) -> str:
    """Return the line of text that a position is in."""
    start = text.rfind(b"\n", 0, position) + 1
    end = text.find(b"\n", position)
    return text[start : end if end >= 0 else None].decode(errors="replace").strip()
