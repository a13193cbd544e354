"""What a run leaves behind, in a form that does not depend on the schedule, and the comparison of two runs bit for bit.

A schedule decides which rows share a step and whether a request that ends has a ghost row. What a row *is*, its position of its
sequence, decides its bits. So everything is named by (request, position): keys and values of all layers from the pages, and for the
rows of the last step the tap of every phase. A random-weight model is chaotic: whatever goes wrong anywhere is in one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from imex_persist import abi, planner
from imex_persist.abi import Command, Finish, Phase, Record
from imex_persist.tap import LAYER_PHASES, tap_view
from tests.kernel.harness import whole_records
from tests.kernel.pages import Pages

from .configuration import Configuration


class Wrong(Exception):
    """A run that ended, but not as it must."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


@dataclass
class Observation:
    tokens: list[list[int]]
    finishes: list[int]
    rows: dict[tuple[int, int, int, bool], bytes] = field(default_factory=dict)  # (rank, request, position, logits) -> tap
    keys: list[list[np.ndarray]] = field(default_factory=list)  # [rank][request] keys and values of the positions that were run


def read_records(configuration: Configuration, records: np.ndarray, num_commands: int) -> Observation:
    """Every command acknowledged once, every request ended once and then released, the sequence without a gap."""
    records = whole_records(records)
    expect([int(r["sequence"]) for r in records] == list(range(1, len(records) + 1)), "records are not in order")
    acks = [int(r["token"]) for r in records if r["kind"] == Record.ACK]
    expect(acks == list(range(1, num_commands + 1)), f"acknowledged were {acks}")
    seen = Observation([], [])
    for i, request in enumerate(configuration.requests):
        mine = [r for r in records if r["request"] == i and r["kind"] not in (Record.ACK, Record.LOGPROB)]
        kinds = [int(r["kind"]) for r in mine]
        expect(kinds == [Record.TOKEN] * (len(mine) - 1) + [Record.RELEASE], f"request {i} has records {kinds}")
        tokens, ends = [int(r["token"]) for r in mine[:-1]], [int(r["finish"]) for r in mine]
        expect([int(r["index"]) for r in mine] == [*range(len(tokens)), len(tokens)], f"request {i}: tokens are not in order")
        expect([int(r["time_ns"]) for r in mine] == sorted(int(r["time_ns"]) for r in mine), f"request {i}: time runs back")
        cancelled = ends[-1] == Finish.CANCELLED
        expect(not cancelled or request.cancel_after is not None, f"request {i} was cancelled")
        expect(ends[:-1] == [Finish.NONE] * (len(tokens) - 1) + [ends[-1]] * (not cancelled and len(tokens) > 0)
               or (cancelled and not any(ends[:-1])), f"request {i} ended {ends}")  # fmt: skip
        expect(cancelled or tokens, f"request {i} has no token")
        seen.tokens.append(tokens)
        seen.finishes.append(ends[-1])
    return seen


def read_prefix(configuration: Configuration, records: np.ndarray, num_commands: int) -> None:
    """Of a run that was aborted: records without a gap, commands in order, tokens in order, nothing after a request's release."""
    records = whole_records(records)
    expect([int(r["sequence"]) for r in records] == list(range(1, len(records) + 1)), "records are not in order")
    acks = [int(r["token"]) for r in records if r["kind"] == Record.ACK]
    expect(acks == list(range(1, len(acks) + 1)) and len(acks) <= num_commands, f"acknowledged were {acks}")
    for i in range(len(configuration.requests)):
        mine = [r for r in records if r["request"] == i and r["kind"] not in (Record.ACK, Record.LOGPROB)]
        expect([int(r["index"]) for r in mine] == list(range(len(mine))), f"request {i}: tokens are not in order")
        expect(all(r["kind"] == Record.TOKEN for r in mine[:-1]), f"request {i} goes on after its release")


def last_rows(shape: np.void, plans: np.ndarray) -> list[tuple[int, int, bool]]:
    """(slot, position, samples) of the last step with rows, from both buffers of plan words; after a shutdown."""
    width = planner.plan_words(int(shape["max_rows"]))
    buffers = plans[: 2 * width].reshape(2, width)
    epochs = (buffers >> np.uint64(32)).astype(np.int64)
    newest = int(epochs[:, 0].argmax())
    words = (buffers & np.uint64(0xFFFFFFFF)).astype(np.int64)
    expect((words[newest, 0] & ~abi.PLAN_NEW_PAGES) >> 16 == Command.SHUTDOWN, "the last plan is no shutdown")
    last, count = words[1 - newest], int(words[1 - newest, 0] & 0xFFFF)
    if not epochs[1 - newest, 0]:
        return []
    expect(epochs[1 - newest, 0] == epochs[newest, 0] - 1, "the last two plans are not of neighbouring steps")
    rows = last[abi.PLAN_HEADER_WORDS :].reshape(-1, abi.PLAN_ROW_WORDS)[:count]
    return [(int(r[2] & abi.ROW_SLOT), int(r[1]), bool(r[2] & abi.ROW_SAMPLES)) for r in rows]


def observe_rows(seen: Observation, rank: int, shape: np.void, tap: np.ndarray, rows: list[tuple[int, int, bool]]) -> None:
    layers, logits = int(shape["num_layers"]), any(samples for *_, samples in rows)
    for r, (request, position, samples) in enumerate(rows):
        parts = [  # a step without logits leaves the last layer's out: what stands there is an older step's
            tap_view(tap, shape, p, layer)[r]
            for layer in range(layers)
            for p in LAYER_PHASES
            if logits or layer + 1 < layers or p not in (Phase.GATE_UP, Phase.DOWN_PROJ)
        ]
        parts.append(tap_view(tap, shape, Phase.EMBED)[r])
        if samples:
            parts.append(tap_view(tap, shape, Phase.LM_HEAD)[r])
        seen.rows[rank, request, position, logits] = np.concatenate(parts).tobytes()


def observe_pages(seen: Observation, configuration: Configuration, shape: np.void, table: np.ndarray, bits: np.ndarray) -> None:
    """Of one rank: positions whose rows certainly ran, so not those of ghosts, nor those that a cancel may have kept from running."""
    pages, mine = Pages(shape, table, bits), []
    for i, request in enumerate(configuration.requests):
        cancelled_early = seen.finishes[i] == Finish.CANCELLED and not seen.tokens[i]
        count = 0 if cancelled_early else len(request.prompt) + max(len(seen.tokens[i]) - 1, 0)
        if not count:
            mine.append(np.zeros((0, 0), np.uint16))
            continue
        both = [
            np.concatenate(pages.read(layer, i, count), axis=1).reshape(count, -1) for layer in range(int(shape["num_layers"]))
        ]
        mine.append(np.concatenate(both, axis=1))
    seen.keys.append(mine)


def compare(configuration: Configuration, known: Observation, seen: Observation) -> None:
    """`seen` against everything that runs of this configuration have shown so far, to which its rows are added."""
    for i, request in enumerate(configuration.requests):
        a, b = known.tokens[i], seen.tokens[i]
        if request.cancel_after is None:
            expect(a == b and known.finishes[i] == seen.finishes[i], f"request {i}: tokens {b} instead of {a}")
        else:
            n = min(len(a), len(b))
            expect(a[:n] == b[:n], f"request {i}: tokens {b} and {a} of an earlier run begin differently")
        for rank, (x, y) in enumerate(zip(known.keys, seen.keys, strict=True)):
            n = min(len(x[i]), len(y[i]))
            wrong = np.flatnonzero((x[i][:n] != y[i][:n]).any(axis=1)) if n else []
            expect(
                not len(wrong), f"request {i}: keys or values of rank {rank} differ at positions {[int(w) for w in wrong][:8]}"
            )
    for key, value in seen.rows.items():
        before = known.rows.setdefault(key, value)
        if len(before) == len(value) and before != value:
            a, b = np.frombuffer(before, np.uint32), np.frombuffer(value, np.uint32)
            rank, request, position, _ = key
            first = int(np.flatnonzero(a != b)[0])
            raise Wrong(f"request {request}: the tap of rank {rank} differs at position {position}, value {first} of {len(a)}")
