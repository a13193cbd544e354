"""Rounding to bfloat16: the generic bit arithmetic (CuPy's path) agrees with ml_dtypes (NumPy's)."""

import ml_dtypes
import numpy as np
import pytest

from imex_persist.model.bf16 import round_bf16, to_bits, to_float32


class _GenericNumpy:
    """NumPy under another name, so that to_bits takes the path it takes for CuPy."""

    def __getattr__(self, name):
        return getattr(np, name)


def test_both_paths_round_alike():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, 3.4e38, 1.00390625, 1.01171875], np.float32)  # two halfway cases
    values = np.concatenate([values[~np.isnan(values)], special])
    np.testing.assert_array_equal(to_bits(values), to_bits(values, _GenericNumpy()))
    assert np.isnan(to_float32(to_bits(np.array([np.nan, -np.nan], np.float32), _GenericNumpy()))).all()


def test_exact_where_bfloat16_is():
    bits = np.arange(65536, dtype=np.uint16)
    back = to_bits(to_float32(bits))
    finite = (bits & 0x7F80) != 0x7F80
    np.testing.assert_array_equal(back[finite], bits[finite])
    np.testing.assert_array_equal(to_bits(bits.view(ml_dtypes.bfloat16)), bits)
    np.testing.assert_array_equal(to_bits(np.array([1.5, -2.0], np.float16)), [0x3FC0, 0xC000])


def test_round_keeps_the_dtype():
    assert round_bf16(np.array([1.001])).dtype == np.float64
    assert round_bf16(np.array([1.001]))[0] == 1.0


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="not supported"):
        to_bits(np.zeros(3, dtype))
