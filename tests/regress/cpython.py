"""Runs a module of CPython's tests: a line for each test, its name, a tab, and what came of it."""

import faulthandler
import sys
import unittest

from test import support

HANG_S = 300


class Result(unittest.TestResult):
    """Prints each outcome when it is known: a module that hangs or crashes has told of the others."""

    def startTest(self, test):
        self.outcome = "passed"
        super().startTest(test)

    def addFailure(self, test, why):
        self.outcome = f"failed: {why[1]!r:.200}"

    addError = addFailure

    def addSkip(self, test, why):
        self.outcome = f"skipped: {why}"

    def addSubTest(self, test, subtest, why):
        if why is not None:
            self.addFailure(test, why)

    def stopTest(self, test):
        print(test.id(), " ".join(self.outcome.split()), sep="\t", flush=True)


support.use_resources = []  # no network, no hours
faulthandler.dump_traceback_later(HANG_S, exit=True)
unittest.defaultTestLoader.loadTestsFromName(f"test.{sys.argv[1]}").run(Result())
