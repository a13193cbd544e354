"""Each primitive of cuda/primitives.cuh against NumPy: what the simulator cannot see is wrong PTX."""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist import abi
from tests.kernel.pages import key_places, value_places

from .bench import from_bf16, to_bf16

WARPS = abi.CONSUMER_WARPS
THREADS = abi.NUM_WARPS * 32


def test_bf16_pairs_exp_root_and_log(bench):
    rng = np.random.default_rng(1)
    values = np.concatenate(
        [rng.standard_normal(4000) * 10.0 ** rng.integers(-4, 2, 4000), [0.0, -0.0, 1.00390625, 1.01171875]]
    )
    pairs = values.astype(np.float32).reshape(-1, 2)
    pairs[:, 0] = np.minimum(np.abs(pairs[:, 0]) + 1e-6, 80.0)  # exp and root take the first of a pair
    xp, n = bench.xp, len(pairs)
    packed, back = xp.zeros(n, np.uint32), xp.zeros((n, 2), np.float32)
    exps, roots, logs = (xp.zeros(n, np.float32) for _ in range(3))
    bench.run("numbers", xp.asarray(pairs), packed, back, exps, roots, logs, np.int32(n))
    bits = to_bf16(pairs)
    np.testing.assert_array_equal(packed.get(), bits[:, 0] | bits[:, 1].astype(np.uint32) << 16)  # the low half is the first
    np.testing.assert_array_equal(back.get(), from_bf16(bits))
    np.testing.assert_allclose(exps.get(), np.exp(pairs[:, 0]), rtol=2e-5)
    np.testing.assert_allclose(roots.get(), pairs[:, 0] ** -0.5, rtol=1e-6)
    np.testing.assert_allclose(logs.get(), np.log(pairs[:, 0].astype(np.float64)), rtol=3e-7)


def test_warp_sum_and_maximum_reach_every_lane(bench):
    rng = np.random.default_rng(2)
    values = rng.standard_normal((abi.NUM_WARPS, 32)).astype(np.float32)
    keys = rng.integers(0, 1 << 63, (abi.NUM_WARPS, 32), np.uint64) * 2 + 1
    xp = bench.xp
    sums = xp.zeros_like(xp.asarray(values))
    tops, totals = (xp.zeros_like(xp.asarray(keys)) for _ in range(2))
    bench.run("warps", xp.asarray(values), xp.asarray(keys), sums, tops, totals)
    np.testing.assert_allclose(sums.get(), np.repeat(values.sum(1, keepdims=True), 32, 1), rtol=1e-5, atol=1e-5)
    assert (sums.get() == sums.get()[:, :1]).all(), "lanes of a warp disagree on a sum"
    np.testing.assert_array_equal(tops.get(), np.repeat(keys.max(1, keepdims=True), 32, 1))
    np.testing.assert_array_equal(totals.get(), np.repeat(keys.sum(1, keepdims=True, dtype=np.uint64), 32, 1))


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_groups_of_lanes(bench, lanes):
    rng = np.random.default_rng(lanes)
    values = rng.standard_normal((abi.NUM_WARPS, 32)).astype(np.float32)
    numbers = rng.integers(0, 1 << 32, (abi.NUM_WARPS, 32), np.uint32)
    numbers[::3] |= 1
    xp = bench.xp
    sums, maxima = (xp.zeros_like(xp.asarray(values)) for _ in range(2))
    totals, odd = (xp.zeros_like(xp.asarray(numbers)) for _ in range(2))
    bench.run("groups", xp.asarray(values), xp.asarray(numbers), sums, maxima, totals, odd, np.int32(lanes))
    groups = values.reshape(abi.NUM_WARPS, -1, lanes)
    np.testing.assert_allclose(sums.get(), np.repeat(groups.sum(2), lanes, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(maxima.get(), np.repeat(groups.max(2), lanes, 1))
    np.testing.assert_array_equal(totals.get(), np.repeat(numbers.sum(1, keepdims=True, dtype=np.uint32), 32, 1))
    np.testing.assert_array_equal(odd.get(), np.repeat((numbers % 2 == 1).all(1, keepdims=True), 32, 1))


def test_quotients(bench):
    rng = np.random.default_rng(7)
    above, below = (rng.standard_normal(4000).astype(np.float32) * 10.0 ** rng.integers(-6, 6, 4000) for _ in range(2))
    above, below = above.astype(np.float32), below.astype(np.float32)
    below[:2] = np.inf  # as 1 + e^x is for a large x
    out = bench.xp.zeros(4000, np.float32)
    bench.run("quotients", bench.xp.asarray(above), bench.xp.asarray(below), out, np.int32(4000))
    np.testing.assert_allclose(out.get(), above / below, rtol=3e-7)


def test_whole_quotients(bench):
    """Exact, also just below a whole number and at the largest numbers that are allowed."""
    rng = np.random.default_rng(8)
    small = np.stack(np.meshgrid(np.arange(2048), np.arange(1, 65)), -1).reshape(-1, 2)
    below = rng.integers(1, 1 << 20, 50_000)
    near = np.stack([np.minimum(below * rng.integers(1, 64, 50_000) - rng.integers(0, 2, 50_000), (1 << 20) - 1), below], -1)
    large = rng.integers(1, 1 << 20, (50_000, 2))
    above, below = np.concatenate([small, near, large]).astype(np.int32).T.copy()
    out = bench.xp.zeros(len(above), np.int32)
    bench.run("whole_quotients", bench.xp.asarray(above), bench.xp.asarray(below), out, np.int32(len(above)))
    np.testing.assert_array_equal(out.get(), above // below)


def test_products_of_bf16_pairs(bench):
    """Exact in float32, then rounded once."""
    one, other = (to_bf16(np.random.default_rng(seed).standard_normal(2000) * 30) for seed in (5, 6))
    one[:4] = to_bf16(np.float32([0.0, -0.0, 1.0, -1.0]))
    product = bench.xp.zeros(1000, np.uint32)
    bench.run("products", *(bench.xp.asarray(a.view(np.uint32)) for a in (one, other)), product, np.int32(1000))
    np.testing.assert_array_equal(product.get().view(np.uint16), to_bf16(from_bf16(one) * from_bf16(other)))


def test_plain_quads(bench):
    values = np.random.default_rng(4).standard_normal((1000, 4)).astype(np.float32)
    out = bench.xp.zeros((1000, 4), np.float32)
    bench.run("plain", bench.xp.asarray(values), out, np.int32(1000))
    np.testing.assert_array_equal(out.get(), values)


def test_a_vote_of_the_consumers(bench):
    rounds, threads = 64, WARPS * 32
    flags = np.zeros((rounds, threads), np.uint32)
    rng = np.random.default_rng(3)
    for r in range(0, rounds, 3):  # one voter in every third round, anywhere
        flags[r, rng.integers(threads)] = 1
    flags[1] = 1
    out = bench.xp.full((rounds, threads), 7, np.uint32)
    bench.run("votes", bench.xp.asarray(flags), out, np.int32(rounds))
    np.testing.assert_array_equal(out.get(), np.repeat(flags.max(1, keepdims=True), threads, 1))


def test_atomics(bench):
    xp, blocks = bench.xp, 4
    counter, flag, firsts = (xp.zeros(1, np.uint32) for _ in range(3))
    tickets = xp.zeros(THREADS, np.uint32)
    bench.run("atomics", counter, flag, tickets, firsts, blocks=1)
    assert sorted(tickets.get()) == list(range(THREADS))
    assert int(firsts[0]) == 1
    bench.run("atomics", counter, flag, tickets, firsts, blocks=blocks)
    assert int(counter[0]) == THREADS * (blocks + 1)
    assert int(firsts[0]) == 1


@pytest.mark.parametrize("max_rows", range(1, abi.MAX_ROWS + 1))
def test_accumulate(bench, max_rows):
    rng = np.random.default_rng(max_rows)
    for chunks, rows in ((1, max_rows), (7, max_rows), (32, max_rows), (29, max(1, max_rows - 1))):
        weights, x = to_bf16(rng.standard_normal((8, chunks * 32))), to_bf16(rng.standard_normal((max_rows, chunks * 32)))
        tile = weights.reshape(8, chunks, 32).transpose(1, 0, 2)
        activation = x.reshape(max_rows, chunks, 32).transpose(1, 0, 2)
        part = bench.xp.full((WARPS, max_rows, 8), 12345.0, np.float32)
        arrays = [bench.xp.asarray(np.ascontiguousarray(a)) for a in (tile, activation)]
        bench.run("accumulate", *arrays, part, np.int32(chunks), np.int32(rows), max_rows=max_rows, smem_bytes=128 * 1024)
        got = part.get()
        assert (got[:, rows:] == 12345.0).all(), "a row that is not live was written"
        per_chunk = np.einsum("cnk,crk->crn", from_bf16(tile).astype(np.float64), from_bf16(activation).astype(np.float64))
        for warp in range(WARPS):
            np.testing.assert_allclose(got[warp, :rows], per_chunk[warp::WARPS].sum(0)[:rows], rtol=1e-4, atol=1e-3)


def pack_chunk(k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """K and V of 32 positions, [32, head_dim], in a page's order."""
    dim, positions = k.shape[1], np.arange(32)
    out = np.zeros(64 * dim, np.uint16)
    out[key_places(dim, positions)], out[value_places(dim, positions)] = k, v
    return out


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (3, 1), (4, 1), (8, 1), (9, 1), (16, 1), (4, 4), (3, 5), (1, 8), (8, 2)])
def test_attend(bench, head_dim, heads, rows):
    """Queries of several rows: each sees one position more than the row before, in the last chunk."""
    rng, queries = np.random.default_rng(head_dim + heads), heads * rows
    scale = head_dim**-0.5
    for count, last, workers in ((1, 8, 1), (1, 32, 1), (2, 45, 1), (4, 128, 3), (4, 104, 8)):
        valid = last + 1 - rows  # of the first row
        q, k, v = (
            rng.standard_normal(shape) for shape in ((queries, head_dim), (32 * count, head_dim), (32 * count, head_dim))
        )
        k[: 32 * count : 7] *= 4.0  # peaks, so that the running maximum moves
        qb, kb, vb = to_bf16(q), to_bf16(k), to_bf16(v)
        kb[last:], vb[last:] = 0x7F00, 0x7F00  # huge but finite: nothing past `last` may be seen
        chunks = np.concatenate([pack_chunk(kb[c * 32 : c * 32 + 32], vb[c * 32 : c * 32 + 32]) for c in range(count)])
        q_order = np.ascontiguousarray(qb.reshape(queries, head_dim // 32, 32).transpose(1, 0, 2))
        merge = bench.xp.full((workers, queries, head_dim + abi.MERGE_EXTRA), 5.0, np.float32)
        arrays = bench.xp.asarray(q_order), bench.xp.asarray(chunks)
        numbers = *map(np.int32, (queries, heads, count, valid, workers)), np.float32(scale)
        sizes = {"head_dim": head_dim, "num_heads": heads, "num_kv_heads": 1, "attention_rows": rows}
        bench.run("attend", *arrays, merge, *numbers, **sizes, smem_bytes=160 * 1024)
        scores = from_bf16(qb).astype(np.float64) @ from_bf16(kb)[:last].T.astype(np.float64) * scale
        scores[np.arange(last) >= valid + np.arange(queries)[:, None] // heads] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        want = weights @ from_bf16(vb)[:last].astype(np.float64) / weights.sum(1, keepdims=True)
        out, top, total, _ = np.split(merge.get().astype(np.float64), [head_dim, head_dim + 1, head_dim + 2], axis=2)
        factor = np.exp(top - top.max(0))  # of a warp's sums, as attention.cuh combines them
        got = (out * factor).sum(0) / (total * factor).sum(0)
        np.testing.assert_allclose(top.max(0)[:, 0], scores.max(1), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-7 * np.abs(from_bf16(vb)[:last]).max())


def test_words_ping_pong_between_blocks(bench):
    there, back, errors = bench.xp.zeros(128, np.uint64), bench.xp.zeros(128, np.uint64), bench.xp.zeros(1, np.uint32)
    bench.set_deadline(2_000_000)
    bench.run("words", bench.params, there, back, errors, np.int32(20_000), blocks=2)
    assert int(errors[0]) == 0, f"{int(errors[0]) & 0xFFFF} wrong payloads, {int(errors[0]) >> 16} lanes gave up"


def test_each_lane_has_the_clock_of_its_own_word(bench):
    blocks = 9
    words, trips, errors = (
        bench.xp.zeros(4 * blocks, np.uint64),
        bench.xp.zeros(blocks, np.uint32),
        bench.xp.zeros(1, np.uint32),
    )
    bench.set_deadline(2_000_000)
    bench.run("clocks", bench.params, words, trips, errors, np.int32(blocks), np.int32(50), blocks=blocks)
    assert int(errors[0]) == 0
    found = trips.get()[1:].astype(float)
    print(f"round trips in clocks, of answers that take 2, 4, … 16 µs: {found.tolist()}")
    steps = np.diff(found)  # 2 µs each, at some GHz
    assert np.all(steps > 1000) and np.all(steps < 8000)


def test_a_word_that_never_comes_is_reported(bench):
    words = bench.xp.asarray(np.array([(5 << 32) | 1, (5 << 32) | 2], np.uint64))
    result = bench.xp.zeros(4, np.uint32)
    bench.set_deadline(20_000)
    bench.run("wait_for", bench.params, words, result, np.uint32(7))
    failed, _, _, waited_us = result.get()
    assert failed == 1
    assert 20_000 <= waited_us < 1_000_000
    fault = bench.fault_record()
    told = {
        name: int(fault[name]) for name in ("valid", "rank", "block", "phase", "layer", "wait", "expected", "seen", "source")
    }
    assert told == {
        "valid": 1, "rank": 0, "block": 3, "phase": abi.Phase.DOWN_PROJ, "layer": 5, "wait": abi.Wait.WORDS,
        "expected": 7, "seen": 5, "source": 6,
    }  # fmt: skip
    assert int(fault["waited_us"]) >= 20_000
    assert int(bench.symmetric.view(np.uint32)[0]) == 1, "no abort word was raised"


def test_a_word_that_is_there_and_an_abort(bench):
    words = bench.xp.asarray(np.array([(7 << 32) | 11, (7 << 32) | 12], np.uint64))
    result = bench.xp.zeros(4, np.uint32)
    bench.set_deadline(1_000_000)
    bench.run("wait_for", bench.params, words, result, np.uint32(7))
    assert list(result.get()[:3]) == [0, 11, 12]
    bench.symmetric.view(np.uint32)[0] = 1  # somebody else has given up: nobody waits for the deadline
    bench.run("wait_for", bench.params, words, result, np.uint32(8))
    assert int(result[0]) == 1
    assert int(result[3]) < 100_000
    assert int(bench.fault_record()["valid"]) == 0


@pytest.mark.parametrize(("count", "last"), [(1, 16), (1, 16384), (4, 16384), (5, 512), (63, 4096), (400, 16384)])
def test_ring_of_bulk_copies(bench, count, last):
    tiles = np.random.default_rng(count).integers(0, 1 << 32, (count, 4096), np.uint32)
    sums = bench.xp.zeros(WARPS, np.uint32)
    bench.set_deadline(2_000_000)
    bench.run("ring", bench.params, bench.xp.asarray(tiles), sums, np.int32(count), np.uint32(last))
    tiles[-1, last // 4 :] = 0
    want = (tiles * np.arange(1, count + 1, dtype=np.uint32)[:, None]).sum(dtype=np.uint32)
    # Every lane of a warp adds its own part, so the warps together have read each value once.
    assert sums.get().sum(dtype=np.uint32) == want
    assert int(bench.fault_record()["valid"]) == 0


def test_the_kv_rule(bench):
    page, news, errors = bench.xp.zeros(4096, np.uint32), bench.xp.zeros(4, np.uint64), bench.xp.zeros(2, np.uint32)
    bench.set_deadline(2_000_000)
    bench.run("kv_rule", bench.params, page, news, errors, np.int32(20_000), blocks=2)
    wrong, gave_up = errors.get()
    assert (wrong, gave_up) == (0, 0), f"{wrong} stale values of a page, {gave_up} threads gave up"
