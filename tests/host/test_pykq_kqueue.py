"""What a wait makes of its timeout; all else about a Kqueue is tested on real kernels, in tests/rules."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykq import _kqueue


@given(timeout=st.floats(0, 1e8, exclude_min=True))
def test_a_timeout_is_never_shortened_and_never_a_look(timeout):
    timeout_ns = _kqueue._nanoseconds(timeout)
    assert isinstance(timeout_ns, int)
    assert timeout_ns >= 1
    # To the nanosecond, but for what a float of that size cannot hold.
    assert abs(timeout_ns - Fraction(timeout) * 10**9) <= 1 + timeout_ns * 2.0**-52


@pytest.mark.parametrize("timeout", [1.0000001e8, 1e300, math.inf])
def test_a_huge_timeout_has_no_end(timeout):
    assert _kqueue._nanoseconds(timeout) is None


@pytest.mark.parametrize("timeout", [-1, -1e-9, -math.inf, math.nan])
def test_a_timeout_below_zero_or_nan_is_refused(timeout):
    with pytest.raises(ValueError, match="timeout must be None or seconds from 0 up"):
        _kqueue._nanoseconds(timeout)
