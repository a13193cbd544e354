"""The two rings against a kernel that reads them as the real one does."""

from __future__ import annotations

import os
import struct
import time

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.runtime.mailbox import ArenaLayout, Mailbox, RecordEntry
from imex_persist.runtime.shared import SharedBlock
from tests.runtime.fake_kernel import token_of


def test_a_descriptor_is_what_the_kernel_reads(make_box):
    box = make_box()
    assert box.mailbox.submit(request=5, slot=1, prompt=[7, 8, 9], pages=[4, 2], stop=[11], max_tokens=6, min_tokens=2) == 1
    d = box.kernel.descriptors[0]
    words = np.array([d]).view(np.uint32).tolist()
    assert words[15] == abi.descriptor_check(words[:15])
    assert (d["sequence"], d["command"], d["request"], d["slot"]) == (1, abi.Command.SUBMIT, 5, 1)
    assert (d["prompt_len"], d["num_pages"], d["num_stop"]) == (3, 2, 1)
    assert (d["max_tokens"], d["min_tokens"]) == (6, 2)
    assert (d["first_token"], d["first_page"]) == (7, 4)
    at = int(d["arena"])
    assert box.kernel.arena[at : at + 6].tolist() == [7, 8, 9, 4, 2, 11]


def test_a_torn_line_is_never_whole(make_box):
    """Any part of a new line over any older one: on a host that does not store in order, the kernel may see it."""
    rng = np.random.default_rng(0)
    box = make_box()
    lines = []
    for sequence in range(1, 2 * abi.DESCRIPTOR_SLOTS + 1):
        lines.append(np.array([box.kernel.descriptors[(sequence - 1) % abi.DESCRIPTOR_SLOTS]]).view(np.uint32))
        small = {name: int(rng.integers(8)) for name in ("request", "max_tokens", "min_tokens")}  # words that differ alike
        box.mailbox.submit(slot=0, prompt=[1] * int(rng.integers(1, 8)), pages=range(int(rng.integers(1, 8))), **small)
        new = np.array([box.kernel.descriptors[(sequence - 1) % abi.DESCRIPTOR_SLOTS]]).view(np.uint32)
        for _ in range(500):
            torn = np.where(rng.integers(0, 2, 16), new, lines[-1]).tolist()
            if torn != new.tolist() and torn[0] == sequence:
                assert torn[15] != abi.descriptor_check(torn[:15])
        assert box.kernel.take() == abi.Command.SUBMIT
        box.kernel.running.clear()
        box.mailbox.poll()


def test_slots_have_regions_of_their_own():
    layout = ArenaLayout(num_slots=3, max_model_len=100, pages_per_slot=4)
    assert layout.region >= 100 + 4 + abi.MAX_STOP_IDS
    assert layout.nbytes == abi.Mailbox.itemsize + 3 * 4 * layout.region


def test_a_request_comes_back_token_by_token(make_box):
    box = make_box()
    prompt = [3, 4]
    box.mailbox.submit(request=1, slot=0, prompt=prompt, pages=[0], max_tokens=3)
    assert box.kernel.take() == abi.Command.SUBMIT
    for _ in range(4):
        box.kernel.step()
    records = box.mailbox.poll()
    assert [r.kind for r in records] == [abi.Record.ACK, *[abi.Record.TOKEN] * 3, abi.Record.RELEASE]
    assert [r.token for r in records[1:4]] == [token_of(prompt, i) for i in range(3)]
    assert [r.index for r in records[1:4]] == [0, 1, 2]
    assert [r.finish for r in records[1:4]] == [0, 0, abi.Finish.LENGTH]
    assert [r.sequence for r in records] == [1, 2, 3, 4, 5]
    assert records[0].token == 1 and box.mailbox.unacknowledged == 0
    assert box.kernel.header["records_read"] == 5
    assert box.mailbox.poll() == []


def test_the_descriptor_ring_is_never_overrun(make_box):
    box = make_box()
    for i in range(abi.DESCRIPTOR_SLOTS):
        assert box.mailbox.noop() == i + 1
    assert box.mailbox.noop() is None
    assert box.mailbox.cancel(1, 0) is None
    assert box.mailbox.shutdown() is None
    assert box.mailbox.submit(request=1, slot=0, prompt=[1], pages=[0], max_tokens=1) is None
    assert box.kernel.take() == abi.Command.NOOP
    assert box.mailbox.noop() is None  # not acknowledged as far as the host has read
    box.mailbox.poll()
    assert box.mailbox.noop() == abi.DESCRIPTOR_SLOTS + 1


def test_a_rehearsal_leaves_no_trace(make_box):
    box = make_box()
    before = bytes(box.block.view)
    for _ in range(2 * abi.DESCRIPTOR_SLOTS):
        box.mailbox.rehearse()
    assert bytes(box.block.view) == before
    assert box.kernel.take() is None and box.mailbox.noop() == 1 and box.kernel.take() == abi.Command.NOOP


def test_rings_wrap(make_box):
    box = make_box()
    total = 3 * abi.RECORD_SLOTS
    for i in range(total):
        assert box.mailbox.noop() == i + 1
        assert box.kernel.take() == abi.Command.NOOP
        (record,) = box.mailbox.poll()
        assert (record.sequence, record.token) == (i + 1, i + 1)


def test_sequence_numbers_wrap_at_32_bits(make_box):
    box = make_box()
    start = 2**32 - 3
    box.kernel.records.view(np.uint64)[:] = 77 << 32  # no ring is empty after so many records
    box.mailbox.descriptors.posted = box.mailbox._acked = start
    box.mailbox._has_read(start)
    for step in range(1, 7):
        sequence = box.mailbox.noop()
        assert sequence == (start + step) % 2**32
        box.kernel.put_record(sequence, (abi.Record.ACK, 0, sequence, 0, 0, 0, 0, 0))
        assert [r.sequence for r in box.mailbox.poll()] == [sequence]
        assert box.mailbox.unacknowledged == 0


def test_a_record_is_read_when_all_its_words_are_there(make_box):
    """In whatever order they come, over words of the lap before."""
    box, rng = make_box(), np.random.default_rng(1)
    for lap in range(2):
        for place in range(40):
            sequence = lap * abi.RECORD_SLOTS + place + 1
            box.mailbox._has_read(sequence - 1)
            words = box.kernel.records[place : place + 1].view(np.uint64)
            for i in rng.permutation(8):
                assert box.mailbox.poll() == [] and not box.mailbox.await_record(1)
                words[i] = sequence << 32 | (10 * sequence + int(i))
            assert box.mailbox.await_record(1)
            (record,) = box.mailbox.poll()
            at = 10 * sequence
            assert record == (sequence, at, at + 1, at + 2, at + 3, at + 4, (at + 7) << 32 | at + 6)


def test_words_of_a_record_are_in_the_order_of_the_abi():
    record = np.zeros((), abi.TokenRecord)
    for i, name in enumerate(abi.RECORD_WORDS):
        record[name], record[f"{name}_tag"] = i, 7
    words = record.reshape(1).view(np.uint64).tolist()
    assert RecordEntry.of(words) == RecordEntry(7, kind=0, request=1, token=2, index=3, finish=4, time_ns=7 << 32 | 6)


def test_poll_takes_at_most_its_limit(make_box):
    box = make_box()
    for _ in range(10):
        box.mailbox.noop()
        box.kernel.take()
    assert len(box.mailbox.poll(limit=4)) == 4
    assert box.kernel.header["records_read"] == 4
    assert len(box.mailbox.poll()) == 6


@pytest.mark.parametrize("bad", [{"slot": 2}, {"prompt": [1] * 400}])
def test_what_does_not_fit_the_arena_is_refused(make_box, bad):
    box = make_box()
    with pytest.raises(ValueError, match="does not fit"):
        box.mailbox.submit(**{"request": 1, "slot": 0, "prompt": [1], "pages": [0], "max_tokens": 1, **bad})
    assert box.kernel.take() is None


def test_header_words(make_box):
    box = make_box()
    box.mailbox.beat(2**40 + 5)
    assert box.kernel.header["heartbeat"] == 5
    box.kernel.header["resident"], box.kernel.header["steps"] = 1, 12
    assert (box.mailbox.resident, box.mailbox.steps) == (1, 12)
    assert not box.mailbox.stopped
    box.mailbox.stop()
    assert box.mailbox.stopped and box.kernel.header["stop"] == 1


def test_a_block_that_is_too_small_is_refused():
    block = SharedBlock.create(4096)
    with pytest.raises(ValueError, match="needs"):
        Mailbox(block.view, ArenaLayout(1, 128, 4))
    block.close()


def test_costs_of_the_hot_path(make_box):
    """Not a benchmark: only that nobody put NumPy field access on the hot path."""
    box = make_box()
    start = time.perf_counter()
    for _ in range(20_000):
        box.mailbox.poll()
    assert (time.perf_counter() - start) / 20_000 < 20e-6


def test_shared_blocks_are_the_same_memory():
    block = SharedBlock.create(100)
    other = SharedBlock.attach(os.dup(block.fd), block.nbytes)
    struct.pack_into("I", block.view, 8, 77)
    assert struct.unpack_from("I", other.view, 8) == (77,)
    with pytest.raises(ValueError, match="announced"):
        SharedBlock.attach(block.fd, block.nbytes * 2)
    other.close()
    block.close()
