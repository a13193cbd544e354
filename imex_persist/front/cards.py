"""Cards a plan can be made for: what they have, and how fast memory and NVLink are, with where each figure is from."""

from __future__ import annotations

from dataclasses import dataclass

from imex_persist.planner import Machine
from imex_persist.runtime.discover import Gpu

CONTEXT_BYTES = 1 << 30  # of a rank's GPU: CUDA's context and the kernel's module, generously


@dataclass(frozen=True)
class Card:
    """One card. `ceiling_tb_s` is what a bulk-copy ring reads (docs/performance.md), None where nobody has measured it here."""

    key: str
    name: str
    capability: tuple[int, int]
    machine: Machine
    memory_bytes: int
    datasheet_tb_s: float
    ceiling_tb_s: float | None
    nvlink_gb_s: float  # each way, datasheet

    @property
    def bandwidth_tb_s(self) -> float:
        """What the floor is computed with."""
        return self.ceiling_tb_s or self.datasheet_tb_s

    @property
    def bandwidth_source(self) -> str:
        return "measured" if self.ceiling_tb_s else "datasheet"


def _gpu(num_blocks: int, memory_tb_s: float) -> Machine:
    return Machine(num_blocks, 232_448, memory_tb_s=memory_tb_s, exact_header=True)


CARDS = {
    card.key: card
    for card in (
        Card("h100", "NVIDIA H100 80GB HBM3", (9, 0), _gpu(132, 3.35), 81_559 << 20, 3.35, 3.13, 450.0),
        Card("h200", "NVIDIA H200", (9, 0), _gpu(132, 4.8), 143_771 << 20, 4.8, 4.56, 450.0),
        Card("b200", "NVIDIA B200", (10, 0), _gpu(148, 8.0), 183_359 << 20, 8.0, None, 900.0),
    )
}

# All-reduce of two ranks inside the kernel on two H200s (docs/performance.md): µs by KB of fp32 partial sums, of which 24 bits are sent.
EXCHANGE_US = {
    "ONE_SHOT": {2: 1.24, 4: 1.26, 8: 1.41, 16: 1.67, 32: 2.90, 64: 4.40, 128: 7.76},
    "ONE_SHOT_LOCAL": {2: 1.72, 4: 1.81, 8: 1.88, 16: 2.05, 32: 3.10, 64: 3.81, 128: 5.20},
    "TWO_SHOT": {2: 2.06, 4: 2.07, 8: 2.15, 16: 2.28, 32: 3.20, 64: 3.80, 128: 4.77},
}


def exchange_us(strategy: str, nbytes: int, world_size: int) -> float | None:
    """µs of one exchange of `nbytes` of partial sums, between the sizes that were measured; None where nothing was."""
    if world_size != 2 or nbytes > 128 * 1024 or strategy not in EXCHANGE_US:
        return None
    sizes = EXCHANGE_US[strategy]
    kb = max(nbytes / 1024, min(sizes))
    high = min(size for size in sizes if size >= kb)
    low = max(size for size in sizes if size <= kb)
    share = 0.0 if high == low else (kb - low) / (high - low)
    return sizes[low] + share * (sizes[high] - sizes[low])


def known_card(name: str) -> Card | None:
    """The card whose figures are those of a GPU of this name, as its driver calls it; None where nobody knows them."""
    words = set(name.upper().split())
    if {"PCIE", "NVL"} & words:  # those have fewer SMs or slower memory
        return None
    return next((card for card in CARDS.values() if card.key.upper() in words), None)


def choose_card(given: str | None, gpus: list[Gpu]) -> tuple[Card, str]:
    """(card, why that one): the one that was named, else this machine's, else an H100. Raises ValueError for an unknown name."""
    if given is not None:
        if given.lower() not in CARDS:
            raise ValueError(f"gpu is {given!r}: one of {', '.join(CARDS)} is allowed")
        return CARDS[given.lower()], "as asked"
    if not gpus:
        return CARDS["h100"], "no GPU was found here and --gpu names none, so the figures are an H100's"
    if card := known_card(gpus[0].name):
        return card, f"this machine's GPU 0 is {gpus[0].name}"
    return CARDS["h100"], f"no figures are known for this machine's {gpus[0].name}, so they are an H100's"
