"""Guests that start from one saved state. `invoke test` runs this where it has guests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fabric import Connection

from vm import build, config, guest, qemu, state


@pytest.fixture(scope="module")
def guests(machines: list[qemu.Machine]) -> Iterator[list[Connection]]:
    if not state.can_be_shared(build.select(config.load()).source.top):
        pytest.skip(f"guests of NetBSD {machines[0].netbsd} boot each for itself")
    for machine in machines:
        assert "The NetBSD Foundation" not in machine.console_log.read_text(), "it has booted"
    with ExitStack() as stack:
        yield [stack.enter_context(guest.connect(machine)) for machine in machines]


@pytest.mark.parametrize(
    "command",
    [
        "dd if=/dev/urandom bs=16 count=1 2>/dev/null | od -x",
        "dd if=/dev/urandom bs=1024 count=1 2>/dev/null | od -x",
        "sysctl -nx kern.arandom",
        "mktemp -u /tmp/XXXXXXXXXXXXXXXX",  # arc4random(3)
    ],
)
def test_they_have_random_bytes_of_their_own(guests: list[Connection], command: str) -> None:
    said = [connection.run(command, hide=True).stdout for connection in guests]
    assert said[0].strip() != said[1].strip() != ""


def test_they_have_the_time_of_the_host(guests: list[Connection], machines: list[qemu.Machine]) -> None:
    """To the second, and late by what it took them to start at most: the state may be days old."""
    for connection, machine in zip(guests, machines, strict=True):
        ready = qemu._state(Path(machine.folder)).stat().st_mtime
        before = time.time()
        said = float(connection.run("date +%s", hide=True).stdout)
        assert before - 1.5 - (ready - machine.started) < said < time.time() + 1.5


def test_what_one_writes_the_other_does_not_see(guests: list[Connection]) -> None:
    guests[0].run("echo here > /root/file && sync", hide=True)
    assert guests[1].run("test -e /root/file", hide=True, warn=True).failed


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no thread to a processor")
def test_processors_are_bound_for_measurements(machines: list[qemu.Machine]) -> None:
    qemu.pin(machines[0])
    threads = [processor["thread-id"] for processor in qemu.qmp(machines[0], "query-cpus-fast")]
    bound = [os.sched_getaffinity(thread) for thread in threads]
    assert [len(hosts) for hosts in bound] == [1] * machines[0].cpus
    assert len(set.union(*bound)) == min(machines[0].cpus, len(os.sched_getaffinity(0)))
