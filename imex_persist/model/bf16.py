"""bfloat16 as uint16 bit patterns: what weights are on the device, and how the host makes and reads them.

Every function takes NumPy or CuPy arrays; CuPy has no bfloat16, so the bits travel as uint16.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np


def to_bits(array, xp=np):
    """`array` rounded to nearest even, as uint16 bits of the same shape.

    Takes float16, float32, float64, bfloat16, or uint16, which are bits already. Raises ValueError for any other dtype.
    """
    if array.dtype == np.uint16:
        return array
    if array.dtype == ml_dtypes.bfloat16:
        return array.view(np.uint16)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"weights of dtype {array.dtype} are not supported: give bfloat16, float16 or float32")
    if xp is np:
        with np.errstate(invalid="ignore"):  # a NaN stays one
            return array.astype(ml_dtypes.bfloat16).view(np.uint16)
    bits = array.astype(xp.float32).view(xp.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding up could carry a NaN into infinity or zero
    return xp.where(nan, 0x7FC0, rounded).astype(xp.uint16)


def to_float32(bits, xp=np):
    """uint16 bfloat16 bits as float32 of the same shape, exactly."""
    return (bits.astype(xp.uint32) << 16).view(xp.float32)


def round_bf16(array: np.ndarray) -> np.ndarray:
    """`array` rounded to the nearest bfloat16, in its own dtype."""
    return array.astype(np.float32).astype(ml_dtypes.bfloat16).astype(array.dtype)
