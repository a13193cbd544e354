"""From a request's events to what the user gets: text, token ids, reasons and times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from imex_persist.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamOutput
from imex_persist.runtime.request import Request, TokenEvent
from imex_persist.runtime.text import Detokenizer, TextStream
from imex_persist.sampling_params import SamplingParams


class Completion:
    """Grows with `feed`; `cancel` is called once when a stop string was found, since the kernel does not know strings."""

    def __init__(
        self,
        request: Request,
        prompt: str | None,
        params: SamplingParams,
        detokenizer: Detokenizer | None,
        cancel: Callable[[Request], None],
        request_id: str | None = None,
    ):
        self.request = request
        self.request_id = request_id or str(request.id)
        self.prompt = prompt
        self.output = CompletionOutput(0, "", [])
        self.metrics = RequestMetrics(request.arrival)
        self.params = params
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._detokenizer = detokenizer
        self._cancel = cancel
        self._prompt_token_ids = list(request.submission.prompt_token_ids)
        self._taken = 0, 0  # tokens and characters that `take` has given
        self._text = detokenizer and TextStream(detokenizer, stop=params.stop, include_stop=params.include_stop_str_in_output)

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def feed(self, event: TokenEvent) -> StreamOutput:
        """Takes one event and returns what is new. After the end nothing is."""
        out = self.output
        if self.finished:
            return StreamOutput("", ())
        delta, ids, logprobs = "", (), ()
        if event.token is not None:
            ids = (event.token,)
            out.token_ids.append(event.token)
            self._time(event)
            if out.logprobs is not None:
                logprobs = (self._logprobs(event),)
                out.logprobs.extend(logprobs)
                out.cumulative_logprob += logprobs[0][event.token].logprob
            delta = self._show(event)
        out.finish_reason = event.finish_reason
        if self._text is not None:
            if self.finished:
                delta += self._text.finish()
            if self._text.stop_string is not None:
                if not self.finished:
                    self._cancel(self.request)
                out.finish_reason, out.stop_reason = "stop", self._text.stop_string
            out.text = self._text.text
        return StreamOutput(delta, ids, out.finish_reason, out.stop_reason, logprobs)

    def cancel(self) -> None:
        """Ends the request if it still runs."""
        if not self.request.finished:
            self._cancel(self.request)

    def result(self) -> RequestOutput:
        """Everything so far; it grows with what is fed."""
        return self._output(self.output)

    def take(self, *, delta: bool) -> RequestOutput:
        """A RequestOutput that stays as it is: everything so far, or with `delta` what came since the last one taken."""
        out, (tokens, characters) = self.output, self._taken if delta else (0, 0)
        self._taken = len(out.token_ids), len(out.text)
        logprobs = None if out.logprobs is None else out.logprobs[tokens:]
        return self._output(replace(out, text=out.text[characters:], token_ids=out.token_ids[tokens:], logprobs=logprobs))

    @property
    def news(self) -> bool:
        """Whether a token has come since the last `take`."""
        return len(self.output.token_ids) > self._taken[0]

    def _output(self, completion: CompletionOutput) -> RequestOutput:
        return RequestOutput(
            self.request_id, self.prompt, self._prompt_token_ids, [completion], self.finished, self.metrics,
            self.request.num_cached_tokens,
        )  # fmt: skip

    def _show(self, event: TokenEvent) -> str:
        stopped = event.finish_reason == "stop"  # by this token: its text is not part of the answer
        if stopped and event.token in self.params.stop_token_ids:
            self.output.stop_reason = event.token
        if self._text is None or (stopped and not self.params.include_stop_str_in_output):
            return ""
        return self._text.push(event.token, look_for_stop=len(self.output.token_ids) > self.params.min_tokens)

    def _logprobs(self, event: TokenEvent) -> dict[int, Logprob]:
        """The token's own first; of the others it may be one."""
        decoded = self._detokenizer.decode_one if self._detokenizer is not None else lambda _token: None
        found: dict[int, Logprob] = {}
        for token, logprob, rank in event.logprobs:
            if token not in found:
                found[token] = Logprob(logprob, rank, decoded(token))
        return found

    def _time(self, event: TokenEvent) -> None:
        m = self.metrics
        m.first_token_time = m.first_token_time or event.host_time
        m.last_token_time = event.host_time
        m.device_time_ns.append(event.device_time_ns)


def grouped(completions: Sequence[Completion]) -> list[RequestOutput]:
    """One RequestOutput a prompt from the completions of all, n of each."""
    outputs, rest = [], list(completions)
    while rest:
        mine, rest = rest[: rest[0].params.n], rest[rest[0].params.n :]
        output = mine[0].result()
        for i, other in enumerate(mine[1:], 1):
            other.output.index = i
            output.outputs.append(other.output)
            output.finished &= other.finished
        outputs.append(output)
    return outputs


class CompletionStream:
    """Iterates over a running completion's StreamOutputs; the last has a finish reason. Closing or dropping it cancels the request."""

    def __init__(self, completion: Completion):
        self._completion = completion
        self._events = iter(completion.request)

    def __iter__(self) -> CompletionStream:
        return self

    def __next__(self) -> StreamOutput:
        """Raises FaultError when the ranks have ended."""
        if self._completion.finished:
            raise StopIteration
        return self._completion.feed(next(self._events))

    @property
    def result(self) -> RequestOutput:
        """What has been generated so far."""
        return self._completion.result()

    @property
    def request(self) -> Request:
        return self._completion.request

    def close(self) -> None:
        self._completion.cancel()

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
