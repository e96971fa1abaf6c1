"""The rules once more, and races, by the C programs of tests/c: so that it is not ctypes that is tested.

``PYKQ_PROGRAMS`` names the folder that they were built in, for the kernel under test.
"""

import os
import subprocess

import pytest

PROGRAMS = os.environ.get("PYKQ_PROGRAMS", "")
ROUNDS = 20_000  # invoke stress makes millions

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="PYKQ_PROGRAMS does not say where the C programs are")


def run(program, *arguments):
    """The status of a program and its lines; it ends by itself when a call hangs."""
    command = [f"{PROGRAMS}/{program}", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # has its own sanitizer
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=env, timeout=600, **output)
    print(done.stdout)
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def rules(tickling):
    _, lines = run("rules", "patched" if tickling else "stock")
    return lines


@pytest.mark.parametrize("rule", [f"T{number}" for number in range(1, 11)])
def test_a_rule_in_c(rules, rule):
    about = [line for line in rules if f" - {rule} " in line or f"- {rule}:" in line]
    if not about and rule == "T9":
        pytest.skip("a rump kernel does not show its pools")
    assert about, f"{rule} was not tested: {rules}"
    assert all(line.startswith("ok ") for line in about), rules


@pytest.mark.stress
def test_no_tickle_is_lost_in_races(tickling):
    if not tickling:
        pytest.skip("a stock kernel has no tickle to lose")
    status, lines = run("races", "-n", str(ROUNDS))
    assert status == 0, lines[-1]
    assert lines[-1].startswith(f"{ROUNDS} rounds") and "none lost" in lines[-1]
