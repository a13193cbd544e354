"""The tap of a whole run, phase by phase: each phase's output against float64 math on what the kernel's own phase before handed it.

Here the phases meet as they do in production: the residual runs through all layers, keys and values of earlier steps come from the
pages. Nothing adds up, so each phase is held to the bounds it has alone; values the tap has before they are rounded, to tighter ones.
"""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist.abi import Phase
from imex_persist.model import phases
from imex_persist.model.bf16 import to_bits, to_float32
from imex_persist.model.reference import RankModel
from imex_persist.model.rope import rope_table

from . import tolerance
from .cases import uses
from .pages import Pages
from .phase_run import FLOAT64
from .tolerance import Bounded, check
from .whole import MODELS, NUM_MODELS, WholeRun, prompt_of, run_whole

TAPPED = [phase for phase in Phase if phase != Phase.SAMPLE]


class Tapped:
    """The last step of one request whose prompt takes three steps: a full one, another, and one with a row less."""

    def __init__(self, make_device, index: int):
        case = MODELS[index]
        rows = case.options["max_rows"]
        self.rows = max(1, rows - 1)
        prompt = prompt_of(case, 2 * rows + self.rows)
        self.run: WholeRun = run_whole(make_device, case, [{"prompt": prompt, "max_tokens": 1}], tap=True)
        self.shape, self.config = self.run.shape, case.config
        self.ranks = range(self.run.kernel.world)
        self.models = [RankModel(self.run.kernel.source, case.config, self.shape, r, FLOAT64) for r in self.ranks]
        self.start = len(prompt) - self.rows
        self.tokens = np.array(prompt[self.start :])
        self.rope = rope_table(case.config, self.rows, self.start)
        table = np.arange(self.size("pages_per_slot"), dtype=np.uint32)[None]  # harness.py deals pages in order
        self.pages = [Pages(self.shape, table, bits) for bits in self.run.pages()]

    def size(self, name: str) -> int:
        return int(self.shape[name])

    def tap(self, rank: int, phase: Phase, layer: int = 0) -> np.ndarray:
        return self.run.taps(phase, layer)[rank][: self.rows]

    def rounded(self, rank: int, phase: Phase, layer: int) -> np.ndarray:
        """What the next phase takes in of a phase's output."""
        return to_float32(to_bits(self.tap(rank, phase, layer)))

    def partials(self, phase: Phase, layer: int) -> list[np.ndarray]:
        taps = [self.tap(rank, phase, layer) for rank in self.ranks]
        slices = self.size("down_slices") if phase == Phase.DOWN_PROJ else 1
        return [part for tap in taps for part in np.split(tap, slices, axis=1)]

    def residual(self, layer: int, before_ffn: bool = False) -> np.ndarray:
        """float32, bit for bit the kernel's: the embedding, and what every block before has added."""
        value = self.tap(0, Phase.EMBED)
        for i in range(layer + before_ffn):
            value = phases.exchange(value, self.partials(Phase.O_PROJ, i))
            if i < layer:
                value = phases.exchange(value, self.partials(Phase.DOWN_PROJ, i))
        return value

    def normed(self, rank: int, index: int, residual: np.ndarray) -> Bounded:
        return tolerance.normed(residual, self.models[rank].norms[index], float(self.shape["rms_eps"]), self.size("norm_size"))

    def heads(self, rank: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v of the step, as the attention takes them in: float32 [rows, heads, head_dim]."""
        bits = self.rounded(rank, Phase.QKV, layer).reshape(self.rows, -1, self.size("head_dim"))
        return tuple(np.split(bits, [self.size("num_heads"), self.size("num_heads") + self.size("num_kv_heads")], axis=1))

    # ------------------------------------------------------------------ one phase of one layer of one rank
    def check_embed(self, rank: int, _layer: int) -> None:
        expected = self.models[rank].matrices("embed")[0][self.tokens]
        np.testing.assert_array_equal(self.tap(rank, Phase.EMBED), expected)

    def check_qkv(self, rank: int, layer: int) -> None:
        x = self.normed(rank, 2 * layer, self.residual(layer))
        y = tolerance.product(x, self.models[rank].matrices("qkv", layer)[0])
        expected = tolerance.rotated(y, self.rope, self.size("num_heads") + self.size("num_kv_heads"))
        check(f"qkv of rank {rank}, layer {layer}", self.tap(rank, Phase.QKV, layer), expected)

    def check_attention(self, rank: int, layer: int) -> None:
        q, k, v = self.heads(rank, layer)
        keys, values = (to_float32(a) for a in self.pages[rank].read(layer, 0, self.start + self.rows))
        np.testing.assert_array_equal(keys[self.start :], k, "keys in the pages")
        np.testing.assert_array_equal(values[self.start :], v, "values in the pages")
        got = self.tap(rank, Phase.ATTENTION, layer).reshape(self.rows, self.size("num_heads"), -1)
        for row in range(self.rows):
            seen = self.start + row + 1
            expected = tolerance.attended(q[row], keys[:seen], values[:seen], float(self.shape["attn_scale"]))
            check(f"attention of rank {rank}, layer {layer}, row {row}", got[row], expected)

    def check_o_proj(self, rank: int, layer: int) -> None:
        x = Bounded.exact(self.rounded(rank, Phase.ATTENTION, layer))
        expected = tolerance.product(x, self.models[rank].matrices("o_proj", layer)[0])
        check(f"o_proj of rank {rank}, layer {layer}", self.tap(rank, Phase.O_PROJ, layer), expected)

    def check_gate_up(self, rank: int, layer: int) -> None:
        x = self.normed(rank, 2 * layer + 1, self.residual(layer, before_ffn=True))
        expected = tolerance.activated(tolerance.product(x, self.models[rank].matrices("gate_up", layer)[0]))
        check(f"gate_up of rank {rank}, layer {layer}", self.tap(rank, Phase.GATE_UP, layer), expected)

    def check_down_proj(self, rank: int, layer: int) -> None:
        slices = self.size("down_slices")
        inputs = np.split(self.rounded(rank, Phase.GATE_UP, layer), slices, axis=1)
        got = np.split(self.tap(rank, Phase.DOWN_PROJ, layer), slices, axis=1)
        for j, weight in enumerate(self.models[rank].matrices("down_proj", layer)):
            expected = tolerance.product(Bounded.exact(inputs[j]), weight)
            check(f"down_proj of rank {rank}, layer {layer}, slice {j}", got[j], expected)

    def check_lm_head(self, rank: int, _layer: int) -> None:
        last = self.size("num_layers")
        x = self.normed(rank, 2 * last, self.residual(last))
        expected = tolerance.product(x, self.models[rank].matrices("lm_head")[0])
        check(f"logits of rank {rank}", self.tap(rank, Phase.LM_HEAD), expected)


@pytest.mark.parametrize("phase", TAPPED, ids=lambda phase: phase.name.lower())
@pytest.mark.parametrize("index", range(0, NUM_MODELS, 3))
@uses(lambda index, phase: [(MODELS[index], {"tap": True})])
def test_tap(make_device, index, phase):
    tapped = Tapped(make_device, index)
    layers = 1 if phase in (Phase.EMBED, Phase.LM_HEAD) else tapped.size("num_layers")
    for layer in range(layers):
        for rank in tapped.ranks:
            getattr(tapped, f"check_{phase.name.lower()}")(rank, layer)
