"""The tensor-core primitives against NumPy, with one fiber a warp and with one a lane."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.device.sim import SimDevice
from tests.kernel.pages import key_places, value_places

SOURCE = Path(__file__).parent / "tensor.cu"
LANES = pytest.mark.parametrize("lanes", [1, 32])


@lru_cache
def device(lanes: int) -> SimDevice:
    return SimDevice(lanes, 1, source=SOURCE)


def bf16(values: np.ndarray) -> np.ndarray:
    """Nearest even bf16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def rounded(values: np.ndarray) -> np.ndarray:
    return (bf16(values).astype(np.uint32) << 16).view(np.float32)


def launch(lanes: int, inputs: dict[str, np.ndarray], results: int, **fields) -> np.ndarray:
    dev = device(lanes)
    shape = np.zeros((), abi.Shape)
    shape["num_blocks"] = shape["world_size"] = 1
    shape["smem_bytes"] = 65536 + 32768
    for name, value in fields.items():
        shape[name] = value
    params = np.zeros((), abi.LaunchParams)
    params["num_ranks"] = 1
    for name, array in inputs.items():
        buffer = dev.zeros(array.nbytes)
        dev.upload(buffer, 0, array)
        params["ranks"][0][name] = buffer.address
    result = dev.zeros(4 * results)
    params["ranks"][0]["tap"] = result.address
    dev.launch(dev.load(shape), params).wait(60)
    return dev.download(result, 0, 4 * results).view(np.float32)


def unit(lanes: int, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    rows, k = x.shape
    tile = weights.reshape(8, k // 32, 32).swapaxes(0, 1)
    fragments = x.reshape(rows, k // 32, 32).swapaxes(0, 1)
    return launch(lanes, {"qkv": bf16(tile), "o_proj": bf16(fragments)}, rows * 8, hidden_size=k, max_rows=rows).reshape(
        rows, 8
    )


@LANES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 13, 16])
@pytest.mark.parametrize("k", [32, 576, 1024])
def test_unit(lanes, rows, k):
    rng = np.random.default_rng(rows * k)
    weights, x = rounded(rng.standard_normal((8, k))), rounded(rng.standard_normal((rows, k)))
    want = x.astype(np.float64) @ weights.T.astype(np.float64)
    np.testing.assert_allclose(unit(lanes, weights, x), want, atol=1e-6 * k**0.5 * 10, rtol=0)


@LANES
def test_a_row_has_the_same_bits_alone_and_in_company(lanes):
    rng = np.random.default_rng(0)
    weights, x = rounded(rng.standard_normal((8, 576))), rounded(rng.standard_normal((16, 576)))
    together = unit(lanes, weights, x)
    for rows in (1, 2, 5, 11):
        assert np.array_equal(unit(lanes, weights, x[:rows]), together[:rows])


@LANES
@pytest.mark.parametrize(("heads", "dim", "positions"), [(1, 32, 1), (3, 64, 50), (16, 128, 96), (4, 96, 33)])
def test_attention(lanes, heads, dim, positions):
    rng = np.random.default_rng(heads * dim + positions)
    q = rounded(rng.standard_normal((heads, dim)))
    k, v = (rounded(rng.standard_normal((positions, dim))) for _ in range(2))
    chunks = -(-positions // 32)
    pages = np.zeros((chunks, 64 * dim), np.uint16)
    pages.reshape(-1)[key_places(dim, np.arange(positions))] = bf16(k)
    pages.reshape(-1)[value_places(dim, np.arange(positions))] = bf16(v)
    scale = dim**-0.5
    fields = {"only_phase": 1, "num_heads": heads, "head_dim": dim, "num_layers": positions, "attn_scale": scale}
    fragments = bf16(q.reshape(heads, dim // 32, 32).swapaxes(0, 1))
    got = launch(lanes, {"o_proj": fragments, "kv": pages}, heads * (dim + abi.MERGE_EXTRA), **fields).reshape(heads, -1)
    scores = (q.astype(np.float64) @ k.T) * scale
    top = scores.max(1)
    weights = np.exp(scores - top[:, None])
    np.testing.assert_allclose(got[:, dim], top, atol=1e-5)
    np.testing.assert_allclose(got[:, dim + 1], weights.sum(1), rtol=1e-5)
    np.testing.assert_allclose(got[:, :dim], weights @ v, atol=8e-3 * np.abs(v).max() * weights.sum(1).max() ** 0.5)


@LANES
def test_exp(lanes):
    x = np.concatenate([np.linspace(-87, 88, 1000), [0, -1e30, -100, 100, np.nan]]).astype(np.float32)
    got = launch(lanes, {"qkv": x}, len(x), only_phase=2, num_layers=len(x))
    np.testing.assert_allclose(got[:1000], np.exp(x[:1000].astype(np.float64)), rtol=4e-7)
    assert got[1000:1003].tolist() == [1, 0, 0]
    assert np.isinf(got[1003])
    assert np.isnan(got[1004])


@LANES
def test_log(lanes):
    x = np.concatenate([np.geomspace(1e-37, 3e38, 2000), 1 + np.linspace(-0.3, 0.4, 1001)]).astype(np.float32)
    got = launch(lanes, {"qkv": x}, len(x), only_phase=3, num_layers=len(x))
    np.testing.assert_allclose(got, np.log(x.astype(np.float64)), rtol=3e-7, atol=1e-12)
