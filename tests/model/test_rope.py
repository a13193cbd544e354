"""Rotary tables against transformers' own numbers (goldens/rope.json)."""

import numpy as np
import pytest

from imex_persist.model.config import ModelConfig
from imex_persist.model.rope import inv_freq, rope_table
from imex_persist.model.rope_scaling import RopeScaling
from tests.model.helpers import golden, tiny

CASES = {name: case for name, case in golden("rope").items() if name != "made_with"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_matches_transformers(name):
    case = CASES[name]
    config = ModelConfig.from_dict(case["config"])
    expected = np.array(case["inv_freq"], np.float32)
    np.testing.assert_allclose(inv_freq(config), expected, rtol=3e-7)
    for row, position in enumerate(case["positions"]):
        table = rope_table(config, 1, position)[0, : config.head_dim // 2]
        # a frequency that is off by an ulp turns the angle by position * frequency * 2^-23
        tolerance = 1e-6 + position * expected * 2.0**-22
        assert (np.abs(table[:, 0] - case["cos"][row]) <= tolerance).all()
        assert (np.abs(table[:, 1] - case["sin"][row]) <= tolerance).all()


def test_padding_pairs_rotate_nothing():
    table = rope_table(tiny(), 5, 3)
    assert table.shape == (5, 32, 2) and table.dtype == np.float32
    assert (table[:, 17:] == [1, 0]).all()
    np.testing.assert_array_equal(rope_table(tiny(), 8)[3:], table)


def test_factors_divide_one_by_one():
    plain = tiny()
    factors = tuple(float(i + 1) for i in range(17))
    scaled = ModelConfig(
        **{f: getattr(plain, f) for f in plain.__dataclass_fields__} | {"rope_scaling": RopeScaling("factors", factors=factors)}
    )
    np.testing.assert_array_equal(inv_freq(scaled), inv_freq(plain) / np.array(factors, np.float32))
