"""Two guests that started from one saved state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from vm import config, qemu

STATE_AGE_S = 5.0  # then a clock that was not set is late by more than a test of it allows


@pytest.fixture(scope="session")
def machines() -> Iterator[list[qemu.Machine]]:
    settings = config.load()
    names = ["test-one", "test-other"]
    with ExitStack() as stack:
        for name in names:
            stack.callback(qemu.down, settings, name)
        qemu.up(settings, name=names[0])  # leaves a state, where there is none yet
        qemu.down(settings, names[0])
        time.sleep(STATE_AGE_S)
        with ThreadPoolExecutor(len(names)) as pool:
            yield list(pool.map(lambda name: qemu.up(settings, name=name), names))
