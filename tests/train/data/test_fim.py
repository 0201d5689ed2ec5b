"""Fill-in-the-middle: how often, where it cuts, and that nothing is lost."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.fim import SpecialTokens, arrange

SPECIAL = SpecialTokens(eos=0, fim_begin=1, fim_hole=2, fim_end=3)


@given(text=st.text(), seed=st.integers())
def test_prefix_suffix_middle_put_back_in_order_are_the_document(text, seed):
    begin, prefix, hole, suffix, end, middle, eos = arrange(text, SPECIAL, 1.0, Random(seed))
    assert (begin, hole, end, eos) == (1, 2, 3, 0)
    assert prefix + middle + suffix == text


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_rate_is_met_within_five_standard_deviations(rate):
    n = 20_000
    arranged = sum(len(arrange("some text", SPECIAL, rate, Random(i))) == 7 for i in range(n))
    assert abs(arranged - n * rate) <= 5 * (n * rate * (1 - rate)) ** 0.5


def test_both_cuts_are_uniform_over_the_characters():
    length, n = 30, 20_000
    middles = [len(arrange("x" * length, SPECIAL, 1.0, Random(i))[5]) for i in range(n)]
    places = length + 1
    expected = (places**2 - 1) / (3 * places)  # of |a - b| for independent uniform a, b over that many places
    assert abs(sum(middles) / n - expected) < 5 * places / (18 * n) ** 0.5
