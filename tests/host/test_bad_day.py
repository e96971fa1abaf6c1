"""Whole commands on a bad day: interrupted, on a cache that is not theirs, without a home. See BAD-DAY.md."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tasks
from vm import config, log, qemu
from vm.guest import ROOT
from vm.log import Failure

from . import test_vm_release
from .conftest import PATIENCE_S, eventually, programs

no_keys, pub, server = test_vm_release.no_keys, test_vm_release.pub, test_vm_release.server

# A command like those of tasks.py, with another body.
COMMAND = """
import signal
for number in (signal.SIGINT, signal.SIGHUP):  # which a shell's background job, or nohup, ignores
    signal.signal(number, signal.SIG_DFL)
import sys
import time
from pathlib import Path
from invoke import Collection, Program
from tasks import command
from vm import cache, config, image, qemu, run
from vm.log import *

@command(help={"json": "figures"})
def it(c, json=False):
    BODY

Program(namespace=Collection(it)).run(["invoke", "it", *sys.argv[1:]])
"""

BUILD = "run.run(['sh', '-c', 'echo begun; sleep 999 & sleep 999'], on_line=say)"
STUBBORN = "run.run(['sh', '-c', 'trap \"\" INT TERM; echo begun; sleep 999'], on_line=say)"
TWO_BUILDS = f"run.side_by_side([lambda: {BUILD}, lambda: {STUBBORN}])"
AT_ONCE = f"say('begun'); run.side_by_side([lambda: signal.raise_signal(2), lambda: {STUBBORN}])"


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command of tasks.py to its end."""
    line = [sys.executable, "-m", "invoke", *words]
    fields: dict[str, object] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": PATIENCE_S}
    return subprocess.run(line, **(fields | options))  # type: ignore[call-overload, no-any-return]


@contextmanager
def start(body: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command of which the body is given; it does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.replace("BODY", body), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def one_line(text: str) -> str:
    """What a command says on standard error, which is to be a line that names the fault and the remedy."""
    assert text.count("\n") == 1, text
    assert text.startswith("pykq: ")
    return text


@pytest.mark.parametrize(
    ("body", "signals"),
    [
        (BUILD, [signal.SIGINT]),
        (BUILD, [signal.SIGINT, signal.SIGINT]),
        (BUILD, [signal.SIGTERM]),
        (BUILD, [signal.SIGHUP]),
        (TWO_BUILDS, [signal.SIGINT, signal.SIGINT]),
        (AT_ONCE, [signal.SIGINT]),  # the first one comes before the second thread is there
    ],
)
def test_interrupted_build_leaves_no_process(tmp_path: Path, body: str, signals: list[int]) -> None:
    with start(body) as process:
        assert process.stdout is not None
        assert "begun\n" in iter(process.stdout.readline, "")
        for number in signals:
            process.send_signal(number)
            time.sleep(0.05)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert one_line(errors) == "pykq: interrupted (the same command goes on where it stopped)\n"
    eventually(lambda: not programs(tmp_path))


def test_interrupted_download_goes_on_where_it_stopped(server: test_vm_release.Server) -> None:
    """Twice in a row, while a mirror says nothing."""
    server.faults[test_vm_release.SRC] = test_vm_release.Handler.stall
    get = f"resolve(config.load(release='10.1', mirror='{server.url}/pub'), 'source')"
    with start(f"from vm.release import resolve; {get}") as process:
        eventually(lambda: any(path.stat().st_size for path in config.load().cache.rglob(".src.tgz*.part")))
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert one_line(errors) == "pykq: interrupted (the same command goes on where it stopped)\n"
    server.faults.clear()
    server.asked.clear()
    with start(f"from vm.release import resolve; {get}") as process:
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert any(path.endswith(test_vm_release.SRC) and begin for path, begin in server.asked)


@pytest.fixture
def boot(test_kernel: Path, tmp_path: Path) -> Callable[..., str]:
    """The body of a command that starts a guest with the test kernel."""
    (tmp_path / "image").mkdir()
    (tmp_path / "image/root.img").write_bytes(bytes(1 << 20))
    (tmp_path / "image/host_ed25519.pub").write_text("ssh-ed25519 x\n")
    (tmp_path / "tmp").mkdir()

    def boot(arguments: str, kernel: Path = test_kernel) -> str:
        fields = {
            "name": "pykq", "variant": "patched", "netbsd": "0", "kernel": str(kernel), "boot": "pvh",
            "folder": str(qemu.folder_of(config.load(), "pykq")), "arguments": arguments,
            "cpus": 1, "memory_mib": 64,
        }
        return (
            f"import tempfile; tempfile.tempdir = {str(tmp_path / 'tmp')!r};"
            f"made = image.Image(Path({str(tmp_path / 'image')!r}));"
            f"qemu.start(config.load(), qemu.Machine(**{fields}), lambda: made)"
        )

    return boot


ALIVE = "The NetBSD Foundation%n"
_ASKS = f"{qemu.ASKS.decode()}%n%w"
ASKING = f"{ALIVE}{_ASKS}{_ASKS}{qemu.READY.decode()}%n"


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.03, 0.1, 0.2])
def test_interrupted_start_leaves_no_guest(
    boot: Callable[..., str], tmp_path: Path, after_s: float
) -> None:
    """At moments from before QEMU is forked until the kernel prints; twice in a row."""
    with start(boot(ALIVE)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    eventually(lambda: not programs(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert qemu.last(config.load(), "pykq") is None


def kill_qemu(command: subprocess.Popen[str], pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop_qemu(command: subprocess.Popen[str], pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def interrupt_twice(command: subprocess.Popen[str], pid: int) -> None:
    command.send_signal(signal.SIGINT)
    command.send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("fault", "status", "seen"),
    [
        (kill_qemu, 3, "pykq: the guest did not start: QEMU ended with status -9 "),
        (stop_qemu, 3, "pykq: the guest did not start: no 'pykq: guest ready' on its console within 2 s "),
        (interrupt_twice, 130, "pykq: interrupted (the same command goes on where it stopped)"),
    ],
)
def test_death_while_a_state_is_saved_leaves_none(
    boot: Callable[..., str],
    test_kernel: Path,
    tmp_path: Path,
    fault: Callable[[subprocess.Popen[str], int], None],
    status: int,
    seen: str,
) -> None:
    """Of a saving that would take half a minute."""
    before = set(test_kernel.parent.iterdir())
    slow = "from vm import state; state._UNLIMITED = 1 << 12; state._WITHIN_S = qemu.BOOT_WITHIN_S = 2.0"
    with start(f"{slow}; {boot(ASKING)}") as process:
        eventually(lambda: any(part.stat().st_size for part in test_kernel.parent.glob(".*.state.*")))
        machine = qemu.last(config.load(), "pykq")
        assert machine is not None
        fault(process, machine.pid)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, errors
    last = errors.splitlines()[-1]
    assert last.startswith(seen)
    assert status == 130 or str(machine.console_log) in last
    eventually(lambda: not programs(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert set(test_kernel.parent.iterdir()) == before


def test_guest_of_a_command_that_was_killed_is_ended_by_the_next(
    boot: Callable[..., str], tmp_path: Path
) -> None:
    console = config.load().cache / "run/pykq/console.log"
    with start(boot(ALIVE)) as process:
        eventually(lambda: console.exists() and console.stat().st_size)
        process.kill()
    assert programs(tmp_path), "QEMU runs on"
    assert "is being started" in run("vm.status").stdout
    assert run("vm.down").returncode == 0
    eventually(lambda: not programs(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_dead_guest_is_status_3_and_the_log_is_named(boot: Callable[..., str]) -> None:
    with start(boot(f"{ALIVE}panic: it hurts%n%r")) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    last = errors.splitlines()[-1]
    assert last.startswith("pykq: the guest did not start: panic: it hurts (its console is in ")
    log = Path(last.rpartition("all output is in ")[2])
    assert "panic: it hurts" in log.read_text()


def test_failed_build_is_status_2_with_its_tail_and_the_whole_in_the_log() -> None:
    with start("run.run(['sh', '-c', 'seq 10000; exit 7'])") as process:
        said, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert said == ""
    *tail, last = errors.splitlines()
    assert tail == [str(number) for number in range(9986, 10001)]
    log = re.fullmatch(r"pykq: sh failed with status 7; all output is in (\S+)", last)
    assert log is not None
    words = [line.split()[-1] for line in Path(log[1]).read_text().splitlines()]
    assert [word for word in words if word.isdigit()] == [str(number) for number in range(1, 10001)]


def test_quiet_says_nothing_and_json_stands_alone() -> None:
    body = "say('a word')\n    with step('work'): pass\n    print('{}')"
    with start(body, "--quiet") as process:
        assert process.communicate(timeout=PATIENCE_S) == ("{}\n", "")
    with start(body, "--json") as process:
        said, chatter = process.communicate(timeout=PATIENCE_S)
    assert said == "{}\n"
    assert chatter.startswith("a word\n")


def test_what_is_said_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    log.say("a:x:b [bold]c[/] \\[d")
    log.report(log.Failure("a:x:b", hint="[red]", tail=":x:"))
    said = capsys.readouterr()
    assert said.out == "a:x:b [bold]c[/] \\[d\n"
    assert said.err == ":x:\npykq: a:x:b ([red])\n"


def test_packages_that_cannot_be_installed_are_a_tail_and_a_log() -> None:
    with start("from vm import doctor; doctor._watch(['sh', '-c', 'seq 99; exit 7'])") as process:
        said, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "98" not in said
    *tail, last = errors.splitlines()
    assert tail == [str(number) for number in range(85, 100)]
    assert last.startswith("pykq: sh -c 'seq 99; exit 7' failed with status 7")
    assert " 42\n" in (config.load().cache / "log/it.log").read_text()


def test_interrupted_probe_of_kvm_leaves_no_qemu(test_kernel: Path, tmp_path: Path) -> None:
    silent = "doctor._BOOT_SECTOR, doctor._RUNS_WITHIN_S = bytes(510) + b'U\\xaa', 99.0"
    body = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}; from vm import doctor; {silent}"
    with start(f"{body}; say('begun'); doctor.runs_code('tcg')") as process:
        eventually(lambda: len(programs(tmp_path)) > 1)  # it, and QEMU
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    eventually(lambda: not programs(tmp_path))


def test_every_command_can_be_quiet() -> None:
    for name in tasks.namespace.task_names:
        assert "quiet" in [argument.name for argument in tasks.namespace[name].get_arguments()], name


def test_cache_of_a_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYKQ_CACHE", str(tmp_path / "file"))
    done = run("vm.down")
    assert done.returncode == 1
    assert "file/run/pykq: Not a directory (name another cache folder in PYKQ_CACHE)" in one_line(done.stderr)


Mounted = Callable[[str, str], subprocess.CompletedProcess[str]]


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    """``mounted(options, body)``: run a command of which the body is given, on a cache of its own."""
    cache = tmp_path / "cache"
    cache.mkdir()

    def mounted(options: str, body: str) -> subprocess.CompletedProcess[str]:
        mount = f"mount -t tmpfs -o {options} none {cache}"
        alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        if subprocess.run([*alone, mount], capture_output=True, check=False).returncode:
            pytest.skip("this system lets nobody mount")
        line = shlex.join([sys.executable, "-c", COMMAND.replace("BODY", body)])
        return subprocess.run(
            [*alone, f"{mount} && {line}"],
            cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )

    return mounted


def test_read_only_cache_is_one_line(mounted: Mounted) -> None:
    done = mounted("ro", "qemu.down(config.load())")
    assert done.returncode == 1
    assert "Read-only file system (name another cache folder in PYKQ_CACHE)" in one_line(done.stderr)


def test_build_on_a_full_disk_names_the_remedy(mounted: Mounted) -> None:
    done = mounted("size=64k", "run.run(['sh', '-c', 'head -c 1m /dev/zero >$PYKQ_CACHE/file'])")
    assert done.returncode == 2
    assert "failed with status 1 (make room, or name another cache" in done.stderr.splitlines()[-1]


def test_start_on_a_full_disk_names_the_remedy_and_leaves_no_guest(
    mounted: Mounted, boot: Callable[..., str], tmp_path: Path
) -> None:
    full = "(config.load().cache / 'file').write_bytes(bytes(1 << 16))"
    done = mounted("size=64k", f"try: {full}\n    except OSError: pass\n    {boot(ALIVE)}")
    assert done.returncode == 1
    assert "(make room, or name another cache folder in PYKQ_CACHE)" in one_line(done.stderr)
    assert not programs(tmp_path)


@pytest.mark.parametrize("size_kib", [64, 256, 768])
def test_release_on_a_full_disk_names_the_remedy(
    mounted: Mounted, server: test_vm_release.Server, size_kib: int
) -> None:
    """While the first set is downloaded, while others are, and while they are unpacked."""
    get = f"resolve(config.load(release='10.1', mirror='{server.url}/pub'), 'source')"
    done = mounted(f"size={size_kib}k", f"from vm.release import resolve; {get}")
    assert done.returncode == 1, done.stdout
    assert "(make room, or name another cache folder in PYKQ_CACHE)" in one_line(done.stderr)


def test_state_on_a_full_disk_is_said_and_missed_by_nobody(
    mounted: Mounted,
    boot: Callable[..., str],
    test_kernel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel and its states are on a disk of their own, which is too small for one."""
    full = config.load().cache
    monkeypatch.setenv("PYKQ_CACHE", str(tmp_path / "other"))
    copy = f"import shutil; shutil.copy({str(test_kernel)!r}, {str(full)!r})"
    left = f"print(sorted(os.listdir({str(full)!r})), qemu.down(config.load()))"
    done = mounted("size=64k", f"import os; {copy}; {boot(ASKING, full / test_kernel.name)}; {left}")
    assert done.returncode == 0, done.stderr
    assert "the state of the guest is not saved: " in done.stdout
    assert f"{[test_kernel.name]} True" in done.stdout
    assert not programs(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_cache_of_another_version_or_half_written_is_made_anew() -> None:
    state = config.load().cache / "run/pykq/machine.json"
    state.parent.mkdir(parents=True)
    for content in ("", "{", "[]", '{"name": "pykq"}', '{"version": 0, "guest": {}}'):
        state.write_text(content)
        assert qemu.last(config.load(), "pykq") is None
    assert run("vm.down").stdout == "there is no guest pykq\n"


def test_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "PYKQ_CACHE", "PYKQ_CONFIG", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(Failure, match="there is no home folder") as caught:
        config.load()
    assert "PYKQ_CACHE" in caught.value.hint


@pytest.fixture
def jumping_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands see a clock that jumps by months, three times a second (clock.c)."""
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("needs cc, and LD_PRELOAD")
    library = tmp_path / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    years = [sys.executable, "-c", "import time; [print(time.time()) or time.sleep(0.1) for _ in range(20)]"]
    times = [float(line) for line in subprocess.check_output(years, text=True).splitlines()]
    assert max(times) - min(times) > 300 * 86400, "it jumps"


def test_jumping_clock_ends_no_wait_early_or_late(
    jumping_clock: None, boot: Callable[..., str], tmp_path: Path
) -> None:
    """A guest that is silent is given up after three seconds, and one that is ready is up."""
    with start(f"qemu._ALIVE_WITHIN_S['tcg'] = 3.0; {boot('%h')}") as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        _, errors = process.communicate(timeout=PATIENCE_S)
        took_s = time.monotonic() - began
    assert process.returncode == 3
    assert 2.5 < took_s < 10.0, "3 s, and what a busy machine takes to end"
    assert "no 'The NetBSD Foundation' on its console within 3 s" in one_line(errors)
    with start(boot(f"{ALIVE}pykq: guest ready%n")) as process:
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "guest pykq is up" in run("vm.status").stdout
    assert run("vm.down").returncode == 0
    eventually(lambda: not programs(tmp_path / "image"))


def test_two_commands_at_once_take_turns_even_if_the_first_is_killed() -> None:
    body = "with cache.locked(config.load().cache): say('in'); time.sleep(999)"
    with start(body) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with start(body) as second:
            assert second.stdout is not None
            assert second.stdout.readline().startswith("waiting for another pykq command that works in ")
            words = (config.load().cache / "log/it.log").read_text()
            assert words.index(f" {first.pid} in\n") < words.index(f" {second.pid} waiting"), "one log"
            first.kill()
            assert second.stdout.readline() == "in\n"
            second.send_signal(signal.SIGINT)
            assert second.wait(PATIENCE_S) == 130


@pytest.mark.parametrize(("name", "odd"), [("a source", "space"), ("a;source", ";"), ("a$source", "$")])
def test_space_in_a_path_is_one_line_early(tree: Path, tmp_path: Path, name: str, odd: str) -> None:
    """NetBSD's make takes none, and hands paths to the shell; letters outside ASCII it takes."""
    strange = tmp_path / name
    tree.rename(strange)
    done = run("build-kernel", "--source", str(strange))
    assert done.returncode == 1
    assert f"{name}: NetBSD's make takes no {odd} in a path" in one_line(done.stderr)
    assert not (config.load().cache / "build").exists()


@pytest.mark.parametrize("words", ["vm.up --cpus two", "vm.up --cpus -1", "stress --minutes nan"])
def test_option_that_is_no_number_is_one_line(words: str) -> None:
    done = run(*words.split())
    assert done.returncode == 1
    assert f"{' '.join(words.split()[1:])}: not a number (such as 1)" in one_line(done.stderr)


@pytest.mark.parametrize("words", ["--cpus 0", "--cpus 300", "--memory 1"])
def test_guest_of_no_size_is_one_line(tree: Path, words: str) -> None:
    done = run("vm.up", "--source", str(tree), "--sets", str(tree), "--python", str(tree), *words.split())
    assert done.returncode == 1
    assert "a guest cannot have" in one_line(done.stderr)
