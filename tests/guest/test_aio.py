"""The event loop, with each mechanism. CPython's tests of event loops are in test_cpython.py."""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from pykq import Mechanism, aio

LONG_S = 30.0


@pytest.fixture(params=list(Mechanism))
def runner(request, kernel, tickling, watchdog):
    if not kernel.shares_descriptors:
        pytest.skip(f"not the running system: {kernel.name}")
    if not kernel.offers(request.param):
        pytest.skip(f"this kernel has no {request.param}")
    with asyncio.Runner(loop_factory=lambda: aio.TickleEventLoop(kernel, mechanism=request.param)) as runner:
        yield runner


def test_the_loop_has_no_socket_pair(runner):
    loop = runner.get_loop()
    assert not hasattr(loop, "_ssock")
    assert len(loop._selector.get_map()) == 0


def test_another_thread_wakes_the_loop(runner):
    async def main():
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        threading.Thread(target=lambda: loop.call_soon_threadsafe(woken.set)).start()
        await asyncio.wait_for(woken.wait(), LONG_S)

    runner.run(main())


def test_no_call_of_many_threads_is_lost(runner):
    calls, threads = 3000, 4

    async def main():
        loop, done, seen = asyncio.get_running_loop(), asyncio.Event(), []

        def call(number):
            seen.append(number)
            if len(seen) == calls * threads:
                done.set()

        def send(first):
            for number in range(first, calls * threads, threads):
                loop.call_soon_threadsafe(call, number)

        for first in range(threads):
            threading.Thread(target=send, args=(first,)).start()
        await asyncio.wait_for(done.wait(), LONG_S)
        assert sorted(seen) == list(range(calls * threads))

    runner.run(main())


def test_executors_and_subprocesses_work(runner):
    async def main():
        assert await asyncio.to_thread(lambda: 7) == 7
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print(input())", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate(b"hello\n")
        assert (out, process.returncode) == (b"hello\n", 0)

    runner.run(main())


def test_a_signal_is_handled_in_the_loop(runner):
    seen = []

    async def main():
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def handle():
            seen.append(threading.current_thread())
            woken.set()

        loop.add_signal_handler(signal.SIGUSR1, handle)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        await asyncio.wait_for(woken.wait(), LONG_S)
        assert loop.remove_signal_handler(signal.SIGUSR1)
        assert not loop.remove_signal_handler(signal.SIGUSR1)

    runner.run(main())
    assert seen == [threading.main_thread()]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGKILL, RuntimeError), (1000, ValueError), ("a", TypeError)]
)
def test_what_is_no_signal_to_handle_is_an_error(runner, number, error):
    with pytest.raises(error):
        runner.get_loop().add_signal_handler(number, bool)


def test_a_coroutine_is_no_signal_handler(runner):
    async def handler():
        pass

    with pytest.raises(TypeError, match="coroutines"):
        runner.get_loop().add_signal_handler(signal.SIGUSR1, handler)


def test_what_cannot_be_called_is_no_signal_handler(runner):
    with pytest.raises(TypeError, match="callable"):
        runner.get_loop().add_signal_handler(signal.SIGUSR1, "a string")


def test_a_handler_can_be_added_in_the_main_thread_only(runner):
    errors = []

    def add():
        try:
            runner.get_loop().add_signal_handler(signal.SIGUSR1, bool)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    assert len(errors) == 1


def test_ctrl_c_ends_the_run(runner):
    """Here as with asyncio's own loop: when the signal is given to the main thread."""

    async def main():
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        await asyncio.sleep(LONG_S)

    with pytest.raises(KeyboardInterrupt):
        runner.run(main())


def test_a_call_to_a_closed_loop_is_asyncios_error(runner):
    loop = runner.get_loop()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon_threadsafe(bool)
    loop._write_to_self()  # as a thread does that was inside call_soon_threadsafe when it closed
