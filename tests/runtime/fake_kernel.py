"""The kernel's side of the mailbox in Python, for tests: echoes made-up tokens and checks what the host promises.

Token i of a request is `token_of(prompt, i)`. One `step` gives every running request one token. Slots, pages and arena regions that a
living request holds may not be handed out again: that is asserted here, where the kernel would silently go wrong.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np

from imex_persist import abi


def token_of(prompt, index: int) -> int:
    return (sum(prompt) * 7 + index * 13) % 997 + 2


@dataclass
class Running:
    request: int
    slot: int
    prompt: list[int]
    pages: list[int]
    stop: list[int]
    max_tokens: int
    min_tokens: int
    region: range
    cached_len: int
    generated: list[int] = field(default_factory=list)
    emitted: int = 0
    finish: int = 0


class FakeKernel:
    def __init__(self, view: memoryview, num_slots: int, num_pages: int, page_size: int, step_s: float = 0.0):
        box = np.frombuffer(view, abi.Mailbox, 1)[0]
        self.header, self.descriptors, self.records = box["header"], box["descriptors"], box["records"]
        self.arena = np.frombuffer(view, np.uint32, offset=abi.Mailbox.itemsize)
        self.num_slots, self.num_pages, self.page_size, self.step_s = num_slots, num_pages, page_size, step_s
        self.running: dict[int, Running] = {}
        self.contents: dict[int, tuple[int, ...]] = {}  # of each page that was filled: the tokens up to its end
        self.expected, self.next_record = 1, 1
        self.commands: list[int] = []
        self.max_running = 0
        self.paused = threading.Event()  # tests: no steps, no descriptors taken
        self.problem: BaseException | None = None
        self.fault: np.ndarray | None = None  # tests: what to report at the next step, in this FaultRecord
        self.thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------------------- rings
    def room(self) -> int:
        return abi.RECORD_SLOTS - (self.next_record - 1 - int(self.header["records_read"]))

    def write(self, kind, request, token=0, index=0, finish=0) -> None:
        assert self.room() > 0
        now = time.monotonic_ns()
        self.put_record(self.next_record, (kind, request, token, index, finish, 0, now & 0xFFFFFFFF, now >> 32))
        self.next_record += 1

    def put_record(self, sequence: int, payloads) -> None:
        """Eight words, each with its tag, the last first: the host may count on no order."""
        words = self.records[(sequence - 1) % abi.RECORD_SLOTS : (sequence - 1) % abi.RECORD_SLOTS + 1].view(np.uint64)
        for i, payload in reversed(list(enumerate(payloads))):
            words[i] = sequence << 32 | payload

    def take(self) -> int | None:
        """The next descriptor's command, or None."""
        d = self.descriptors[(self.expected - 1) % abi.DESCRIPTOR_SLOTS].copy()
        words = np.array([d]).view(np.uint32).tolist()
        if words[0] != self.expected or words[15] != abi.descriptor_check(words[:15]):
            return None
        self.expected += 1
        command = int(d["command"])
        self.commands.append(command)
        if command == abi.Command.SUBMIT:
            self.admit(d)
        elif command == abi.Command.CANCEL:
            for r in list(self.running.values()):
                if r.request == d["request"]:
                    r.finish = int(abi.Finish.CANCELLED)
        self.write(abi.Record.ACK, int(d["request"]), int(d["sequence"]))
        return command

    def admit(self, d) -> None:
        at, n, p, s = (int(d[k]) for k in ("arena", "prompt_len", "num_pages", "num_stop"))
        words = self.arena[at : at + n + p + s].tolist()
        r = Running(
            request=int(d["request"]),
            slot=int(d["slot"]),
            prompt=words[:n],
            pages=words[n : n + p],
            stop=words[n + p :],
            max_tokens=int(d["max_tokens"]),
            min_tokens=int(d["min_tokens"]),
            region=range(at, at + n + p + s),
            cached_len=int(d["cached_len"]),
        )
        assert (d["first_token"], d["first_page"]) == (r.prompt[0], r.pages[0]), "a line that differs from the arena"
        assert r.slot < self.num_slots and r.slot not in self.running, f"slot {r.slot} is taken"
        assert len(r.pages) * self.page_size >= n + r.max_tokens, "too few pages"
        assert len(set(r.pages)) == p and all(page < self.num_pages for page in r.pages)
        shared, own = r.pages[: r.cached_len // self.page_size], r.pages[r.cached_len // self.page_size :]
        assert r.cached_len % self.page_size == 0 and r.cached_len < n, "a prompt's last position is always computed"
        for i, page in enumerate(shared):
            assert self.contents[page] == tuple(r.prompt[: (i + 1) * self.page_size]), "a shared page has other tokens"
        for page in own:
            self.contents.pop(page, None)
        for other in self.running.values():
            assert not set(other.pages) & set(own), "a page of a living request was handed out to be written"
            assert other.region.stop <= at or r.region.stop <= other.region.start, "arena regions overlap"
        self.running[r.slot] = r
        self.max_running = max(self.max_running, len(self.running))

    # ---------------------------------------------------------------------------------------- steps
    def step(self) -> bool:
        """One token for everybody; False when nobody runs or the ring is full."""
        if not self.running or self.room() < 4 * abi.MAX_SLOTS:
            return False
        for slot, r in list(self.running.items()):
            if r.finish:
                self.write(abi.Record.RELEASE, r.request, 0, r.emitted, r.finish)
                del self.running[slot]
                continue
            token = token_of(r.prompt, r.emitted)
            if token in r.stop and r.emitted >= r.min_tokens:
                r.finish = int(abi.Finish.STOP)
            elif r.emitted + 1 == r.max_tokens:
                r.finish = int(abi.Finish.LENGTH)
            self.fill(r)
            self.write(abi.Record.TOKEN, r.request, token, r.emitted, r.finish)
            r.generated.append(token)
            r.emitted += 1
        self.header["steps"] += 1
        return True

    def fill(self, r: Running) -> None:
        """All positions before the token to come are in the pages."""
        sequence = (*r.prompt, *r.generated)
        for i in range(r.cached_len // self.page_size, len(sequence) // self.page_size):
            self.contents[r.pages[i]] = sequence[: (i + 1) * self.page_size]

    def run(self) -> None:
        """Until SHUTDOWN or the stop word."""
        try:
            self.header["resident"] = 1
            while not self.header["stop"]:
                if self.fault is not None:
                    break
                if self.paused.is_set():
                    time.sleep(0.001)
                    continue
                command = self.take() if self.room() > 4 * abi.MAX_SLOTS else None
                if command == abi.Command.SHUTDOWN:
                    break
                if not self.step() and command is None:
                    time.sleep(0.0002)
                elif self.step_s:
                    time.sleep(self.step_s)
        except BaseException as error:
            self.problem = error
            raise
        finally:
            self.header["resident"] = 2

    def start(self) -> FakeKernel:
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def end(self) -> None:
        """Stops the thread and says what it found wrong."""
        self.header["stop"] = 1
        self.thread.join(5)
        assert not self.thread.is_alive()
        if self.problem:
            raise self.problem
