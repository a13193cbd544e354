"""The engine: keeps requests in the mailbox and hands their tokens out. One thread writes all descriptors and reads all records.

A request's life: `submit` puts it in the inbox; the engine's thread appends it to the queue; when a slot and all its pages are free, in
order of arrival, its descriptor is posted; TOKEN records become events; RELEASE gives slot, pages and arena back. Other threads only
append to the inbox, so an interrupt in the middle of a user's call leaves the rings whole.

What a page may be kept for (pages.py) the token records say: a token was sampled after its row and all rows before it were computed. So
with n prompt tokens and k records the first n + k - 1 positions are in the pages. What lies beyond, a ghost's position or those of a
prompt that was cancelled before its first token, is never reused.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

from imex_persist import abi
from imex_persist.errors import ImexError, RingFullError
from imex_persist.runtime.allocator import FreeList, pages_needed
from imex_persist.runtime.mailbox import Mailbox, RecordEntry
from imex_persist.runtime.pages import PagePool
from imex_persist.runtime.request import FINISH_REASONS, Request, Sink, Submission, TokenEvent

SPIN_S = 50e-6  # first pause between two looks at an empty record ring
PAUSE_S = 500e-6  # longest
REST_S = 0.5  # between two looks when there is nothing to do: an interrupt in `_send` may have left a request and woken nobody
LEAVE_S = 2.0  # for cancelled requests to be released while closing
SILENCE_S = 1.0  # without a record or a step: time to ask the workers whether their kernels run


class Engine:
    """`num_slots`, `num_pages` and `page_size` are the Shape's; `on_silence` is called when the kernel has been quiet for long;
    `share_pages` lets a request begin with pages that earlier ones have filled with the same tokens.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        on_silence: Callable[[], None] | None = None,
        share_pages: bool = True,
    ):
        self.page_size, self.max_model_len, self.num_pages = page_size, max_model_len, num_pages
        self._mailbox = mailbox
        self._on_silence = on_silence
        self._share_pages = share_pages
        self.num_prompt_tokens = self.num_cached_tokens = 0  # of all admitted requests
        self._slots = FreeList(num_slots, "slot")
        self._pages = PagePool(num_pages, page_size)
        self._ids = itertools.count(1)
        self._inbox: deque[tuple[str, Request]] = deque()
        self._queue: deque[Request] = deque()  # not admitted yet
        self._resident: dict[int, Request] = {}  # descriptor posted, not released
        self._cancels: deque[Request] = deque()  # CANCEL not posted yet
        self._changed = False  # something has come or gone since `_pump` last looked
        self._error: Exception | None = None
        self._closing = False
        self._leave_by: float | None = None  # when closing stops waiting for the kernel
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()  # starting the thread, and no request in the inbox after the end
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------------------- any thread
    def check(self, submission: Submission) -> None:
        """Raises ValueError for a request that could never run, before anything is written."""
        length, limit = len(submission.prompt_token_ids), self.max_model_len
        if not length:
            raise ValueError("the prompt has no tokens: give at least one")
        if length + 1 > limit:
            raise ValueError(
                f"the prompt has {length} tokens: at most {limit - 1} fit max_model_len {limit} with one token to generate"
            )
        if length + submission.max_tokens > limit:
            raise ValueError(
                f"the prompt has {length} tokens and max_tokens is {submission.max_tokens}: together at most max_model_len {limit}"
            )
        if len(submission.stop_token_ids) > abi.MAX_STOP_IDS:
            raise ValueError(
                f"{len(submission.stop_token_ids)} stop tokens, EOS included: at most {abi.MAX_STOP_IDS} are allowed"
            )
        need = pages_needed(length, submission.max_tokens, self.page_size)
        if need > self.num_pages:
            raise ValueError(
                f"the request needs {need} KV pages but there are {self.num_pages}: lower max_tokens or raise the KV cache"
            )

    def submit(self, submission: Submission, sink: Sink | None = None, *, wait: bool = True) -> Request:
        """Queues a request. Its events go to `sink` (called in the engine's thread; it must not block), else to `Request.events`.

        Where the descriptor ring is full, since the kernel takes none just now, it waits in the queue; with `wait=False` that raises
        RingFullError instead. Raises ValueError for a request that could never run and the group's error once it has ended.
        """
        self.check(submission)
        if not wait and self._mailbox.unacknowledged >= abi.DESCRIPTOR_SLOTS:
            raise RingFullError(
                f"the kernel has not taken the last {abi.DESCRIPTOR_SLOTS} descriptors yet: try again later, or submit with wait=True"
            )
        request = Request(next(self._ids) & 0xFFFFFFFF, submission, sink)
        self._send(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request early: it gets an "abort" event, unless it has ended by then. Returns at once.

        Takes no lock and wakes nobody, since the garbage collector may call it in the middle of whatever holds one: while a request has
        not ended, the engine looks into its inbox every PAUSE_S at least.
        """
        if not request.finished:
            self._inbox.append(("cancel", request))

    def fail(self, error: Exception) -> None:
        """Ends every request with `error`, after the tokens that are in the ring. For the group's watching thread."""
        with self._lock:
            self._error = self._error or error
            self._wake.set()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until every request has ended and everything is free; False if it takes longer than `timeout_s`."""
        return self._idle.wait(timeout_s)

    def close(self) -> None:
        """Ends every request with "abort", cancels them in the kernel, and ends the thread; shutting down is the group's business."""
        with self._lock:
            self._closing = True
            self._wake.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def num_running(self) -> int:
        return sum(not r.finished for r in list(self._resident.values()))

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def free_pages(self) -> int:
        """Pages that no resident request holds, those kept for their contents included."""
        return len(self._pages)

    @property
    def kept_pages(self) -> int:
        return self._pages.num_kept

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def _send(self, request: Request) -> None:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise ImexError("the engine is closed: make a new LLM")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="imex-engine", daemon=True)
                self._thread.start()
            self._idle.clear()
            self._inbox.append(("submit", request))
            self._wake.set()

    # ---------------------------------------------------------------------------------------- the engine's thread
    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # a bug of ours, or a sink's: nobody may wait for ever because of it
            self._error = self._error or error
            self._end_all(error)
            raise

    def _loop(self) -> None:
        pause, heard, steps = SPIN_S, time.monotonic(), -1
        while True:
            self._wake.clear()  # before the inbox is looked at: what comes later sets it again
            if self._inbox:
                self._take_inbox()
            records = self._mailbox.poll()
            for record in records:
                self._record(record)
            if self._changed:
                self._pump()
            if self._error is not None and not records:
                return self._end_all(self._error)
            if self._closing and self._leave():
                return self._end_all(None)
            if records or self._inbox:
                pause, heard = SPIN_S, time.monotonic()
            elif self._resident or self._queue or self._cancels or self._closing:
                if time.monotonic() - heard > SILENCE_S:
                    heard = time.monotonic()
                    if self._mailbox.steps == steps and self._on_silence is not None:
                        self._on_silence()
                    steps = self._mailbox.steps
                self._wake.wait(pause)  # so that a request leaves at once
                pause = min(PAUSE_S, pause * 1.5)
            else:
                self._rest()
                heard = time.monotonic()

    def _leave(self) -> bool:
        """While closing: everything resident is cancelled, since SHUTDOWN waits for free slots. True once all are, or it takes too long."""
        if self._leave_by is None:
            self._leave_by = time.monotonic() + LEAVE_S
            for request in [*self._queue, *self._resident.values()]:
                self._end(request, "abort")
            self._queue.clear()
            self._cancels.extend(r for r in self._resident.values() if not r.cancelled)
            self._changed = True
        return not self._resident or time.monotonic() > self._leave_by

    def _rest(self) -> None:
        """Nothing to do: sleeps until another thread has something."""
        with self._lock:
            if not self._inbox and self._error is None and not self._closing:
                self._idle.set()
        self._wake.wait(REST_S)

    def _take_inbox(self) -> None:
        while self._inbox:
            what, request = self._inbox.popleft()
            if what == "submit":
                self._queue.append(request)
            elif request.finished or request.cancelled:
                pass
            elif request.slot < 0:
                self._queue.remove(request)
                self._end(request, "abort")
            else:
                request.cancelled = True
                self._cancels.append(request)
            self._changed = True

    def _pump(self) -> None:
        """Posts what can be posted: cancels first, then requests in order of arrival as long as the first of them fits."""
        self._changed = False
        while self._cancels:
            request = self._cancels[0]
            if request.id in self._resident and self._mailbox.cancel(request.id, request.slot) is None:
                return
            self._cancels.popleft()
        while self._queue and self._admit(self._queue[0]):
            self._queue.popleft()

    def _admit(self, request: Request) -> bool:
        s = request.submission
        if not len(self._slots) or self._mailbox.unacknowledged >= abi.DESCRIPTOR_SLOTS:
            return False
        share = self._share_pages and not s.needs_whole_prompt
        request.reservation = self._pages.reserve(s.prompt_token_ids, s.max_tokens, share=share)
        if request.reservation is None:
            return False
        (request.slot,) = self._slots.take(1)
        request.num_cached_tokens = request.reservation.cached_len
        self.num_prompt_tokens += len(s.prompt_token_ids)
        self.num_cached_tokens += request.num_cached_tokens
        self._resident[request.id] = request
        posted = self._mailbox.submit(
            request=request.id,
            slot=request.slot,
            prompt=s.prompt_token_ids,
            pages=request.reservation.pages,
            stop=s.stop_token_ids,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            cached_len=request.num_cached_tokens,
            sampling=s.sampling,
        )
        assert posted is not None, "the ring had room, and only this thread posts"
        return True

    def _record(self, record: RecordEntry) -> None:
        self._changed |= record.kind not in (abi.Record.TOKEN, abi.Record.LOGPROB)  # room in the ring, or free resources
        request = self._resident.get(record.request)
        if request is None:
            return
        if record.kind == abi.Record.ACK:
            request.seen_device_ns = request.seen_device_ns or record.time_ns
        elif record.kind == abi.Record.LOGPROB:
            request.logprobs.append((record.token, record.finish_float, record.index))
        elif record.kind == abi.Record.TOKEN:
            reason = FINISH_REASONS.get(record.finish)
            cancelled = record.finish == abi.Finish.CANCELLED  # carries no token of its own
            if not cancelled:
                request.generated.append(record.token)
                if len(request.generated) == 1 and self._share_pages:  # all of the prompt is in the pages
                    self._pages.keep(request.reservation, request.submission.prompt_token_ids)
            token, logprobs = None if cancelled else record.token, tuple(request.logprobs)
            request.logprobs.clear()
            request.tell(TokenEvent(token, reason, record.time_ns, time.perf_counter(), logprobs))
        elif record.kind == abi.Record.RELEASE:
            self._end(request, "abort")  # says nothing if the request has its reason already
            del self._resident[request.id]
            self._slots.give([request.slot])
            self._pages.release(request.reservation, request.confirmed if self._share_pages else ())

    def _end(self, request: Request, reason: str) -> None:
        request.tell(TokenEvent(None, reason, 0, time.perf_counter()))

    def _end_all(self, error: Exception | None) -> None:
        waiting = []
        with self._lock:  # from here on _send raises
            while self._inbox:  # `cancel` may append meanwhile
                what, request = self._inbox.popleft()
                waiting += [request] if what == "submit" else []
        for request in [*self._resident.values(), *self._queue, *waiting]:
            if error is not None:
                request.tell(error)
            else:
                self._end(request, "abort")
        self._queue.clear()
        self._idle.set()
