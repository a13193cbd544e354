"""Traced runs of a small model on the simulator, all ranks in one launch: virtual time, the same on every machine."""

from __future__ import annotations

import numpy as np

from imex_persist import abi, planner
from imex_persist.device.sim import SimDevice
from imex_persist.model.config import ModelConfig
from imex_persist.model.dummy import DummyWeights
from imex_persist.observe.clocks import SharedClock
from imex_persist.observe.ring import RingReader
from imex_persist.observe.spans import Trace, decode, pairs_of
from imex_persist.runtime.rank import launch_params
from tests.kernel.harness import KernelRun, host_block

CONFIG = ModelConfig(
    hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256,
    vocab_size=200, tie_word_embeddings=True,
)  # fmt: skip
REQUESTS = [{"prompt": [5, 9, 2], "max_tokens": 8}]
AXIS = "virtual time"


class TracedRun(KernelRun):
    """A KernelRun whose kernel writes a trace."""

    def __init__(self, device, shape, config=CONFIG):
        super().__init__(device, config, DummyWeights(config), shape)
        self.rings = host_block(planner.trace_bytes(shape) * self.world)

    def params(self, mailbox: bool) -> np.void:
        ranks = super().params(mailbox)["ranks"].copy()[: self.world]
        each = planner.trace_bytes(self.shape)
        for rank in range(self.world) if each else ():
            ranks[rank]["trace"] = self.device.map_host(memoryview(self.rings)[rank * each : (rank + 1) * each])
        return launch_params(list(ranks))

    def fetch(self) -> tuple[np.ndarray, np.ndarray, RingReader]:
        """(events, alignments of clocks, the reader) of the whole run."""
        reader = RingReader(memoryview(self.rings), self.shape)
        steps = int(self.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]["header"]["steps"])
        return *reader.fetch(steps), reader


def run(
    *,
    world: int = 2,
    blocks: int = 4,
    trace: int = 2048,
    lanes: int = 1,
    requests=REQUESTS,
    delay: str = "",
    device_options=None,
    **plan,
) -> TracedRun:
    """`delay`: "{rank, block, phase, layer, ns}" of one block that stands still once a step."""
    defines = (f"IMEX_PLANTED_DELAY={delay}",) if delay else ()
    device = SimDevice(lanes, blocks, defines=defines, **(device_options or {}))
    shape = planner.make_shape(
        CONFIG,
        world_size=world,
        max_rows=plan.pop("max_rows", 2),
        max_model_len=256,
        machine=device.machine,
        trace=trace,
        **plan,
    )
    traced = TracedRun(device, shape)
    traced.tokens = traced.decode(requests)
    return traced


def trace_of(traced: TracedRun) -> Trace:
    events, _, reader = traced.fetch()
    return decode(events, traced.shape, AXIS, SharedClock(pairs_of(events)), tuple(sorted(reader.lost)))
