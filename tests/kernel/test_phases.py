"""Every phase alone, on all ranks: random words and pages in, compared with float64 math on the same inputs (tolerance.py).

What a phase adds up exactly (the residual, in float32 and a fixed order) and what it only moves (embeddings, keys, values) is
compared bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imex_persist.abi import TILE_K, Phase, Strategy
from imex_persist.model.bf16 import to_bits, to_float32

from . import tolerance
from .cases import CASES, NUM_CASES, Case, Chunk, exchange_of, model, only, uses
from .phase_run import PhaseRun
from .tolerance import Bounded, check

WIDE = Case(
    "wide", 1, model(hidden_size=1088, head_dim=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, vocab_size=40),
    20, (Chunk(0, 3, 1, True),),
    {"max_rows": 1, "num_slots": 1, "max_model_len": 256, "strategy": Strategy.ONE_SHOT_LOCAL, "one_shot_rows": 0, "down_slices": 1},
)  # fmt: skip


def every_case(phase: Phase):
    """Runs a test of `phase` on every case."""

    def mark(test):
        return pytest.mark.parametrize("index", range(NUM_CASES))(uses(lambda index: [only(CASES[index], phase)])(test))

    return mark


def make_run(make_device, index: int, phase: Phase) -> PhaseRun:
    case, options = only(CASES[index], phase)
    return PhaseRun(make_device, case, **options)


def check_sums(p: PhaseRun, field: str, residual: np.ndarray, epoch: int) -> None:
    """Slice owners publish the residual rounded to bf16, to all who read it; in ONE_SHOT nobody publishes anything."""
    for rank in p.ranks:
        if exchange_of(p.case) == Strategy.ONE_SHOT:
            assert not p.run.bare(rank, field).any()
        else:
            got = p.get_bf16(rank, field, p.size("hidden_size"), epoch)
            np.testing.assert_array_equal(to_bits(got), to_bits(residual + np.float32(0)), f"{field} of rank {rank}")


def normed(p: PhaseRun, rank: int, index: int, residual: np.ndarray) -> Bounded:
    """Norm number `index` of a residual, as a rank's phases see it."""
    return tolerance.normed(residual, p.models[rank].norms[index], float(p.shape["rms_eps"]), p.size("norm_size"))


@every_case(Phase.EMBED)
def test_embed(make_device, index):
    p = make_run(make_device, index, Phase.EMBED)
    p.launch()
    for rank in p.ranks:
        expected = p.models[rank].matrices("embed")[0][p.tokens]
        np.testing.assert_array_equal(p.run.tap_of(rank, Phase.EMBED)[: p.rows], expected)


def check_qkv(p: PhaseRun) -> None:
    residual = p.put_partials("off_down_part", p.size("down_slices"), p.epoch - 1)
    p.launch()
    check_sums(p, "off_down_sum", residual, p.epoch - 1)
    heads, kv_heads, dim = (p.size(k) for k in ("num_heads", "num_kv_heads", "head_dim"))
    for rank in p.ranks:
        x = normed(p, rank, 2 * p.layer, residual)
        y = tolerance.product(x, p.models[rank].matrices("qkv", p.layer)[0])
        expected = tolerance.rotated(y, p.rope, heads + kv_heads)
        got = p.get_bf16(rank, "off_qkv", (heads + 2 * kv_heads) * dim)
        check(f"qkv of rank {rank}", got, expected, "bfloat16")


@every_case(Phase.QKV)
def test_qkv(make_device, index):
    check_qkv(make_run(make_device, index, Phase.QKV))


@uses(lambda: [only(WIDE, Phase.QKV)])
def test_a_block_without_a_unit(make_device):
    """Units of two tiles go in groups of two, but behind the mark of a block that has none there is no second stage to wait for."""
    case, options = only(WIDE, Phase.QKV)
    check_qkv(PhaseRun(make_device, case, **options))


def check_attention(p: PhaseRun) -> list[np.ndarray]:
    """Returns each rank's outputs."""
    heads, kv_heads, dim = (p.size(k) for k in ("num_heads", "num_kv_heads", "head_dim"))
    pages, words = [], []
    for rank in p.ranks:
        bits = p.put_bf16(rank, "off_qkv", (heads + 2 * kv_heads) * dim, scale=p.rng.choice([0.5, 1, 2]))
        words.append(bits.reshape(p.rows, heads + 2 * kv_heads, dim))
        pages.append(p.put_pages(rank))
    p.launch()
    for rank in p.ranks:
        q, keys, values = np.split(words[rank], [heads, heads + kv_heads], axis=1)
        got = p.get_bf16(rank, "off_attn", heads * dim).reshape(p.rows, heads, dim)
        row = 0
        for chunk in p.case.chunks:  # what the step appends, each row sees up to itself
            rows = slice(row, row + chunk.count)
            pages[rank].write(p.layer, chunk.slot, chunk.start, keys[rows], values[rows])
            seen = [to_float32(a) for a in pages[rank].read(p.layer, chunk.slot, chunk.start + chunk.count)]
            for i in range(chunk.count):
                k, v = (a[: chunk.start + i + 1] for a in seen)
                expected = tolerance.attended(to_float32(q[row + i]), k, v, float(p.shape["attn_scale"]))
                check(f"attention of rank {rank}, row {row + i}", got[row + i], expected, "bfloat16")
            row += chunk.count
        np.testing.assert_array_equal(p.get_pages(rank), pages[rank].bits.reshape(-1), f"KV pages of rank {rank}")
    long = max(chunk.start + chunk.count for chunk in p.case.chunks) > 256 and p.size("max_splits") > 1
    split_words = p.size("max_rows") * heads * p.size("max_splits") * (dim + 2)
    assert p.raw(0, "off_split", split_words)[1].any() == long, "contexts are cut above 256 positions, and only there"
    return [p.get_bf16(rank, "off_attn", heads * dim) for rank in p.ranks]


@every_case(Phase.ATTENTION)
def test_attention(make_device, index):
    check_attention(make_run(make_device, index, Phase.ATTENTION))


CROWD = Case(
    "crowd", 7, model(hidden_size=256, head_dim=64, num_attention_heads=6, num_key_value_heads=2, intermediate_size=64, vocab_size=40),
    24, (Chunk(0, 299, 1), Chunk(2, 383, 1), Chunk(1, 256, 1), Chunk(3, 320, 2)),
    {"max_rows": 5, "num_slots": 4, "max_model_len": 704, "strategy": Strategy.ONE_SHOT_LOCAL, "one_shot_rows": 0, "down_slices": 1},
)  # fmt: skip


def crowded() -> list[tuple[Case, dict]]:
    """Twenty-four runs of 4 chunks or fewer for as many blocks, or for fewer: then two are one item, and a block has several."""
    return [only(replace(CROWD, num_blocks=blocks), Phase.ATTENTION) for blocks in (24, 23, 13, 7)]


@uses(crowded)
def test_attention_gives_a_run_the_same_bits_however_it_is_dealt(make_device):
    outputs = [check_attention(PhaseRun(make_device, case, **options)) for case, options in crowded()]
    for others in outputs[1:]:
        np.testing.assert_array_equal(to_bits(np.array(others)), to_bits(np.array(outputs[0])))


TOGETHER = [i for i, case in enumerate(CASES) if case.shape()["attention_rows"] > 1 and max(c.count for c in case.chunks) > 1][
    :12
]


def attention_alone(index: int) -> list[tuple[Case, dict]]:
    """As planned, and with an item for each row."""
    case, options = only(CASES[index], Phase.ATTENTION)
    return [(case, options), (case, options | {"attention_rows": 1})]


@pytest.mark.parametrize("index", TOGETHER)
@uses(attention_alone)
def test_attention_gives_a_row_the_same_bits_in_any_company(make_device, index):
    """Rows of a prompt are taken together: none may see it."""
    bits = []
    for case, options in attention_alone(index):
        p = PhaseRun(make_device, case, **options)
        heads, kv_heads, dim = (p.size(k) for k in ("num_heads", "num_kv_heads", "head_dim"))
        for rank in p.ranks:
            p.put_bf16(rank, "off_qkv", (heads + 2 * kv_heads) * dim)
            p.put_pages(rank)
        p.launch()
        bits.append([to_bits(p.get_bf16(rank, "off_attn", heads * dim)) for rank in p.ranks])
    np.testing.assert_array_equal(*bits)


@every_case(Phase.O_PROJ)
def test_o_proj(make_device, index):
    p = make_run(make_device, index, Phase.O_PROJ)
    inputs = [p.put_bf16(rank, "off_attn", p.size("num_heads") * p.size("head_dim")) for rank in p.ranks]
    p.launch()
    got = p.get_partials("off_o_part", 1)
    for rank in p.ranks:
        x = Bounded.exact(to_float32(inputs[rank]))
        check(f"o_proj of rank {rank}", got[rank], tolerance.product(x, p.models[rank].matrices("o_proj", p.layer)[0]))


@every_case(Phase.GATE_UP)
def test_gate_up(make_device, index):
    p = make_run(make_device, index, Phase.GATE_UP)
    residual = p.put_partials("off_o_part", 1, p.epoch)
    p.launch()
    check_sums(p, "off_o_sum", residual, p.epoch)
    for rank in p.ranks:
        x = normed(p, rank, 2 * p.layer + 1, residual)
        expected = tolerance.activated(tolerance.product(x, p.models[rank].matrices("gate_up", p.layer)[0]))
        check(f"gate_up of rank {rank}", p.get_bf16(rank, "off_gate", p.size("intermediate_size")), expected, "bfloat16")


def check_down_proj(p: PhaseRun) -> None:
    slices, width = p.size("down_slices"), p.size("intermediate_size")
    inputs = [p.put_bf16(rank, "off_gate", width) for rank in p.ranks]
    p.launch()
    got = p.get_partials("off_down_part", slices)
    for rank in p.ranks:
        for j, x in enumerate(np.split(to_float32(inputs[rank]), slices, axis=1)):
            expected = tolerance.product(Bounded.exact(x), p.models[rank].matrices("down_proj", p.layer)[j])
            check(f"down_proj of rank {rank}, slice {j}", got[rank * slices + j], expected)


@every_case(Phase.DOWN_PROJ)
def test_down_proj(make_device, index):
    check_down_proj(make_run(make_device, index, Phase.DOWN_PROJ))


def many_tiles(tiles: int, rows: int) -> Case:
    """Units of so many tiles, the last of them often short; blocks of one to five units, some claimed."""
    sizes = {"hidden_size": 128 if tiles % 2 else 64, "intermediate_size": TILE_K * tiles - 96 * (tiles % 3)}
    config = model(head_dim=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=40, **sizes)
    options = {"max_rows": rows, "num_slots": 1, "max_model_len": 256, "strategy": Strategy.ONE_SHOT_LOCAL}
    chunks = (Chunk(0, 3, rows, True),)
    return Case(f"{tiles} tiles", tiles, config, 3 + tiles % 4, chunks, options | {"one_shot_rows": 0, "down_slices": 1})


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("tiles", range(1, 9))
@uses(lambda tiles, rows: [only(many_tiles(tiles, rows), Phase.DOWN_PROJ)])
def test_units_of_many_tiles(make_device, tiles, rows):
    """Groups of one and two tiles, one to eight to a unit: where a group's weights come from and go to differs for each number."""
    case, options = only(many_tiles(tiles, rows), Phase.DOWN_PROJ)
    check_down_proj(PhaseRun(make_device, case, **options))


def candidates(p: PhaseRun, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(whether there is one, logit, token id) that a rank has been told: each [ranks, blocks, rows]."""
    size = (p.run.world, p.size("num_blocks"), p.size("max_rows"), 2)
    payload, epochs = (a.reshape(size) for a in p.raw(rank, "off_best", int(np.prod(size))))
    assert np.all(epochs[:, :, : p.rows] == p.size("num_layers") + 1)
    order, inverse = payload[:, :, : p.rows, 0], payload[:, :, : p.rows, 1]
    # floats ordered as integers: the sign bit flipped, or all bits of a negative one
    logit = np.where(order >> 31, order ^ np.uint32(1 << 31), ~order).view(np.float32)
    return order != 0, logit, ~inverse


def check_candidates(p: PhaseRun, expected: list[Bounded]) -> None:
    """The blocks' best of every row: real ids with their logits; and none that a rank has is clearly better than all of them."""
    told = [candidates(p, rank) for rank in p.ranks]
    for rank in p.ranks[1:]:
        for mine, first in zip(told[rank], told[0], strict=True):
            np.testing.assert_array_equal(mine, first, "ranks were told different candidates")
    found, logit, ids = told[0]
    rows = np.arange(p.rows)[None, :].repeat(p.size("num_blocks"), axis=0)
    for rank in p.ranks:
        first = rank * p.size("vocab_rows")
        real = max(0, min(p.size("vocab_rows"), p.config.vocab_size - first))
        assert found[rank].any() == (real > 0)
        if not real:
            continue
        has = found[rank]
        of_id = expected[rank][rows[has], ids[rank][has] - first]
        assert np.all((ids[rank][has] >= first) & (ids[rank][has] < first + real)), "an id that the rank has not"
        check(f"candidates of rank {rank}", logit[rank][has], of_id)
        best = np.where(has, logit[rank], -np.inf).max(axis=0)
        least = expected[rank].value[:, :real] - expected[rank].limits()[:, :real]
        assert np.all(best[:, None] >= least), f"rank {rank} missed a better candidate"


@every_case(Phase.LM_HEAD)
def test_lm_head(make_device, index):
    p = make_run(make_device, index, Phase.LM_HEAD)
    last = p.size("num_layers")
    residual = p.put_partials("off_down_part", p.size("down_slices"), last)
    p.launch()
    check_sums(p, "off_down_sum", residual, last)
    if not p.samples.any():  # no row samples: words that end the step, and no candidates
        assert not any(candidates(p, rank)[0].any() for rank in p.ranks)
        assert not any(p.run.tap_of(rank, Phase.LM_HEAD).any() for rank in p.ranks)
        return
    expected = [
        tolerance.product(normed(p, rank, 2 * last, residual), p.models[rank].matrices("lm_head")[0]) for rank in p.ranks
    ]
    for rank in p.ranks:
        check(f"logits of rank {rank}", p.run.tap_of(rank, Phase.LM_HEAD)[: p.rows], expected[rank])
    check_candidates(p, expected)


@every_case(Phase.SAMPLE)
def test_sample(make_device, index):
    """The token is in shared memory only: it is seen through the mailbox, which hands out the last row of a prompt of `rows` tokens.

    What other ranks make of the same words shows in whole runs (test_whole.py): they embed the token they sampled.
    """
    p = make_run(make_device, index, Phase.SAMPLE)
    size = (p.run.world, p.size("num_blocks"), p.size("max_rows"))
    logits = p.rng.choice([-3.5, -1.25, 0.0, 2.5, 7.0], size).astype(np.float32)  # ties, across blocks and ranks
    ids = p.rng.integers(0, p.config.vocab_size, size, np.uint32)
    bits = logits.view(np.uint32)
    order = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    words = np.stack([order, ~ids], axis=-1)
    words[p.rng.random(size) < 0.2] = 0  # blocks that had no unit of the vocabulary
    words[0, 0] = np.where(words[0, 0] == 0, np.stack([order[0, 0], ~ids[0, 0]], axis=-1), words[0, 0])
    for rank in p.ranks:
        p.run.put_words(rank, "off_best", words, p.size("num_layers") + 1)
    (tokens,) = p.run.decode([{"prompt": [int(t) for t in p.tokens], "max_tokens": 1}])
    last = words[:, :, p.rows - 1].reshape(-1, 2).astype(np.uint64)
    best = int((last[:, 0] << np.uint64(32) | last[:, 1]).max())
    assert tokens == [0xFFFFFFFF - (best & 0xFFFFFFFF)]
    assert best >> 32 == order[:, :, p.rows - 1][words[:, :, p.rows - 1, 0] > 0].max(), "the largest logit wins"
