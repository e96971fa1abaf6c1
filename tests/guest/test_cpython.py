"""CPython's own tests of selectors and event loops, on pykq's; left out where Python came without them."""

import unittest

import pytest

import pykq
from pykq import aio

events = pytest.importorskip("test.test_asyncio.test_events", reason="this Python came without its tests")
utils = pytest.importorskip("test.test_asyncio.utils")
selectors_ = pytest.importorskip("test.test_selectors")


# libkqueue returns 512 events at most, and finds a failed connect to be a good one.
NOT_LIBKQUEUE = (
    "test_above_fd_setsize",
    "test_create_connection_local_addr_nomatch_family",
    "test_create_connection_local_addr_skip_different_family",
)


@pytest.fixture(autouse=True)
def system(request, kernel, watchdog):
    if not kernel.shares_descriptors:
        pytest.skip(f"not the running system: {kernel.name}")
    if kernel.abi.system == "libkqueue" and request.node.name in NOT_LIBKQUEUE:
        pytest.skip("libkqueue does not do that")


class TestSelector(selectors_.BaseSelectorTestCase, selectors_.ScalableSelectorMixIn, unittest.TestCase):
    SELECTOR = pykq.TickleSelector


class TestLoop(events.EventLoopTestsMixin, events.SubprocessTestsMixin, utils.TestCase):
    def create_event_loop(self):
        return aio.TickleEventLoop()

    test_internal_fds = None  # is about the socket pair that the loop has not
