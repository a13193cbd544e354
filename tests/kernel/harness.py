"""Runs the real kernel on all ranks of a model in one launch: whole, through its mailbox, or one phase alone from given words.

Device-agnostic: the same code drives the simulator (tests/kernel) and a GPU (tests/gpu).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from imex_persist import abi, planner
from imex_persist.model.packing import embed_is_lm_head, load_rank, rank_bytes, rope_positions
from imex_persist.runtime.mailbox import RecordEntry
from imex_persist.runtime.rank import RankMemory, launch_params
from imex_persist.tap import tap_floats, tap_view

HOST_BYTES = abi.Mailbox.itemsize + 4 * 65536  # mailbox and arena
FAULT_BYTES = 4096
PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))  # how much slower than it is the machine may be: under compute-sanitizer


def host_block(nbytes: int) -> np.ndarray:
    """Zeroed host memory in pages of its own: an array that shared one with it could not be copied to a GPU, which has registered a part
    of it only.
    """
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def pack_words(payload: np.ndarray, epoch: int) -> np.ndarray:
    """uint64 words of 32-bit payloads (float32, int32 or uint32)."""
    bits = np.ascontiguousarray(payload).view(np.uint32).astype(np.uint64)
    return bits | np.uint64(epoch) << np.uint64(32)


def bf16_pairs(bits: np.ndarray) -> np.ndarray:
    """uint32 payloads of uint16 bf16 bits [..., n] -> [..., n / 2]."""
    return np.ascontiguousarray(bits).view(np.uint32)


ENTRY = np.dtype([(name, np.uint64 if name == "time_ns" else np.uint32) for name in RecordEntry._fields])


def whole_records(ring: np.ndarray) -> np.ndarray:
    """ENTRY [n]: what the records say that are whole, in the order of their places."""
    words = ring.view(np.uint64).reshape(-1, 8)
    tags = words >> np.uint64(32)
    whole = (tags[:, 0] != 0) & np.all(tags == tags[:, :1], 1)
    return np.array([RecordEntry.of(line) for line in words[whole].tolist()], ENTRY)


BARE = ("off_attn", "off_o_sum", "off_gate", "off_down_sum")  # buffers of bare words
MINUS_ZERO = 0x80000000  # a pair of two zeros, as it is sent


def bare_width(shape: np.void, field: str) -> int:
    """Values of a row of a buffer of bare words."""
    heads, dim, hidden, wide = (int(shape[name]) for name in ("num_heads", "head_dim", "hidden_size", "intermediate_size"))
    return {"off_attn": heads * dim, "off_gate": wide}.get(field, hidden)


def bare_sets(shape: np.void, field: str, read) -> np.ndarray:
    """uint32 [num_layers + 1, max_rows, width / 2]: all sets of bare words (cuda_src/bare.cuh) of a kind; `read` takes offset and number of
    bytes of a rank's symmetric memory."""
    sets, rows, per_row = int(shape["num_layers"]) + 1, int(shape["max_rows"]), 2 * int(shape["row_words"])
    found = read(8 * int(shape["off_attn"]), 4 * sets * rows * per_row).view(np.uint32).reshape(sets, rows, per_row)
    at = 2 * int(shape[field] - shape["off_attn"])
    return found[:, :, at : at + bare_width(shape, field) // 2]


class KernelRun:
    """All ranks of `shape` on `device`, weights loaded from `source`."""

    def __init__(self, device, config, source, shape):
        self.device, self.config, self.source, self.shape = device, config, source, shape
        self.world = int(shape["world_size"])
        self.ranks = [RankMemory(device, shape, r) for r in range(self.world)]
        for rank in self.ranks:
            for name, size in rank_bytes(config, shape).items():
                rank.weights[name] = device.zeros(size)
            if embed_is_lm_head(config, shape):
                rank.weights["embed"] = rank.weights["lm_head"]
            load_rank(
                source, config, shape, rank.rank,
                lambda name, offset, array, rank=rank: device.upload(rank.weights[name], offset, array),
            )  # fmt: skip
            rank.connect({}, {r.rank: r for r in self.ranks})
            for other in self.ranks:
                rank.peers[other.rank] = other.symmetric
        self.taps = [device.zeros(4 * tap_floats(shape)) if shape["tap"] else None for _ in self.ranks]
        self.host, self.faults = host_block(HOST_BYTES), host_block(FAULT_BYTES * self.world)
        self.kernel = device.load(shape)

    def params(self, mailbox: bool) -> np.void:
        out = []
        for i, rank in enumerate(self.ranks):
            address = self.device.map_host(memoryview(self.host)) if mailbox and i == 0 else 0
            fault = self.device.map_host(memoryview(self.faults)[i * FAULT_BYTES : (i + 1) * FAULT_BYTES])
            p = rank.params(mailbox=address, fault=fault, deadline_us=round(20_000_000 * PATIENCE))
            if self.taps[i] is not None:
                p = p.copy()
                p["tap"] = self.taps[i].address
            out.append(p)
        return launch_params(out)

    def launch(self, mailbox: bool = True, timeout_s: float = 120.0) -> None:
        launch = self.device.launch(self.kernel, self.params(mailbox))
        ended = launch.wait(timeout_s * PATIENCE)
        assert ended, "the kernel did not return"
        for i in range(self.world):
            fault = self.faults[i * FAULT_BYTES : (i + 1) * FAULT_BYTES][: abi.FaultRecord.itemsize].view(abi.FaultRecord)[0]
            assert not fault["valid"], fault

    def reset(self) -> None:
        """Words and counters as before the first launch; pages stay as they are."""
        self.host[:] = 0
        for rank in self.ranks:
            for buffer in (rank.symmetric, rank.claims):
                self.device.upload(buffer, 0, np.zeros(buffer.nbytes, np.uint8))

    # ------------------------------------------------------------------ the whole model, by descriptors written beforehand
    def decode(self, requests: list[dict], commands: list[tuple[abi.Command, dict]] = ()) -> list[list[int]]:
        """Tokens of each request {prompt, max_tokens, min_tokens=0, stop=(), sampling=None (runtime/sampling.py)}: all descriptors
        are written, those of `commands` after the requests', then the kernel runs.
        """
        mailbox = self.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]
        arena = self.host[abi.Mailbox.itemsize :].view(np.uint32)
        page, at, next_page = int(self.shape["page_size"]), 0, 0
        for i, request in enumerate(requests):
            prompt, stop = request["prompt"], list(request.get("stop", ()))
            num_pages = -(-(len(prompt) + request["max_tokens"]) // page)
            pages = list(range(next_page, next_page + num_pages))
            next_page += num_pages
            sampling = request.get("sampling")
            body = [*prompt, *pages, *stop, *(sampling.words if sampling else ())]
            arena[at : at + len(body)] = body
            self._descriptor(
                mailbox, i + 1, abi.Command.SUBMIT, request=i, slot=i, arena=at, prompt_len=len(prompt), num_pages=num_pages,
                num_stop=len(stop), max_tokens=request["max_tokens"], min_tokens=request.get("min_tokens", 0),
                draw=sampling.draw if sampling else 0, num_logprobs=sampling.num_logprobs if sampling else 0,
                first_token=prompt[0], first_page=pages[0],
            )  # fmt: skip
            at += len(body)
        for i, (command, fields) in enumerate([*commands, (abi.Command.SHUTDOWN, {})], len(requests) + 1):
            self._descriptor(mailbox, i, command, **fields)
        self.launch()
        self.records = whole_records(mailbox["records"])
        tokens: list[list[int]] = [[] for _ in requests]
        for record in self.records:
            if record["kind"] == abi.Record.TOKEN:
                assert record["index"] == len(tokens[record["request"]])
                tokens[record["request"]].append(int(record["token"]))
        return tokens

    def _descriptor(self, mailbox, sequence: int, command: abi.Command, at: int | None = None, **fields) -> None:
        d = np.zeros((), abi.Descriptor)
        d["sequence"], d["command"] = sequence, command
        for name, value in fields.items():
            d[name] = value
        d["check"] = abi.descriptor_check(d.reshape(1).view(np.uint32)[:15].tolist())
        mailbox["descriptors"][(sequence - 1) % abi.DESCRIPTOR_SLOTS if at is None else at] = d

    # ------------------------------------------------------------------ one phase alone
    def put_words(self, rank: int, field: str, payload: np.ndarray, epoch: int, offset: int = 0) -> None:
        words = pack_words(payload.reshape(-1), epoch)
        self.device.upload(self.ranks[rank].symmetric, (int(self.shape[field]) + offset) * 8, words.view(np.uint8))

    def get_words(self, rank: int, field: str, count: int, epoch: int, offset: int = 0) -> np.ndarray:
        """uint32 payloads; every word must carry `epoch`."""
        raw = self.device.download(self.ranks[rank].symmetric, (int(self.shape[field]) + offset) * 8, count * 8).view(np.uint64)
        assert np.all(raw >> np.uint64(32) == epoch), f"{field}: a word without epoch {epoch}"
        return (raw & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    def bare(self, rank: int, field: str, layer: int | None = None) -> np.ndarray:
        """uint32 [max_rows, width / 2] of a layer of step 0; 0: nothing is there. Without a layer all of `bare_sets`."""
        found = bare_sets(self.shape, field, lambda *part: self.device.download(self.ranks[rank].symmetric, *part))
        return found if layer is None else found[layer]

    def put_bare(self, rank: int, field: str, pairs: np.ndarray, layer: int) -> None:
        """The first rows of a layer of step 0, uint32 [rows, width / 2]."""
        rows, per_row = int(self.shape["max_rows"]), int(self.shape["row_words"])
        sent = np.where(pairs == 0, np.uint32(MINUS_ZERO), pairs).astype(np.uint32)
        for row, words in enumerate(sent):
            at = int(self.shape[field]) + (layer * rows + row) * per_row
            self.device.upload(self.ranks[rank].symmetric, at * 8, words.view(np.uint8))

    def put_plan(self, rows: list[tuple[int, int, int, bool, int]], sampling: dict[int, Sequence[int]] | None = None) -> None:
        """Plan of step 0: (token, position, slot, samples, page) of each row, to every rank; `sampling` words of rows that draw."""
        sampling = sampling or {}
        capacity = int(self.shape["max_rows"])
        words = np.zeros(planner.plan_words(capacity), np.uint32)
        words[0], words[1] = len(rows), sum(r[3] for r in rows) | len(sampling) << 16
        for i, (token, position, slot, samples, page) in enumerate(rows):
            at = abi.PLAN_HEADER_WORDS + i * abi.PLAN_ROW_WORDS
            slot |= (abi.ROW_SAMPLES if samples else 0) | (abi.ROW_DRAWS if i in sampling else 0)
            words[at : at + 4] = token, position, slot, page
        for rank in range(self.world):
            self.put_words(rank, "off_plan", words, 1)
            for row, body in sampling.items():
                self.put_words(rank, "off_sampling", np.array(body, np.uint32), 1, row * abi.SAMPLING_WORDS)

    def tap(self, rank: int) -> np.ndarray:
        raw = self.device.download(self.taps[rank], 0, self.taps[rank].nbytes)
        return raw.view(np.float32)

    def max_position(self) -> int:
        return rope_positions(self.shape)

    def tap_of(self, rank: int, phase: abi.Phase, layer: int = 0) -> np.ndarray:
        """float32 [max_rows, width]: one phase's output in a rank's tap."""
        return tap_view(self.tap(rank), self.shape, phase, layer)
