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


def test_waking_one_sleeper_would_lose_nothing():
    """So that all are woken is T7's wish; the promise does not hang on it."""
    assert not MODEL["found_out"](MODEL["CV_SIGNAL"])


def test_netbsds_own_race_of_close_is_found():
    with pytest.raises(MODEL["Wrong"], match="a kqueue that is being closed"):
        MODEL["check"](MODEL["CLOSE"], closes=True)
