"""The litmus tests of docs/litmus.md between two GPUs, a process each, over NVLink: 10⁹ words each, every one checked.

`TEST_DEVICE=sim pytest tests/multi_gpu/test_litmus.py` runs a few thousand words between two simulators, to test the tests.
"""

from __future__ import annotations

import time

import pytest

from tests.gpu.test_llm import SIMULATED
from tests.sim.litmus import LITMUS, RankState, make_shape, rounds_for, source, words_checked

from .ranks import LAUNCH_S, Ranks
from .test_two_gpus import WORLD, ordinals

WORDS = 20_000 if SIMULATED else 1_000_000_000


class LitmusProcess:
    """A rank's process."""

    def __init__(self, rank: int, ordinal: int):
        self.rank, self.ordinal = rank, ordinal
        if not SIMULATED:
            from imex_persist.device.cuda import CudaDevice

            self.device = CudaDevice(ordinal)

    def blocks(self) -> int:
        return 2 if SIMULATED else self.device.machine.num_blocks // 2 * 2

    def prepare(self, name: str, blocks: int, rounds: int) -> str:
        shape = make_shape(WORLD, blocks, rounds)
        if SIMULATED:
            from imex_persist.device.sim import SimDevice

            self.device = SimDevice(num_blocks=blocks, processes=True, source=source(name))
            self.kernel = self.device.load(shape)
        else:
            self.kernel = self.device.load(shape, source=source(name))
        self.state = RankState(self.device, self.rank, blocks)
        return self.device.export(self.state.symmetric)

    def connect(self, handles: list[str]) -> None:
        from imex_persist.runtime.rank import launch_params

        peer = self.device.open(handles[self.rank ^ 1], self.state.symmetric.nbytes)
        self.params = launch_params([self.state.params({self.rank: self.state.symmetric.address, self.rank ^ 1: peer.address})])

    def clear(self) -> None:
        self.state.clear()
        self.state.result()  # so that the upload has arrived before the peer stores there

    def launch(self) -> bool:
        return self.device.launch(self.kernel, self.params).wait(LAUNCH_S)

    def result(self) -> dict[str, int]:
        return self.state.result()

    def disconnect(self) -> None:
        getattr(self.device, "close_peers", lambda: None)()


@pytest.mark.parametrize("name", [name for name, litmus in LITMUS.items() if WORLD in litmus.ranks])
def test_right(name, record_property):
    ranks = Ranks(ordinals(), LitmusProcess)
    try:
        blocks = min(ranks.ask_all("blocks"))
        rounds = rounds_for(name, WORLD, blocks, WORDS)
        ranks.ask_all("connect", ranks.ask_all("prepare", name, blocks, rounds))
        ranks.ask_all("clear")
        began = time.perf_counter()
        assert ranks.ask_all("launch") == [True] * WORLD, "a kernel did not return"
        results = ranks.ask_all("result")
        text = f"{words_checked(name, WORLD, blocks, rounds):.2e} words in {time.perf_counter() - began:.1f} s, {results}"
        record_property(f"{name}, two GPUs", text)
        print(f"{name}, two GPUs: {text}")
        assert not any(counts["wrong"] or counts["gave_up"] for counts in results), text
    finally:
        ranks.close()
