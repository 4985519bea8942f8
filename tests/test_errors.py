import math

import numpy as np
import pytest

from polyak_model import errors as arguments


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(3)])
def test_numbers_of_python_and_numpy_are_numbers(value):
    assert arguments.is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, [1], np.ones(1), 1j])
def test_bools_strings_and_arrays_are_not_numbers(value):
    assert not arguments.is_number(value)


def test_checked_numbers_are_returned_as_python_numbers():
    assert type(arguments.check_decay(np.float32(0.5))) is float
    assert type(arguments.check_exponent("eta", 3)) is float
    assert type(arguments.check_integer("start_step", np.int32(3), at_least=0)) is int
    assert arguments.check_choice("route", "raw", ("average", "raw")) == "raw"


def test_an_invalid_choice_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="`route` must be one of 'a', 'b'. Received: route=3"):
        arguments.check_choice("route", 3, ("a", "b"))


@pytest.mark.parametrize("decay", [1.0, math.nan, -1e-9])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="`decay` must be a number in"):
        arguments.check_decay(decay)
