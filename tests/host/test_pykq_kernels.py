"""Choosing and loading a kernel, and what is said where there is none."""

import ctypes
import ctypes.util
import errno
import json
import os
import re
import select
import shutil
import subprocess
import sys

import pytest

import pykq
from pykq import _kernel

NO_KQUEUE = pytest.mark.skipif(
    hasattr(select, "kqueue") or ctypes.util.find_library("kqueue") is not None,
    reason="this host has a kqueue",
)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("PYKQ_KERNEL", raising=False)


def python(*args, **environment):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


def test_the_import_loads_no_library():
    done = python(
        "-c",
        "import ctypes, sys; sys.addaudithook(lambda event, args: event == 'ctypes.dlopen'"
        " and sys.exit(f'loads {args}')); import pykq",
    )
    assert done.returncode == 0, done.stderr


@NO_KQUEUE
def test_elsewhere_opening_says_in_one_line_what_to_do():
    with pytest.raises(pykq.KernelUnavailable, match="run NetBSD, or its kernel as a library") as caught:
        pykq.Kqueue()
    assert "\n" not in str(caught.value)


def test_a_system_without_a_kqueue_is_told_so_before_its_library_is_looked_for(monkeypatch):
    """On Windows ctypes.CDLL(None) would be a TypeError."""
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setattr(_kernel.ctypes, "CDLL", None)
    with pytest.raises(pykq.KernelUnavailable, match="pykq does not know Windows's kqueue"):
        _kernel.RunningSystem()


@NO_KQUEUE
@pytest.mark.parametrize("module", ["pykq", "pykq.demo"])
def test_elsewhere_the_programs_say_so_too(module):
    done = python("-m", module)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"{module}: ")
    assert done.stderr.count("\n") == 1


@NO_KQUEUE
def test_elsewhere_the_json_says_why():
    done = python("-m", "pykq", "--json")
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert facts["kernel"] is None
    assert "run NetBSD" in facts["error"]


@NO_KQUEUE
def test_elsewhere_a_descriptor_cannot_be_tickled():
    with pytest.raises(pykq.KernelUnavailable):
        pykq.tickle(0)


def test_a_kernel_of_no_known_name_is_refused():
    with pytest.raises(pykq.KernelUnavailable, match=r"'linux'.*system, rump, rump:stock or a directory"):
        pykq.load_kernel("linux")


def test_the_environment_chooses(monkeypatch, tmp_path):
    monkeypatch.setenv("PYKQ_KERNEL", str(tmp_path / "none"))
    with pytest.raises(pykq.KernelUnavailable, match="none"):
        pykq.Kqueue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that makes a folder with libraries, each newer than the one before."""
    monkeypatch.setenv("PYKQ_CACHE", str(tmp_path))
    made = []

    def make(name):
        folder = tmp_path / "rump" / name
        folder.mkdir(parents=True)
        library = folder / "librump.so"
        library.touch()
        made.append(folder)
        os.utime(library, (len(made), len(made)))
        return folder

    return make


@pytest.mark.parametrize("choice", ["rump", "rump:patched", "rump:stock"])
def test_the_newest_rump_kernel_of_the_cache_is_used(cache, choice):
    wanted = "stock" if choice == "rump:stock" else "patched"
    for name in ("10.1-b", "10.1-a"):
        folder = {variant: cache(f"{name}/{variant}") for variant in ("stock", "patched")}[wanted]
    cache("10.1-c-sanitized/" + wanted)  # for its tests only: it wants a runtime library loaded first
    assert _kernel._rump_directory(choice) == folder


def test_an_empty_cache_says_how_to_fill_it(cache, tmp_path):
    with pytest.raises(pykq.KernelUnavailable, match="invoke build-rump"):
        pykq.load_kernel("rump")


@pytest.mark.parametrize("there", [[], ["librump.so"], ["librumpuser.so"]])
def test_a_folder_without_the_libraries_is_refused(tmp_path, there):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(pykq.KernelUnavailable, match=r"no librump(user)?\.so in"):
        pykq.load_kernel(tmp_path)


def test_what_is_no_library_is_refused(tmp_path):
    for name in ("librumpuser.so", "librump.so"):
        (tmp_path / name).write_text("neither")
    with pytest.raises(pykq.KernelUnavailable, match=r"cannot load the rump kernel: .*librumpuser.so"):
        pykq.load_kernel(tmp_path)


RUMP = "int rump_pub_getversion(void) { return 1099001200; }"
CALLS = "int rump___sysimpl_kevent50(void) { return -1; } int rump___sysimpl_ioctl(void) { return -1; }"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("int nothing;", "librump.so is no rump kernel: .*rump_init"),
        (f"{RUMP} int rump_init(void) {{ return 0; }}", "librump.so has no kevent"),
        (f"{RUMP} {CALLS} int rump_init(void) {{ return 12; }}", "does not start: rump_init returned 12"),
    ],
)
def test_a_library_that_is_no_rump_kernel_is_refused(tmp_path, code, message):
    compile_library(tmp_path / "librumpuser.so", "int nothing;")
    compile_library(tmp_path / "librump.so", code)
    done = python("-m", "pykq", "--kernel", str(tmp_path))
    assert done.returncode == 1
    assert_matches(message, done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_for_another_machine_is_refused(tmp_path):
    for name in ("librumpuser.so", "librump.so"):
        compile_library(tmp_path / name, "int nothing;")
        binary = bytearray((tmp_path / name).read_bytes())
        binary[18:20] = (2).to_bytes(2, "little")  # e_machine: SPARC
        (tmp_path / name).write_bytes(binary)
    with pytest.raises(pykq.KernelUnavailable, match=r"cannot load the rump kernel: .*librumpuser.so"):
        pykq.load_kernel(tmp_path)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_process_has_one_rump_kernel(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        compile_library(tmp_path / name / "librumpuser.so", "int nothing;")
        compile_library(tmp_path / name / "librump.so", f"{RUMP} {CALLS} int rump_init(void) {{ return 0; }}")
    program = """
import pykq, sys
one = pykq.load_kernel(sys.argv[1])
assert pykq.load_kernel(sys.argv[1]) is one
try:
    pykq.load_kernel(sys.argv[2])
except pykq.KernelUnavailable as error:
    print(error)
"""
    done = python("-c", program, str(tmp_path / "one"), str(tmp_path / "two"))
    assert_matches("one rump kernel a process: .*/one runs, .*/two cannot\n", done.stdout)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_rump_kernel_can_be_loaded_with_stdout_closed(tmp_path):
    compile_library(tmp_path / "librumpuser.so", "int nothing;")
    compile_library(tmp_path / "librump.so", f"{RUMP} {CALLS} int rump_init(void) {{ return 0; }}")
    program = "import os, sys, pykq; os.close(1); pykq.load_kernel(sys.argv[1]); sys.stdout = None"
    done = python("-c", program, str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_waits_until_another_thread_has_loaded_its_kernel():
    """Else the child would have a lock that nobody will ever release."""
    program = """
import os, signal, threading, time, pykq
from pykq import _kernel

class Slow:
    def __init__(self):
        loading.set()
        time.sleep(0.3)

_kernel.RunningSystem = Slow
loading = threading.Event()
threading.Thread(target=pykq.load_kernel).start()
loading.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    os._exit(type(pykq.load_kernel()) is not Slow)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(_kernel._loaded))
"""
    assert python("-c", program).stdout == "0 1\n"


def compile_library(path, code):
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=code, text=True, check=True
    )


def assert_matches(pattern, text):
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("netbsd", "host"),
    [
        (2, errno.ENOENT),
        (4, errno.EINTR),
        (11, errno.EDEADLK),
        (35, errno.EAGAIN),
        (60, errno.ETIMEDOUT),
        (78, errno.ENOSYS),
        (-3, errno.EINTR),  # ERESTART
    ],
)
def test_netbsds_errno_becomes_the_hosts(netbsd, host):
    ctypes.set_errno(netbsd)
    error = _kernel.RumpKernel.error(object.__new__(_kernel.RumpKernel), "kevent")
    assert error.errno == host
    assert str(error).endswith(f"kevent: {os.strerror(host)}")


@pytest.mark.skipif(hasattr(errno, "EFTYPE"), reason="this host has EFTYPE")
def test_an_errno_that_the_host_lacks_keeps_its_name():
    ctypes.set_errno(79)
    error = _kernel.RumpKernel.error(object.__new__(_kernel.RumpKernel), "kevent")
    assert error.errno == errno.EIO
    assert "EFTYPE" in str(error)
