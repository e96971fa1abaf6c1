"""The rules once more, and races, by the C programs of tests/c: so that it is not ctypes that is tested.

``PYKQ_PROGRAMS`` names the folder that they were built in, for the kernel under test; ``PYKQ_RULES`` the file
with what the rules have come to, where they were started before Python was.
"""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

PROGRAMS = os.environ.get("PYKQ_PROGRAMS", "")
ROUNDS = 20_000  # invoke stress makes millions
RULES_WITHIN_S = 120  # one that hangs says so after half of it
NAMED_WITHIN_S = 60  # of which the program waits one; the rest is for a slow guest

# What an episode of races.c may be like; the last ones are nothing on a rump kernel.
KINDS = ("nothing", "timeouts", "polls", "changes", "events", "close", "signals", "forks")

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="PYKQ_PROGRAMS does not say where the C programs are")


def run(program, *arguments, within_s=600):
    """The status of a program and its lines; it ends by itself when a call hangs."""
    command = [f"{PROGRAMS}/{program}", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # has its own sanitizer
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=env, timeout=within_s, **output)
    print(done.stdout)
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def rules(tickling):
    if "PYKQ_RULES" not in os.environ:
        return run("rules", "patched" if tickling else "stock")[1]
    result, deadline = Path(os.environ["PYKQ_RULES"]), time.monotonic() + RULES_WITHIN_S
    while not result.exists():
        assert time.monotonic() < deadline, "the rules have not come to an end"
        time.sleep(0.05)
    return result.read_text().splitlines()


@pytest.mark.parametrize("rule", [f"T{number}" for number in range(1, 11)])
def test_a_rule_in_c(rules, rule):
    about = [line for line in rules if f" - {rule} " in line or f"- {rule}:" in line]
    if not about and rule == "T9":
        pytest.skip("a rump kernel does not show its pools")
    assert about, f"{rule} was not tested: {rules}"
    assert all(line.startswith("ok ") for line in about), rules
    for line in about:
        if "# SKIP" in line:
            pytest.skip(line.partition("# SKIP ")[2])


@pytest.mark.stress
def test_no_tickle_is_lost_in_races(tickling):
    if not tickling:
        pytest.skip("a stock kernel has no tickle to lose")
    status, lines = run("races", "-n", str(ROUNDS))
    assert status == 0, lines[-1]
    accounted = re.match(r"(\d+) rounds accounted for of (\d+), .*none lost", lines[-1])
    assert accounted, lines[-1]
    assert ROUNDS <= int(accounted[1]) <= int(accounted[2])


@pytest.mark.stress
@pytest.mark.parametrize("kind", [*KINDS, ",".join(KINDS[1:])])
def test_a_tickle_that_is_not_sent_is_named(tickling, kind):
    """So that races can fail, whatever else goes on: here each 50th round sends none."""
    if not tickling:
        pytest.skip("a stock kernel has no tickle to lose")
    status, lines = run("races", "-d", "50", "-w", kind, "-s", "1", within_s=NAMED_WITHIN_S)
    assert status == 1, lines
    assert lines[-1].startswith("a tickle is lost: round ") and "(again: races -s 1 -e " in lines[-1]
