"""GGUF: files written by the `gguf` package come back as they were; broken ones are refused in one sentence, quickly."""

import numpy as np
import pytest

from imex_persist.model.bf16 import to_bits, to_float32
from imex_persist.model.reference import EXACT, logits
from imex_persist.model.shard import rope_order
from imex_persist.model.weights import DictWeights, layer_names
from tests.model.helpers import random_tensors, tiny

gguf = pytest.importorskip("gguf")

from imex_persist.model.gguf import GgufWeights  # noqa: E402
from imex_persist.model.gguf_file import read_header  # noqa: E402

CONFIG = tiny(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=2.0**-16
)
TENSORS = random_tensors(CONFIG)
TO_GGUF = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SHORT = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensors(tensors, config=CONFIG):
    """GGUF names, and q and k rows in llama.cpp's order."""
    names = dict(TO_GGUF)
    for layer in range(config.num_hidden_layers):
        names |= {full: f"blk.{layer}.{SHORT[short]}.weight" for short, full in layer_names(layer).items()}
    out = {}
    for name, array in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            d = config.head_dim
            array = np.ascontiguousarray(array.reshape(-1, d, array.shape[1])[:, rope_order(d)].reshape(array.shape))
        out[names[name]] = array
    return out


def write(path, tensors, metadata=(), quantization=None, config=CONFIG):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_eos_token_id(2)
    for method, *values in metadata:
        getattr(writer, method)(*values)
    for name, array in tensors.items():
        if quantization is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_float_file(tmp_path):
    source = GgufWeights(write(tmp_path / "m.gguf", gguf_tensors(TENSORS)))
    assert source.config == CONFIG and source.rope_adjacent
    for name, array in TENSORS.items():
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            np.testing.assert_array_equal(source.read(name), to_bits(array))
    tokens = [5, 17, 99, 0, 3]
    expected = logits(CONFIG, DictWeights(TENSORS, CONFIG), tokens, precision=EXACT)
    np.testing.assert_allclose(logits(source.config, source, tokens, precision=EXACT, world_size=2), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0", "Q5_0", "F16", "BF16"])
def test_quantized_slices(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    source = GgufWeights(write(tmp_path / "m.gguf", gguf_tensors(TENSORS), quantization=kind))
    name = "model.layers.1.mlp.down_proj.weight"
    whole = gguf.quants.dequantize(gguf.quants.quantize(TENSORS[name], kind), kind)
    np.testing.assert_array_equal(source.read(name), to_bits(whole))
    np.testing.assert_array_equal(source.read(name, (3, 20), (33, 71)), to_bits(whole)[3:20, 33:71])
    np.testing.assert_array_equal(source.read(name, None, (32, 64)), to_bits(whole)[:, 32:64])
    assert abs(to_float32(source.read(name)) - TENSORS[name]).max() < 0.2


def test_tied_scaled_and_factored(tmp_path):
    tied = {k: v for k, v in gguf_tensors(TENSORS).items() if k != "output.weight"}
    linear = [
        ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
        ("add_rope_scaling_factor", 4.0),
        ("add_rope_freq_base", 5e5),
        ("add_rope_dimension_count", 32),
    ]
    config = GgufWeights(write(tmp_path / "m.gguf", tied, linear)).config
    assert config.tie_word_embeddings and config.rope_theta == 5e5
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("linear", 4.0)
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    config = GgufWeights(write(tmp_path / "m.gguf", tied | {"rope_freqs.weight": factors})).config
    assert config.rope_scaling.factors == tuple(factors.tolist())


@pytest.mark.parametrize(
    ("match", "metadata", "changes"),
    [
        ("llama.expert_count is 8", [("add_expert_count", 8)], {}),
        ("sliding_window is 512", [("add_sliding_window", 512)], {}),
        ("rope scaling type", [("add_rope_scaling_type", gguf.RopeScalingType.YARN)], {}),
        ("rope.dimension_count is 16", [("add_rope_dimension_count", 16)], {}),
        ("value_length is 16", [("add_value_length", 16)], {}),
        ("no tensor model.norm.weight", [], {"output_norm.weight": None}),
        ("attn_q.bias, which no supported", [], {"blk.0.attn_q.bias": np.zeros(128, np.float32)}),
        ("ffn_gate_inp", [], {"blk.0.ffn_gate_inp.weight": np.zeros((8, 64), np.float32)}),
        ("has shape", [], {"blk.1.ffn_up.weight": np.zeros((64, 96), np.float32)}),
        ("ggml type", [], {"blk.1.ffn_up.weight": np.zeros((96, 64), np.int8)}),
        ("rope_freqs.weight has 3 values", [], {"rope_freqs.weight": np.ones(3, np.float32)}),
    ],
)
def test_refusals(tmp_path, match, metadata, changes):
    tensors = {k: v for k, v in (gguf_tensors(TENSORS) | changes).items() if v is not None}
    with pytest.raises(ValueError, match=match) as caught:
        GgufWeights(write(tmp_path / "m.gguf", tensors, metadata))
    assert "\n" not in str(caught.value)


def test_wrong_architecture(tmp_path):
    path = tmp_path / "m.gguf"
    data = write(path, gguf_tensors(TENSORS)).read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", 1)
    path.write_bytes(data)
    with pytest.raises(ValueError, match='architecture "qwen2" is not supported'):
        GgufWeights(path)


def test_truncated_anywhere(tmp_path):
    path = write(tmp_path / "m.gguf", gguf_tensors(TENSORS))
    data = path.read_bytes()
    for size in [0, 3, 4, 8, 20, 24, *range(25, 3000, 97), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"truncated|no complete GGUF file") as caught:
            GgufWeights(path)
        assert "\n" not in str(caught.value)


def test_random_damage_never_hangs_or_crashes(tmp_path):
    path = write(tmp_path / "m.gguf", gguf_tensors(TENSORS))
    data = bytearray(path.read_bytes())
    header_bytes = min(tensor.offset for tensor in read_header(path).tensors.values())
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(0, header_bytes, 3):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            GgufWeights(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
