"""One phase alone, on all ranks in one launch: what tests put into its words and pages, and how they read what came out."""

from __future__ import annotations

import numpy as np

from imex_persist import abi, planner
from imex_persist.model.bf16 import to_float32
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.phases import Precision
from imex_persist.model.reference import RankModel
from imex_persist.model.rope import rope_table

from .cases import Case, exchange_of
from .harness import BARE, MINUS_ZERO, KernelRun, bf16_pairs, pack_words
from .pages import Pages, garbage, normal_bits

FLOAT64 = Precision(np.float64)


def partial_places(hidden: int) -> np.ndarray:
    """Where partial sum n of a row lies: in each group of 128 first the pairs with even numbers, then the odd ones (exchange.cuh)."""
    n = np.arange(hidden)
    group, pair = n // 128, n % 128 // 2
    return group * 128 + pair % 2 * 64 + pair // 2 * 2 + n % 2


def owner_ranks(shape: np.void) -> np.ndarray:
    """The rank that adds each column of the hidden vector in TWO_SHOT: equal runs of pairs, dealt to the blocks of all ranks."""
    hidden, blocks, world = (int(shape[k]) for k in ("hidden_size", "num_blocks", "world_size"))
    pairs = -(-hidden // 2 // (blocks * world))
    return np.arange(hidden) // 2 // pairs // blocks


class PhaseRun:
    """`phase` of one layer of a case's model, about to run alone; the random numbers are the case's."""

    def __init__(self, make_device, case: Case, source=None, **options):
        device = make_device(case.num_blocks)
        self.case, self.config = case, case.config
        self.source = source or DummyWeights(case.config, case.seed)
        self.shape = case.shape(device.machine, **options)
        self.run = KernelRun(device, case.config, self.source, self.shape)
        self.device, self.ranks = device, range(self.run.world)
        self.models = [RankModel(self.source, case.config, self.shape, r, FLOAT64) for r in self.ranks]
        self.layer, self.rows = int(self.shape["only_layer"]), case.num_rows
        self.epoch = self.layer + 1
        self.rng = np.random.default_rng([case.seed, int(self.shape["only_phase"])])
        self._plan()

    def size(self, name: str) -> int:
        return int(self.shape[name])

    # ------------------------------------------------------------------ the step
    def _plan(self) -> None:
        """Pages dealt at random; of those begun in this step the table knows nothing: there it names a page nobody owns."""
        slots, per_slot = self.size("num_slots"), self.size("pages_per_slot")
        stranger, page = slots * per_slot, self.size("page_size")
        self.table = self.rng.permutation(stranger).reshape(slots, per_slot).astype(np.uint32)
        self.tokens = self.rng.integers(0, self.config.vocab_size, self.rows)
        self.positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in self.case.chunks])
        self.slots = np.repeat([c.slot for c in self.case.chunks], [c.count for c in self.case.chunks])
        lasts = np.cumsum([c.count for c in self.case.chunks]) - 1
        self.samples = np.zeros(self.rows, bool)
        self.samples[lasts] = [c.samples for c in self.case.chunks]
        pages = self.table[self.slots, self.positions // page]
        self.plan_rows = [
            (int(t), int(p), int(slot), bool(samples), int(where))
            for t, p, slot, samples, where in zip(self.tokens, self.positions, self.slots, self.samples, pages, strict=True)
        ]
        self.run.put_plan(self.plan_rows)
        known = np.full_like(self.table, stranger)
        for chunk in self.case.chunks:
            number = -(-chunk.start // page)
            known[chunk.slot, :number] = self.table[chunk.slot, :number]
        for rank in self.run.ranks:
            self.device.upload(rank.symmetric, self.size("off_page_table") * 8, known)
        self.rope = rope_table(self.config, int(self.positions.max()) + 1)[self.positions]

    def launch(self) -> None:
        self.run.launch(mailbox=False)

    # ------------------------------------------------------------------ bf16 words: [rows, width]
    def put_bf16(self, rank: int, field: str, width: int, scale: float = 1.0) -> np.ndarray:
        """Random words of every live row of a rank's buffer, as the uint16 bits [rows, width] they carry."""
        bits = normal_bits(self.rng, (self.rows, width), scale)
        if field in BARE:
            self.run.put_bare(rank, field, bf16_pairs(bits), self.layer)
        else:
            self.run.put_words(rank, field, bf16_pairs(bits), self.epoch)
        return bits

    def get_bf16(self, rank: int, field: str, width: int, epoch: int | None = None) -> np.ndarray:
        """float32 [rows, width]; rows beyond the step's must not have been written."""
        if field in BARE:
            words = self.run.bare(rank, field, (epoch or self.epoch) - 1)
            here, elsewhere = words != 0, np.delete(self.run.bare(rank, field), (epoch or self.epoch) - 1, axis=0)
            assert not elsewhere.any(), f"{field}: words in another set"
            words = np.where(words == MINUS_ZERO, np.uint32(0), words)
        else:
            words, epochs = (a.reshape(-1, width // 2) for a in self.raw(rank, field, self.size("max_rows") * width // 2))
            here = epochs == (epoch or self.epoch)
            assert not epochs[self.rows :].any(), f"{field}: words of rows that the step has not"
        assert np.all(here[: self.rows]), f"{field}: words are missing"
        assert not here[self.rows :].any(), f"{field}: words of rows that the step has not"
        return to_float32(words.view(np.uint16)).reshape(-1, width)[: self.rows]

    def raw(self, rank: int, field: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(payloads, epochs) of a buffer's first words."""
        words = self.device.download(self.run.ranks[rank].symmetric, self.size(field) * 8, count * 8).view(np.uint32)
        return words[0::2].copy(), words[1::2].copy()

    # ------------------------------------------------------------------ partial sums: [sources, rows, hidden] float32
    def put_partials(self, field: str, slices: int, epoch: int) -> np.ndarray:
        """Random partial sums of all sources, wherever their readers look for them; returns the residual they add up to.

        The rows' sizes differ, down to where epsilon matters. What nobody may read is left without an epoch, and would be waited for.
        """
        sources, max_rows, hidden = self.run.world * slices, self.size("max_rows"), self.size("hidden_size")
        partials = np.zeros((sources, max_rows, hidden), np.float32)
        real = self.rng.standard_normal((sources, self.rows, self.size("norm_size")), np.float32)
        partials[:, : self.rows, : self.size("norm_size")] = real * self.rng.choice([1e-3, 1, 1, 30], (self.rows, 1))
        words = np.zeros((sources, max_rows, planner.partial_width(hidden)), np.uint64)
        words[:, : self.rows, partial_places(hidden)] = pack_words(partials, epoch)[:, : self.rows]
        for rank in self.ranks:
            mine = words.copy()
            if exchange_of(self.case) == abi.Strategy.TWO_SHOT:
                mine[:, :, partial_places(hidden)[owner_ranks(self.shape) != rank]] = 0
            self.device.upload(self.run.ranks[rank].symmetric, self.size(field) * 8, mine.view(np.uint8).reshape(-1))
        total = partials[0, : self.rows].copy()
        for source in range(1, sources):
            total = total + partials[source, : self.rows]
        return total

    def get_partials(self, field: str, slices: int) -> np.ndarray:
        """float32 [sources, rows, hidden]: every word must be exactly where its readers look for it, the same for all of them."""
        sources, max_rows, hidden = self.run.world * slices, self.size("max_rows"), self.size("hidden_size")
        out = np.zeros((sources, self.rows, hidden), np.float32)
        for rank in self.ranks:
            width = planner.partial_width(hidden)
            raw = (a.reshape(sources, max_rows, width) for a in self.raw(rank, field, sources * max_rows * width))
            payload, epochs = (a[:, :, partial_places(hidden)] for a in raw)
            here = np.zeros(epochs.shape, bool)
            here[:, : self.rows] = True
            if exchange_of(self.case) == abi.Strategy.TWO_SHOT:
                here &= owner_ranks(self.shape) == rank
            np.testing.assert_array_equal(epochs, np.where(here, self.epoch, 0), f"{field} of rank {rank}: epochs")
            values, here = payload.view(np.float32)[:, : self.rows], here[:, : self.rows]
            if rank and exchange_of(self.case) != abi.Strategy.TWO_SHOT:
                np.testing.assert_array_equal(values, out, f"{field}: rank {rank} got other sums than rank 0")
            out[here] = values[here]
        return out

    # ------------------------------------------------------------------ KV pages
    def put_pages(self, rank: int) -> Pages:
        """Random keys and values for all positions before the step's, garbage everywhere else."""
        pages = Pages(self.shape, self.table, garbage(self.rng, planner.kv_bytes(self.shape) // 2))
        heads, dim = self.size("num_kv_heads"), self.size("head_dim")
        for chunk in self.case.chunks:
            if chunk.start:
                keys, values = (normal_bits(self.rng, (chunk.start, heads, dim)) for _ in range(2))
                pages.write(self.layer, chunk.slot, 0, keys, values)
        self.device.upload(self.run.ranks[rank].kv, 0, pages.bits)
        return pages

    def get_pages(self, rank: int) -> np.ndarray:
        buffer = self.run.ranks[rank].kv
        return self.device.download(buffer, 0, buffer.nbytes).view(np.uint16)
