"""The host's end of the two rings (abi.Mailbox): descriptors go in, records come out. Nothing here calls into a device.

Layout: header, descriptor ring, record ring, then an arena of u32 in which every slot owns one region for prompt ids, page ids, stop
token ids and how tokens are drawn; a slot's region is free again exactly when the slot is, at the request's RELEASE record.

Ordering. A descriptor is valid only if its check word fits, so its own words may land in any order. What it points at must be there
before it: the arena is written, then `_order`, then the descriptor. A record is eight tagged words, each read by one load: it is there
when all eight carry its number, and then nothing of it can be old, in whatever order it came.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from imex_persist import abi
from imex_persist.runtime.sampling import Sampling

_WORDS = struct.Struct("16I")
_RECORD = struct.Struct("8Q")  # native: payload and tag of a word come by one load
_TAGS = struct.Struct("4xI" * 8)  # of a record's words, their high halves
_MASK = 0xFFFFFFFF
_DESCRIPTORS = abi.Mailbox.fields["descriptors"][1]
_RECORDS = abi.Mailbox.fields["records"][1]
_ARENA = abi.Mailbox.itemsize
_LINES = [slice(_DESCRIPTORS + i * _WORDS.size, _DESCRIPTORS + (i + 1) * _WORDS.size) for i in range(abi.DESCRIPTOR_SLOTS)]


def _header(field: str) -> int:
    return (abi.Mailbox.fields["header"][1] + abi.MailboxHeader.fields[field][1]) // 4


_HEARTBEAT, _READ, _STOP, _RESIDENT, _STEPS = (_header(f) for f in ("heartbeat", "records_read", "stop", "resident", "steps"))


class RecordEntry(NamedTuple):
    """What an abi.TokenRecord says."""

    sequence: int
    kind: int
    request: int
    token: int
    index: int
    finish: int
    time_ns: int

    @classmethod
    def of(cls, words: Sequence[int]) -> RecordEntry:
        """From the eight words of one that is there."""
        kind, request, token, index, finish, _, low, high = [word & _MASK for word in words]  # abi.RECORD_WORDS
        return cls(words[0] >> 32, kind, request, token, index, finish, high << 32 | low)

    @property
    def finish_float(self) -> float:
        """`finish` of a LOGPROB: a float32."""
        return struct.unpack("f", struct.pack("I", self.finish))[0]


@dataclass(frozen=True)
class ArenaLayout:
    """Regions of the arena, in u32."""

    num_slots: int
    max_model_len: int
    pages_per_slot: int

    @property
    def region(self) -> int:
        return -(-(self.max_model_len + self.pages_per_slot + abi.MAX_STOP_IDS + abi.SAMPLING_WORDS) // 16) * 16

    @property
    def nbytes(self) -> int:
        """Bytes of mailbox and arena together."""
        return _ARENA + 4 * self.num_slots * self.region


class DescriptorRing:
    """The lines that a kernel takes one after the other. Nobody may post between another's `prepare` and `post`."""

    def __init__(self, view: memoryview):
        self.posted = 0  # sequence number of the last descriptor
        self._view = view
        self._next_line = _LINES[0]

    def prepare(self, command: int, *words: int) -> bytes:
        """The next descriptor's line, for `post`, which then is one copy."""
        entry = [(self.posted + 1) & _MASK, int(command), *words]
        entry += [0] * (15 - len(entry))
        return _WORDS.pack(*entry, abi.descriptor_check(entry))

    def post(self, line: bytes) -> int:
        """Returns the descriptor's sequence number."""
        self._view[self._next_line] = line  # first of all: the rest is done while the kernel reads it
        self.posted = (self.posted + 1) & _MASK
        self._next_line = _LINES[self.posted % abi.DESCRIPTOR_SLOTS]
        return self.posted


class Mailbox:
    """Both rings over a block of shared memory. Any thread may post; one thread polls."""

    def __init__(self, view: memoryview, layout: ArenaLayout):
        if len(view) < layout.nbytes:
            raise ValueError(f"a mailbox for {layout} needs {layout.nbytes} bytes: {len(view)} were given")
        self.layout = layout
        self.descriptors = DescriptorRing(view)
        self._rehearsed = DescriptorRing(memoryview(bytearray(_LINES[-1].stop)))
        self._view = view
        self._u4 = view.cast("I")
        self._acked = 0
        self._has_read(0)
        self._lock = threading.Lock()
        self._fence = threading.Lock()

    # ---------------------------------------------------------------------------------------- descriptors
    @property
    def unacknowledged(self) -> int:
        """Descriptors posted that the kernel has not taken yet."""
        return (self.descriptors.posted - self._acked) & _MASK

    def submit(
        self,
        *,
        request: int,
        slot: int,
        prompt: Sequence[int],
        pages: Sequence[int],
        stop: Sequence[int] = (),
        max_tokens: int,
        min_tokens: int = 0,
        cached_len: int = 0,
        sampling: Sampling | None = None,
    ) -> int | None:
        """Starts a request, at position `cached_len`. Returns the descriptor's sequence number, or None when the ring is full."""
        with self._lock:
            if self.unacknowledged >= abi.DESCRIPTOR_SLOTS:
                return None
            line = self.prepare_submit(request, slot, prompt, pages, stop, max_tokens, min_tokens, cached_len, sampling)
            return self.descriptors.post(line)

    def prepare_submit(
        self,
        request: int,
        slot: int,
        prompt: Sequence[int],
        pages: Sequence[int],
        stop: Sequence[int],
        max_tokens: int,
        min_tokens: int,
        cached_len: int = 0,
        sampling: Sampling | None = None,
    ) -> bytes:
        """Fills the slot's arena and makes the descriptor's line; see DescriptorRing.prepare."""
        words = [*prompt, *pages, *stop, *(sampling.words if sampling else ())]
        if slot >= self.layout.num_slots or len(words) > self.layout.region:
            raise ValueError(f"slot {slot} with {len(words)} words does not fit the arena of {self.layout}")
        arena = slot * self.layout.region
        struct.pack_into(f"{len(words)}I", self._view, _ARENA + 4 * arena, *words)
        self._order()
        draw = (sampling.draw, sampling.num_logprobs) if sampling else (abi.Draw.NONE, 0)
        counts = len(prompt), len(pages), len(stop)
        return self.descriptors.prepare(
            abi.Command.SUBMIT, request, slot, arena, *counts, max_tokens, min_tokens, cached_len, *draw, prompt[0], pages[0]
        )

    def cancel(self, request: int, slot: int) -> int | None:
        """Asks for the end of a request. Returns the sequence number, or None when the ring is full."""
        return self._command(abi.Command.CANCEL, request, slot)

    def noop(self) -> int | None:
        return self._command(abi.Command.NOOP)

    def shutdown(self) -> int | None:
        """Asks the kernels to return."""
        return self._command(abi.Command.SHUTDOWN)

    def _command(self, command: abi.Command, request: int = 0, slot: int = 0) -> int | None:
        with self._lock:
            if self.unacknowledged >= abi.DESCRIPTOR_SLOTS:
                return None
            return self.descriptors.post(self.descriptors.prepare(command, request, slot))

    def rehearse(self) -> None:
        """Posts where nobody reads. Who only looks for some milliseconds finds what it takes to post in no cache any more: a store of half
        a microsecond then takes ten. So who looks without a pause does this now and then."""
        self._rehearsed.post(self._rehearsed.prepare(abi.Command.NOOP))

    # ---------------------------------------------------------------------------------------- records
    def await_record(self, looks: int) -> bool:
        """Whether there is something to `poll` within so many looks, each as short as Python can make it. Only tags are looked at."""
        words, last, tag = self._u4, self._next_last, self._next_tag
        for _ in range(looks):  # noqa: SIM110  a generator takes longer
            if (
                words[last] == tag and _TAGS.unpack_from(self._view, self._next_at) == self._next_tags
            ):  # most looks end at the last one
                return True
        return False

    def _has_read(self, sequence: int) -> None:
        """The last record's number; so which tag the next one has, and where it and the tag of its last word will be."""
        self._read = sequence
        self._next_tag = (sequence + 1) & _MASK
        self._next_at = _RECORDS + sequence % abi.RECORD_SLOTS * _RECORD.size
        self._next_tags = (self._next_tag,) * 8
        self._next_last = self._next_at // 4 + 15

    def _next_words(self) -> tuple[int, ...] | None:
        """The words of the next record, once all of them are its own."""
        a, b, c, d, e, f, g, h = words = _RECORD.unpack_from(self._view, self._next_at)
        its = self._next_tag == a >> 32 == b >> 32 == c >> 32 == d >> 32 == e >> 32 == f >> 32 == g >> 32 == h >> 32
        return words if its else None

    def poll(self, limit: int = abi.RECORD_SLOTS) -> list[RecordEntry]:
        """The records that have come since, at most `limit`, oldest first; acknowledgements are counted on the way."""
        found = []
        while len(found) < limit and (words := self._next_words()):
            record = RecordEntry.of(words)
            if record.kind == abi.Record.ACK:
                self._acked = record.token
            found.append(record)
            self._has_read(record.sequence)
        if found:
            self._order()  # the records are copied before their places are given back, and a slot's arena after its RELEASE
            self._u4[_READ] = self._read
        return found

    def _order(self) -> None:
        """Everything before comes before everything after. Taking a lock only holds back what follows, and releasing it what went before;
        so it is the release and the second taking, in this order, that nothing passes."""
        for _ in range(2):
            with self._fence:
                pass

    # ---------------------------------------------------------------------------------------- header
    def beat(self, value: int) -> None:
        """Shows the kernel that the host lives: any value other than the last."""
        self._u4[_HEARTBEAT] = value & _MASK

    def stop(self) -> None:
        """Asks every rank to abort at once; there is no way back."""
        self._u4[_STOP] = 1

    @property
    def stopped(self) -> bool:
        return self._u4[_STOP] != 0

    @property
    def resident(self) -> int:
        """0 before the kernel polls, 1 while it does, 2 after it returned."""
        return self._u4[_RESIDENT]

    @property
    def steps(self) -> int:
        return self._u4[_STEPS]

    def close(self) -> None:
        """Lets go of the memory. No thread may use the mailbox any more."""
        self._u4.release()
