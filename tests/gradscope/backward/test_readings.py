"""Readings of a sweep on the CPU: signed ones and rows without any."""

import numpy as np

from gradscope.backward.readings import Reading, collected, near_one


def test_signed_readings_are_brought_near_one_without_rounding():
    values = np.array([[[-3e-200, 1e-250], [0.0, -1e-300]], [[-2.0, -5.0], [-7e200, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    exponents = np.array([5, -1000, 40])
    found = near_one(Reading(values, exponents))
    largest = np.abs(found.values).max(axis=(1, 2))
    assert largest.tolist() == [np.frexp(3e-200)[0], np.frexp(7e200)[0], 0]
    for before, after, shift in zip(values[:2], found.values[:2], (exponents - found.exponents)[:2], strict=True):
        assert np.array_equal(np.ldexp(after, -int(shift)), before)
    assert found.exponents[2] == found.exponents[:2].min()  # a zero takes the least exponent


def test_rows_below_no_target_have_no_readings():
    for found in (collected([[], []]), [near_one(one) for one in collected([[]])]):
        assert {(one.values.shape, one.exponents.shape) for one in found} == {((0, 1), (0,))}
