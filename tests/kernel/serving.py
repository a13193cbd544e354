"""The real kernel with the real engine before it, all in this process: every rank in one launch of the simulator (or of one GPU)."""

from __future__ import annotations

import threading

import numpy as np

from imex_persist import abi, planner
from imex_persist.runtime.engine import Engine
from imex_persist.runtime.mailbox import ArenaLayout, Mailbox
from imex_persist.runtime.request import Request, Submission

from .harness import KernelRun
from .pages import Pages, garbage

BEAT_S = 0.2


class Served(KernelRun):
    """A resident kernel and its engine; use it as a context manager. `options` are Engine's."""

    def __init__(self, device, config, source, shape, *, max_model_len: int, **options):
        super().__init__(device, config, source, shape)
        rng = np.random.default_rng(7)
        for rank in self.ranks:  # nobody may read what nobody wrote
            device.upload(rank.kv, 0, garbage(rng, rank.kv.nbytes // 2))
        layout = ArenaLayout(int(shape["num_slots"]), max_model_len, int(shape["pages_per_slot"]))
        self.mailbox = Mailbox(memoryview(self.host), layout)
        self.resident = device.launch(self.kernel, self.params(mailbox=True))
        sizes = {name: int(shape[name]) for name in ("num_slots", "num_pages", "page_size")}
        self.engine = Engine(self.mailbox, **sizes, max_model_len=max_model_len, on_silence=self._look, **options)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def close(self) -> None:
        if self._ended.is_set():
            return
        self.engine.close()
        self.mailbox.shutdown()
        self._ended.set()
        self._heart.join()
        assert self.resident.wait(60), "the kernel did not return"
        for i in range(self.world):
            assert not self.faults[i * 4096 :][: abi.FaultRecord.itemsize].view(abi.FaultRecord)[0]["valid"]

    def _beat(self) -> None:
        value = 1
        while not self._ended.wait(BEAT_S):
            value += 1
            self.mailbox.beat(value)

    def _look(self) -> None:
        """The kernel has been silent: if it has ended, everybody must know why."""
        try:
            if self.resident.wait(0):
                self.engine.fail(AssertionError("the kernel returned"))
        except Exception as error:
            self.engine.fail(error)

    # ------------------------------------------------------------------ requests
    def submit(self, prompt, max_tokens: int, **fields) -> Request:
        return self.engine.submit(Submission(tuple(prompt), max_tokens, **fields))

    def answer(self, prompt, max_tokens: int, **fields) -> list[int]:
        """Of a request that runs alone. Returns when it is released as well: only then all of its whole pages are kept."""
        tokens = tokens_of(self.submit(prompt, max_tokens, **fields))
        assert self.engine.drain(60), "it was not released"
        return tokens

    def check_all_is_back(self, timeout_s: float = 60) -> None:
        """Every slot and every page, kept ones counted."""
        assert self.engine.drain(timeout_s), "something did not end"
        assert self.engine.free_slots == int(self.shape["num_slots"])
        assert self.engine.free_pages == int(self.shape["num_pages"])

    def keys_and_values(self, request: Request, count: int) -> list[np.ndarray]:
        """Of each rank: uint16 [layers, count, 2 * kv_heads, dim] of the first positions. The kernel must have ended."""
        table, out = np.array([request.reservation.pages]), []
        for rank in self.ranks:
            bits = self.device.download(rank.kv, 0, planner.kv_bytes(self.shape)).view(np.uint16)
            pages = Pages(self.shape, table, bits)
            layers = range(int(self.shape["num_layers"]))
            out.append(np.stack([np.concatenate(pages.read(layer, 0, count), axis=1) for layer in layers]))
        return out


def tokens_of(request: Request, timeout_s: float = 60.0) -> list[int]:
    """Of a request that is not cancelled, at its end."""
    tokens = []
    while True:
        event = request.events.get(timeout=timeout_s)
        if isinstance(event, Exception):
            raise event
        if event.token is not None:
            tokens.append(event.token)
        if event.finish_reason:
            return tokens
