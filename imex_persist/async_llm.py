"""AsyncLLM: an LLM for asyncio, with the calls of vLLM's. Requests run in the resident kernel; nothing here blocks the event loop.

The engine's one thread hands events over in bunches: it appends to a deque and asks the loop once to look at it. There is no thread and
no poll for each request. Prompts are made into tokens in the loop's thread pool; text is made of tokens in the loop, some ten µs each.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterable

from imex_persist.config import EngineConfig
from imex_persist.errors import ImexError
from imex_persist.llm import LLM
from imex_persist.model.load import Model
from imex_persist.outputs import RequestOutput
from imex_persist.runtime import inputs
from imex_persist.runtime.completion import Completion
from imex_persist.runtime.engine import Engine
from imex_persist.runtime.request import Event
from imex_persist.sampling_params import RequestOutputKind, SamplingParams


class AsyncLLM:
    """A running engine. Use it as an asynchronous context manager, or call `shutdown()`.

    Arguments and errors are LLM's; like it the constructor returns when the kernel is resident, and blocks until then. It may be used from
    one event loop after another.
    """

    def __init__(self, model: str, **settings):
        self._llm = LLM(model, **settings)
        self._streams: dict[str, _Stream] = {}
        self._post: _Post | None = None

    async def generate(
        self, prompt: inputs.Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields a RequestOutput when there are new tokens; the last has a finish reason. `sampling_params.output_kind` says whether
        each holds everything so far or what is new. A slow reader gets several tokens at once.

        The prompt is what LLM.generate takes, one of it. Closing or dropping the iterator, or cancelling its task, cancels the request.
        Raises ValueError for bad input and for a `request_id` that is running, FaultError when the ranks end.
        """
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if request_id in self._streams:
            raise ValueError(f"request_id {request_id!r} is that of a running request: choose another, or none")
        loop = asyncio.get_running_loop()
        if self._post is None or self._post.loop is not loop:
            self._post = _Post(loop)
        stream = self._streams[request_id] = _Stream(self.engine)
        try:
            await self._submit(stream, request_id, prompt, sampling_params, self._post)
            kind = stream.completion.params.output_kind
            while not stream.completion.finished:
                await stream.wait()
                if stream.completion.finished or (stream.completion.news and kind != RequestOutputKind.FINAL_ONLY):
                    yield stream.completion.take(delta=kind == RequestOutputKind.DELTA)
        finally:
            del self._streams[request_id]
            stream.cancel()

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends running requests early: their iterators end with finish reason "abort". Unknown ids are ignored: those have ended."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            if one in self._streams:
                self._streams[one].cancel()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until every request has ended and its slot and pages are free; False if it takes longer than `timeout_s`."""
        return await asyncio.to_thread(self.engine.drain, timeout_s)

    def shutdown(self) -> None:
        """Ends all requests, the kernel and the processes; iterators end with finish reason "abort". May be called twice."""
        self._llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_exc) -> None:
        await asyncio.to_thread(self.shutdown)

    @property
    def engine(self) -> Engine:
        return self._llm.engine

    @property
    def model(self) -> Model:
        return self._llm.model

    @property
    def config(self) -> EngineConfig:
        return self._llm.config

    @property
    def max_model_len(self) -> int:
        return self._llm.max_model_len

    async def _submit(self, stream: _Stream, request_id: str, prompt: inputs.Prompt, params, post: _Post) -> None:
        prepared = await asyncio.to_thread(self._llm._prepare_one, prompt, params)
        ((text, submission),), (params,) = prepared
        request = self.engine.submit(submission, lambda event: post.put(stream, event))
        # events are looked at when this function has returned to the loop, so the completion is there for the first
        stream.completion = self._llm._completion(request, text, params, request_id)
        if stream.cancelled:  # while the prompt was prepared
            stream.cancel()


class _Stream:
    """One request on its way to its reader. All of it runs in the event loop."""

    def __init__(self, engine: Engine):
        self.completion: Completion | None = None  # once it is submitted
        self.cancelled = False
        self._engine = engine
        self._ready = asyncio.Event()
        self._error: Exception | None = None

    def take(self, event: Event) -> None:
        try:
            if isinstance(event, Exception):
                raise event
            self.completion.feed(event)
        except Exception as error:  # the reader's business, and no other stream's
            self._error = error
        self._ready.set()

    async def wait(self) -> None:
        """Until there is something new. Raises what ended the request."""
        await self._ready.wait()
        self._ready.clear()
        if isinstance(self._error, ImexError):
            raise type(self._error)(str(self._error)) from self._error  # one error may have ended many requests
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled = True
        if self.completion is not None:
            self._engine.cancel(self.completion.request)


class _Post:
    """Brings events from the engine's thread into one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._events: deque[tuple[_Stream, Event]] = deque()
        self._asked = False

    def put(self, stream: _Stream, event: Event) -> None:
        """In the engine's thread."""
        self._events.append((stream, event))
        if self._asked:
            return
        self._asked = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody will read this
            self._asked = False
            stream.cancel()

    def _deliver(self) -> None:
        self._asked = False  # first: what is appended from now on asks again
        while self._events:
            stream, event = self._events.popleft()
            stream.take(event)
