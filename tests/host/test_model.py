"""The model of the tickle (patches/model.py): every state is looked at, and every mutant is found out."""

import runpy

import pytest

from vm.guest import ROOT

MODEL = runpy.run_path(str(ROOT / "patches/model.py"))


@pytest.mark.parametrize("scenario", MODEL["SCENARIOS"])
def test_no_order_of_steps_loses_a_tickle(scenario):
    assert MODEL["check"](MODEL["SCENARIOS"][scenario]) > 50


@pytest.mark.parametrize("mutant", MODEL["MUTANTS"])
def test_a_mutant_is_found_out(mutant):
    assert MODEL["found_out"](mutant)


def test_waking_one_sleeper_fails_beside_one_that_waits_for_a_flux():
    """KQ_FLUX_WAIT sleeps on the same condition variable, in the ports to NetBSD 10 and later."""
    mutant = "the ioctl wakes one of the sleepers"
    for name, first in MODEL["SCENARIOS"].items():
        if name != "a change waits for a flux":
            MODEL["check"](first, mutant)
    assert "a tickle is lost" in MODEL["found_out"](mutant)


def test_netbsds_own_race_of_close_is_found():
    with pytest.raises(MODEL["Wrong"], match="a kqueue that is being closed"):
        MODEL["check"](MODEL["CLOSE"], closes=True)
