"""LLM: a model, its ranks and their resident kernel, with vLLM's calls. Everything heavy happens in `__init__` and in child processes."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from functools import partial

import numpy as np

from imex_persist.config import DEFAULT_DEADLINE_S, MEASURED, EngineConfig
from imex_persist.errors import ImexError
from imex_persist.log import log, warn
from imex_persist.model.load import load_model
from imex_persist.outputs import RequestOutput
from imex_persist.runtime import capacity, inputs, startup, strategy, weights
from imex_persist.runtime.completion import Completion, CompletionStream, grouped
from imex_persist.runtime.dropping import Ending
from imex_persist.runtime.engine import Engine
from imex_persist.runtime.group import Group
from imex_persist.runtime.peers import check_peers
from imex_persist.runtime.placement import place_ranks
from imex_persist.runtime.request import Event, Request, Sink
from imex_persist.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class LLM:
    """A running engine. Use it as a context manager, or call `close()`.

    Keyword arguments are those of `imex_persist.config.EngineConfig`. Raises ValueError for bad settings, DeviceError for a machine that
    cannot run them, FaultError when the ranks do not come up; nothing is left running then.
    """

    def __init__(self, model: str, **settings):
        self.config = EngineConfig(model=model, **settings)
        placement = place_ranks(self.config.device, self.config.tensor_parallel_size)
        startup.check_environment(placement)
        check_peers(self.config.p2p_level, placement)
        self.model = load_model(self.config.model, self.config.load_format, seed=self.config.seed)
        self.max_model_len = capacity.choose_max_model_len(self.config, self.model.config, placement.kind)
        if placement.warning:
            warn(placement.warning)
        deadline_s = self.config.deadline_s or DEFAULT_DEADLINE_S[placement.kind]
        self.group = Group(placement, deadline_s=deadline_s)
        try:
            machine = capacity.shared_machine(self.group.open(), len(placement.places[0].ranks))
            shapes = self._shapes(machine, placement.kind)
            known = strategy.remembered(self.group, shapes)
            shapes = shapes if known is None else [known]
            with startup.progress_bar(self.config.tensor_parallel_size) as progress:
                self.group.prepare(shapes, weights.spec(self.config), self.max_model_len, progress)
            self.shape = strategy.measure(self.group, shapes, self.max_model_len) if known is None else known
            mailbox = self.group.start(next(i for i, shape in enumerate(shapes) if shape is self.shape))
            self._engine = Engine(
                mailbox,
                num_slots=int(self.shape["num_slots"]),
                num_pages=int(self.shape["num_pages"]),
                page_size=int(self.shape["page_size"]),
                max_model_len=self.max_model_len,
                on_silence=self.group.probe,
                share_pages=self.config.enable_prefix_caching,
            )
            self.group.on_fault(self._engine.fail)
        except BaseException:
            self.group.close()
            raise
        self._ending = Ending(self, partial(_end, self._engine, self.group))
        for line in startup.lines(self.shape, self.group, capacity.fixed_bytes(self.model.config, self.shape)):
            log(line)

    # ---------------------------------------------------------------------------------------- vLLM's calls
    def generate(
        self, prompts: inputs.Prompts, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes one prompt or several; results are in the order of the prompts.

        A prompt is a string, a list of token ids, or {"prompt": …} or {"prompt_token_ids": …}. Without `sampling_params` decoding is
        greedy; a model's generation_config.json says where to end, its other defaults are not applied.

        Raises ValueError for bad input before anything runs, FaultError (with `outputs`, what there is) if the ranks end.
        """
        return self._complete(*self._prepare(prompts, sampling_params))

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several: lists of {"role": …, "content": …}, rendered with the model's own template."""
        return self.generate(self._render(messages), sampling_params)

    def stream(self, prompt: inputs.Prompt, sampling_params: SamplingParams | None = None) -> CompletionStream:
        """Yields what is new after every token; the last has a finish reason. Dropping the iterator cancels the request."""
        ((text, submission),), (params,) = self._prepare_one(prompt, sampling_params)
        request = self._engine.submit(submission)
        return CompletionStream(self._completion(request, text, params))

    def stream_chat(self, messages: Sequence[dict], sampling_params: SamplingParams | None = None) -> CompletionStream:
        """`stream` for one conversation."""
        (prompt,) = self._render(messages)
        return self.stream(prompt, sampling_params)

    # ---------------------------------------------------------------------------------------- life
    def close(self) -> None:
        """Ends all requests, the kernel and the processes. May be called twice."""
        self._ending()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """For front ends: submit, cancel, drain."""
        return self._engine

    # ---------------------------------------------------------------------------------------- inside
    def _shapes(self, machine, kind: str) -> list[np.void]:
        """The shape; or several, the planned one first, if how ranks exchange is to be measured."""
        free = self.group.free_bytes if kind == "cuda" else None  # the simulator's is everybody's

        def make(**fixed) -> np.void:
            return capacity.choose_shape(self.config, self.model.config, machine, kind, free, **fixed)

        plan, given = make(), self.config.exchange
        self.group.strategy_source = "planned" if self.config.strategy is None else "set"
        asked = given == MEASURED or (given is None and kind == "cuda")  # the simulator's times say nothing
        if not asked or self.config.tensor_parallel_size == 1 or self.max_model_len < strategy.LEAST_LEN:
            return [plan]
        shapes = strategy.candidates(plan, make)
        self.group.strategy_source = "measured" if len(shapes) > 1 else "planned"
        return shapes

    def _prepare(self, given: inputs.Prompts, sampling_params) -> tuple[list, list[SamplingParams]]:
        """([(text or None, Submission)], params), all validated before anything is submitted; n of each prompt."""
        prompts = inputs.as_list(given)
        params = inputs.params_for(prompts, sampling_params, GREEDY)
        prompts, params = inputs.repeated(prompts, params)
        prepared = []
        for prompt, one in zip(prompts, params, strict=True):
            if one.stop and self.model.tokenizer is None:
                raise ValueError(f"stop is {one.stop!r} but the model has no tokenizer: use stop_token_ids")
            text, ids = inputs.to_ids(prompt, self.model)
            submission = inputs.submission(ids, one, self.model.eos_token_ids, self.max_model_len, self.model.config.vocab_size)
            self._engine.check(submission)
            prepared.append((text, submission))
        return prepared, params

    def _prepare_one(self, prompt: inputs.Prompt, given) -> tuple[list, list[SamplingParams]]:
        """`_prepare` for a stream. Raises ValueError also for n above 1."""
        (params,) = inputs.params_for([prompt], given, GREEDY)
        if params.n > 1:
            raise ValueError(f"n is {params.n}: a stream has one completion; use generate, or several streams")
        return self._prepare([prompt], params)

    def _render(self, messages) -> list[dict]:
        conversations = inputs.as_conversations(messages)
        return [inputs.render_chat(conversation, self.model) for conversation in conversations]

    def _complete(self, prepared: list, params: list[SamplingParams]) -> list[RequestOutput]:
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()  # of all requests: stop strings are found in time
        completions: list[Completion] = []
        try:
            for i, ((text, submission), one) in enumerate(zip(prepared, params, strict=True)):
                request = self._engine.submit(submission, _tagged(events, i))
                completions.append(self._completion(request, text, one))
            while not all(completion.finished for completion in completions):
                i, event = events.get()
                if isinstance(event, Exception):
                    raise event
                completions[i].feed(event)
        except ImexError as error:
            again = type(error)(str(error))
            again.outputs = grouped(completions)
            raise again from error
        finally:
            for completion in completions:
                if not completion.finished:
                    self._engine.cancel(completion.request)
        return grouped(completions)

    def _completion(
        self, request: Request, text: str | None, params: SamplingParams, request_id: str | None = None
    ) -> Completion:
        tokenizer = self.model.tokenizer
        detokenizer = tokenizer and tokenizer.detokenizer(params.skip_special_tokens)
        return Completion(request, text, params, detokenizer, self._engine.cancel, request_id)


def _tagged(events: queue.SimpleQueue, index: int) -> Sink:
    return lambda event: events.put((index, event))


def _end(engine: Engine, group: Group) -> None:
    try:
        engine.close()
    finally:
        group.close()
