"""Tile order, sharding and the buffers of a rank: odd sizes, TP 1 to 4, every piece exactly once."""

import numpy as np
import pytest

from imex_persist.model import packing
from imex_persist.model.bf16 import to_bits, to_float32
from imex_persist.model.packing import load_rank, pack_matrix, pieces, rank_bytes, unpack_matrix
from imex_persist.model.rope import rope_table
from imex_persist.model.shard import RankShard, model_shape, rope_order
from imex_persist.model.weights import EMBED, DictWeights, layer_names
from imex_persist.planner import make_shape
from tests.model.helpers import random_tensors, tiny


@pytest.mark.parametrize("shape", [(8, 32), (1, 1), (7, 33), (24, 96), (40, 100), (9, 31)])
def test_tile_order_is_the_contract(shape):
    matrix = np.random.default_rng(0).integers(1, 65536, shape, dtype=np.uint16)
    packed = pack_matrix(matrix)
    tiles = -(-shape[1] // 32)
    assert packed.shape == (-(-shape[0] // 8) * 8 * tiles * 32,)
    for n in range(shape[0]):
        for k in range(shape[1]):
            assert packed[((n // 8 * tiles + k // 32) * 8 + n % 8) * 32 + k % 32] == matrix[n, k]
    assert np.count_nonzero(packed) == matrix.size  # the rest is zero
    np.testing.assert_array_equal(unpack_matrix(packed, *shape), matrix)


def test_rope_partners_become_neighbours():
    assert rope_order(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def fill(config, source, shape, rank):
    """A rank's buffers, filled by load_rank; asserts that every byte is written exactly once."""
    sizes = rank_bytes(config, shape)
    buffers = {field: np.full(size, 0xCD, np.uint8) for field, size in sizes.items()}
    written = {field: np.zeros(size, np.uint8) for field, size in sizes.items()}
    progress = []

    def put(field, offset, array):
        data = array.reshape(-1).view(np.uint8)
        buffers[field][offset : offset + len(data)] = data
        written[field][offset : offset + len(data)] += 1

    assert load_rank(source, config, shape, rank, put, progress=progress.append) == sum(sizes.values()) == sum(progress)
    assert all((count == 1).all() for count in written.values())
    return {f: b.view(np.float32) if f == "rope" else b.view(np.uint16) for f, b in buffers.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_hold_the_model(world, tied, monkeypatch):
    """Unpacked, the ranks' buffers are the model's rows and columns, each once, and zeros elsewhere."""
    monkeypatch.setattr(packing, "PIECE_BYTES", 4096)  # many pieces, uneven ones too
    config = tiny(tie_word_embeddings=tied, head_dim=36)
    tensors = random_tensors(config)
    source = DictWeights(tensors, config)
    shape = make_shape(config, world_size=world, max_model_len=100, down_slices=2 if world < 3 else 1)
    hidden, d, dp = config.hidden_size, config.head_dim, 64
    heads, kv, ffn, slices = (int(shape[k]) for k in ("num_heads", "num_kv_heads", "intermediate_size", "down_slices"))
    ranks = [fill(config, source, shape, r) for r in range(world)]
    assert all(("embed" in buffers) == (world > 1 or not tied) for buffers in ranks)

    def matrix(rank, field, layer, rows, columns):
        size = rows * columns
        return to_float32(unpack_matrix(ranks[rank][field][layer * size : (layer + 1) * size], rows, columns))

    for layer in range(config.num_hidden_layers):
        w = {short: tensors[full] for short, full in layer_names(layer).items()}
        for name, first, per, of_model in (
            ("q_proj", 0, heads, config.num_attention_heads),
            ("k_proj", heads, kv, config.num_key_value_heads),
            ("v_proj", heads + kv, kv, config.num_key_value_heads),
        ):
            rows = [
                matrix(r, "qkv", layer, (heads + 2 * kv) * dp, 64).reshape(-1, dp, 64)[first : first + per]
                for r in range(world)
            ]
            whole = np.concatenate(rows)
            order = np.arange(d) if name == "v_proj" else rope_order(d)
            np.testing.assert_array_equal(whole[:of_model, :d, :hidden], w[name].reshape(of_model, d, hidden)[:, order])
            assert np.count_nonzero(whole) == np.count_nonzero(w[name])
        o = np.concatenate([matrix(r, "o_proj", layer, 64, heads * dp).reshape(64, heads, dp) for r in range(world)], axis=1)
        np.testing.assert_array_equal(o[:hidden, : config.num_attention_heads, :d], w["o_proj"].reshape(hidden, -1, d))
        assert np.count_nonzero(o) == np.count_nonzero(w["o_proj"])
        per = -(-config.intermediate_size // world)
        gate_up = [matrix(r, "gate_up", layer, 2 * ffn, 64).reshape(ffn, 2, 64) for r in range(world)]
        real = np.concatenate([part[:per] for part in gate_up])[: config.intermediate_size, :, :hidden]
        np.testing.assert_array_equal(real[:, 0], w["gate_proj"])
        np.testing.assert_array_equal(real[:, 1], w["up_proj"])
        assert sum(map(np.count_nonzero, gate_up)) == np.count_nonzero(w["gate_proj"]) + np.count_nonzero(w["up_proj"])
        width = ffn // slices
        down = [
            np.concatenate([matrix(r, "down_proj", layer * slices + j, 64, width) for j in range(slices)], axis=1)
            for r in range(world)
        ]
        real = np.concatenate([part[:, :per] for part in down], axis=1)[:hidden, : config.intermediate_size]
        np.testing.assert_array_equal(real, w["down_proj"])
        assert sum(map(np.count_nonzero, down)) == np.count_nonzero(w["down_proj"])
    vocab = int(shape["vocab_rows"])
    head = np.concatenate([matrix(r, "lm_head", 0, vocab, 64) for r in range(world)])
    np.testing.assert_array_equal(head[: config.vocab_size, :hidden], tensors[EMBED if tied else "lm_head.weight"])
    assert not head[config.vocab_size :].any()
    for buffers in ranks:
        if "embed" in buffers:
            table = to_float32(unpack_matrix(buffers["embed"], 104, 64))
            np.testing.assert_array_equal(table[: config.vocab_size, :hidden], tensors[EMBED])
        norms = to_float32(buffers["norms"].reshape(5, 64))
        np.testing.assert_array_equal(norms[4, :hidden], tensors["model.norm.weight"])
        np.testing.assert_array_equal(norms[3, :hidden], tensors["model.layers.1.post_attention_layernorm.weight"])
        assert not norms[:, hidden:].any()
        table = buffers["rope"].reshape(-1, dp // 2, 2)
        np.testing.assert_array_equal(table, rope_table(config, len(table)))


def test_more_ranks_than_kv_heads_leaves_empty_ranks():
    config = tiny(num_attention_heads=2, num_key_value_heads=1)
    source = DictWeights(random_tensors(config), config)
    shape = model_shape(config, 4)
    shard = RankShard(source, config, shape, 3)
    for field in ("qkv", "o_proj"):
        (matrix,) = shard.matrices(field, 0)
        assert not matrix.read(0, matrix.shape[0]).any()


def test_a_rank_reads_only_its_shard():
    config = tiny()
    tensors = {name: to_bits(array) for name, array in random_tensors(config).items()}
    read = dict.fromkeys(tensors, 0)

    class Counting(DictWeights):
        def read(self, name, rows=None, columns=None):
            part = super().read(name, rows, columns)
            read[name] += part.size
            return part

    shape = model_shape(config, 3)
    for _ in pieces(Counting(tensors, config), config, shape, 1):
        pass
    names = layer_names(0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert read[names[name]] * 3 == tensors[names[name]].size
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert read[names[name]] <= 24 * config.hidden_size
