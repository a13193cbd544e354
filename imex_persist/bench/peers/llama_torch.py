"""A Llama in plain torch, as a user would write it who wants a fast step: fused projections, a static KV cache, nothing of ours.

Weights are random; only shapes matter. The simulator's tests compare its logits with the NumPy reference all the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from imex_persist.model.config import ModelConfig
from imex_persist.model.rope import rope_table


class Llama:
    """`rows` sequences of up to `positions` positions. `weights`: None for random ones."""

    def __init__(self, config: ModelConfig, *, rows: int, positions: int, device: str, dtype=torch.bfloat16, weights=None):
        self.config, self.positions = config, positions
        c, make = config, dict(device=device, dtype=dtype)
        self.q_size, self.kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        if weights is None:
            weights = self._random(make)
        self.embed, self.lm_head, self.norm, self.layers = weights
        turns = torch.from_numpy(rope_table(c, positions)[:, : c.head_dim // 2]).to(device)  # [positions, head_dim / 2, 2]
        self.cos, self.sin = turns[..., 0].contiguous(), turns[..., 1].contiguous()
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, positions, c.head_dim)
        self.keys, self.values = torch.zeros(shape, **make), torch.zeros(shape, **make)
        self.places = torch.arange(positions, device=device)

    def _random(self, make: dict):
        c = self.config

        def matrix(outputs: int, inputs: int):
            return torch.empty(outputs, inputs, **make).normal_(0, inputs**-0.5)

        layers = [
            {
                "input_norm": torch.ones(c.hidden_size, **make),
                "qkv": matrix(self.q_size + 2 * self.kv_size, c.hidden_size),
                "o_proj": matrix(c.hidden_size, self.q_size),
                "post_norm": torch.ones(c.hidden_size, **make),
                "gate_up": matrix(2 * c.intermediate_size, c.hidden_size),
                "down_proj": matrix(c.hidden_size, c.intermediate_size),
            }
            for _ in range(c.num_hidden_layers)
        ]
        embed = matrix(c.vocab_size, c.hidden_size)
        lm_head = embed if c.tie_word_embeddings else matrix(c.vocab_size, c.hidden_size)
        return embed, lm_head, torch.ones(c.hidden_size, **make), layers

    def decode(self, tokens, position):
        """tokens [rows], position [1] on the device: the tokens that stand there -> the next ones [rows]."""
        return self.logits(tokens[:, None], position)[:, -1].argmax(-1)

    def prefill(self, tokens):
        """tokens [1, length] of an empty sequence -> its next token [1]."""
        return self.logits(tokens, self.places[: tokens.shape[1]])[:, -1].argmax(-1)

    def logits(self, tokens, positions):
        """tokens [rows, count] at `positions` [count] -> logits [rows, 1, vocabulary] of the last."""
        x = F.embedding(tokens, self.embed)
        for i, layer in enumerate(self.layers):
            x = x + self._attention(i, layer, self._normed(x, layer["input_norm"]), positions)
            gate, up = F.linear(self._normed(x, layer["post_norm"]), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down_proj"])
        return F.linear(self._normed(x[:, -1:], self.norm), self.lm_head)

    def _attention(self, i: int, layer: dict, x, positions):
        c, (rows, count) = self.config, x.shape[:2]
        q, k, v = F.linear(x, layer["qkv"]).split((self.q_size, self.kv_size, self.kv_size), -1)
        q = self._turned(q.view(rows, count, -1, c.head_dim), positions).transpose(1, 2)
        k = self._turned(k.view(rows, count, -1, c.head_dim), positions).transpose(1, 2)
        keys, values = self.keys[i], self.values[i]
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v.view(rows, count, -1, c.head_dim).transpose(1, 2))
        if count > 1:
            out = F.scaled_dot_product_attention(q, keys[:, :, :count], values[:, :, :count], is_causal=True, enable_gqa=True)
        else:  # a KV head's query heads share one read of its keys
            q = q.reshape(rows, c.num_key_value_heads, -1, c.head_dim)
            scores = (q @ keys.transpose(-1, -2)).float() * c.attention_scale
            scores = scores.masked_fill(self.places > positions, float("-inf"))
            out = (scores.softmax(-1).to(values.dtype) @ values).view(rows, -1, 1, c.head_dim)
        return F.linear(out.transpose(1, 2).reshape(rows, count, -1), layer["o_proj"])

    def _normed(self, x, weight):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)).to(x.dtype) * weight

    def _turned(self, x, positions):
        """Rotary embedding of neighbouring pairs; which rows of q and k are neighbours is a matter of how weights were stored."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        even, odd = x[..., ::2].float(), x[..., 1::2].float()
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
