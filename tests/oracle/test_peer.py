"""The torch model that the benchmark sets itself beside computes what the NumPy reference computes: it is no straw man with less to do."""

from __future__ import annotations

import numpy as np
import torch

from imex_persist.bench.peers.llama_torch import Llama
from imex_persist.model.config import ModelConfig
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.reference import Reference

CONFIG = ModelConfig(
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=160,
    vocab_size=130,
    rms_norm_eps=1e-5,
)


def weights_of(source):
    """The reference's random weights as the peer takes them: q and k with rotary partners as neighbours."""

    def read(name: str):
        bits = np.asarray(source.read(name))
        return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))

    def neighbours(matrix):
        half = CONFIG.head_dim // 2
        return matrix.view(-1, 2, half, CONFIG.hidden_size).transpose(1, 2).reshape(matrix.shape)

    layers = []
    for i in range(CONFIG.num_hidden_layers):
        at = f"model.layers.{i}."
        q, k, v = (read(f"{at}self_attn.{p}_proj.weight") for p in "qkv")
        layers.append(
            {
                "input_norm": read(at + "input_layernorm.weight"),
                "qkv": torch.cat((neighbours(q), neighbours(k), v)),
                "o_proj": read(at + "self_attn.o_proj.weight"),
                "post_norm": read(at + "post_attention_layernorm.weight"),
                "gate_up": torch.cat((read(at + "mlp.gate_proj.weight"), read(at + "mlp.up_proj.weight"))),
                "down_proj": read(at + "mlp.down_proj.weight"),
            }
        )
    return read("model.embed_tokens.weight"), read("lm_head.weight"), read("model.norm.weight"), layers


def test_the_torch_peer_is_a_llama():
    source, prompt = DummyWeights(CONFIG, 3), [5, 17, 90, 4, 33, 8]
    reference = Reference(CONFIG, source)
    wanted = reference.forward(reference.sequence(), prompt)
    model = Llama(CONFIG, rows=1, positions=12, device="cpu", dtype=torch.float32, weights=weights_of(source))
    whole = model.logits(torch.tensor([prompt]), torch.arange(len(prompt)))[0, 0].numpy()
    np.testing.assert_allclose(whole, wanted[-1], atol=0.06)
    model.keys.zero_()
    for position, token in enumerate(prompt):
        step = model.logits(torch.tensor([[token]]), torch.tensor([position]))[0, 0].numpy()
        np.testing.assert_allclose(step, wanted[position], atol=0.06)
    assert int(model.decode(torch.tensor([prompt[-1]]), torch.tensor([len(prompt) - 1]))) == int(wanted[-1].argmax())
    model.keys.zero_()
    assert int(model.prefill(torch.tensor([prompt]))) == int(wanted[-1].argmax())
