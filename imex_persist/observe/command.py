"""`imex-persist trace`: decodes a prompt with tracing on, shows it, and writes the pictures."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable

from imex_persist.log import log

DEFAULT_PROMPT = "What is the capital of France?"
DEFAULT_TOKENS = 32
PROMPT_STEPS = 16  # that the rings hold beside the tokens', if they may be so large
DRAW_S = 0.1  # between two looks at the rings


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Everything but the engine's options."""
    add = command.add_argument
    add("model", nargs="?", help="a Hugging Face folder, a GGUF file, or smollm2 (default $IMEX_MODEL)")
    add("--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="default: %(default)r")
    add("--max-tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help="tokens to generate (default %(default)s)")
    add("--ceiling", type=float, metavar="GB/S", help="memory bandwidth of a GPU, to set the achieved beside")
    add("--step", type=int, metavar="N", help="the step of the pictures (default: the typical one)")
    add("--layers", metavar="A-B", help="of them, layers A to B in the picture of --svg (default: all; arrows where few)")
    add("--json", action="store_true", help="print one JSON object with the same numbers")
    add("--out", metavar="FILE", help="write Chrome trace JSON, for ui.perfetto.dev")
    add("--html", metavar="FILE", help="write a page of one step, with zoom; it needs no network")
    add("--svg", metavar="FILE", help="write a picture of one step")
    add("--console", metavar="FILE", help="write what is shown here as a picture, SVG")


def run(args: argparse.Namespace, make_engine: Callable) -> int:
    """`make_engine(**more settings)` gives the LLM. Returns the exit code."""
    from imex_persist.model.load import load_model
    from imex_persist.observe.capture import Capture
    from imex_persist.observe.report import published, report, request_rows
    from imex_persist.observe.ring import ring_events

    check_outputs(args, "out", "html", "svg", "console")
    if args.max_tokens < 2:
        raise ValueError(f"--max-tokens is {args.max_tokens}: at least 2 are needed to time what lies between tokens")
    if args.ceiling is not None and args.ceiling <= 0:
        raise ValueError(f"--ceiling is {args.ceiling}: a positive number of GB/s is allowed")
    args.layers = _layers(args.layers)
    events = args.trace_events
    if not events:
        config = load_model(args.model, args.load_format, seed=args.seed, tokenizer=False).config
        events = ring_events(config.num_hidden_layers, -(-args.max_tokens // args.trace_every) + PROMPT_STEPS)
    with make_engine(trace_events=events) as llm:
        capture = Capture(llm)
        stream = start_stream(llm, args.prompt, args.max_tokens)
        with _live(args, stream) as live:
            follow(stream, capture, live)
        trace = capture.finish()
        requests = request_rows([stream.result], [stream.request.seen_device_ns])
    if not len(trace.spans):
        raise ValueError("no step was traced whole: raise --trace-events")
    times_ns = stream.result.metrics.device_time_ns
    ceiling, source = _ceiling(args.ceiling, llm.group.placement)
    numbers = report(
        trace, requests=requests, ceiling_gbs=ceiling, ceiling_source=source, published_us=published(trace, times_ns)
    )
    step = _picture_step(args, numbers, trace)
    _write(args, trace, step)
    if args.console:
        from imex_persist.observe.console import write_picture

        write_picture(numbers, _title(args, llm), args.console)
    if args.json:
        print(json.dumps({"model": args.model, "text": stream.result.outputs[0].text, **numbers}))
    else:
        from imex_persist.observe.console import show

        show(numbers, title=_title(args, llm))
    return 0


def check_outputs(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for one of these output options that cannot be written: before what takes minutes, not after it."""
    for name in names:
        path = getattr(args, name)
        if path and not os.path.isdir(folder := os.path.dirname(path) or "."):
            raise ValueError(
                f"--{name.replace('_', '-')} is {path!r}: {folder} is no folder here, make it first or name another"
            )
        if path and os.path.isdir(path):
            raise ValueError(f"--{name.replace('_', '-')} is {path!r}: that is a folder, name a file in it")


def _ceiling(given: float | None, placement) -> tuple[float | None, str | None]:
    """(GB/s, where the figure is from): what --ceiling says, else what is known of the first rank's card."""
    if given is not None or placement.kind != "cuda":
        return given, "--ceiling" if given else None
    from imex_persist.front.cards import known_card

    card = known_card(placement.places[0].name)
    if card is None:
        return None, None
    return card.bandwidth_tb_s * 1e3, f"{card.bandwidth_source}, {card.name}"


def start_stream(llm, prompt: str, max_tokens: int):
    """A greedy completion of exactly `max_tokens`; chat where the model has a template, token ids where it has no tokenizer."""
    from imex_persist.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    tokenizer = llm.model.tokenizer
    if tokenizer is None:
        return llm.stream([1 + i for i in range(8)], params)
    if tokenizer.chat_template is not None:
        return llm.stream_chat([{"role": "user", "content": prompt}], params)
    return llm.stream(prompt, params)


def follow(stream, capture, live=None) -> None:
    """Reads the stream to its end, draining the rings on the way; `live(trace of the new steps, token count)` after each look."""
    looked, tokens = 0.0, 0
    for new in stream:
        tokens += len(new.token_ids)
        capture.drain()
        if live is not None and time.monotonic() - looked > DRAW_S:
            live(capture.poll(), tokens)
            looked = time.monotonic()


@contextlib.contextmanager
def _live(args: argparse.Namespace, stream):
    """A live view on a terminal, nothing elsewhere."""
    if args.json or not sys.stdout.isatty():
        yield None
        return
    from imex_persist.observe.live import LiveView

    with LiveView(args.max_tokens) as view:
        yield view.update


def _picture_step(args: argparse.Namespace, numbers: dict, trace) -> int:
    if args.step is None:
        return numbers["critical_path"]["typical"]["step"]
    if args.step not in trace.steps:
        raise ValueError(f"--step is {args.step}: steps {trace.steps[0]} to {trace.steps[-1]} were traced")
    return args.step


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
        raise ValueError(f"--layers is {text!r}: a layer or two joined by a hyphen are allowed, for example 3-5")
    return int(first), int(last or first)


def _write(args: argparse.Namespace, trace, step: int) -> None:
    if args.out:
        from imex_persist.observe.chrome import steps_around, write_chrome

        steps = steps_around(trace, step)
        write_chrome(trace, args.out, steps)
        if len(steps) < len(trace.steps):
            log(f"{args.out} holds steps {steps[0]} to {steps[-1]} of {len(trace.steps)}, as many as viewers open")
    if args.html or args.svg:
        from imex_persist.observe import picture

        if args.html:
            picture.write_html(trace, step, args.html)
        if args.svg:
            picture.write_svg(trace, step, args.svg, args.layers)


def _title(args: argparse.Namespace, llm) -> str:
    ranks = llm.config.tensor_parallel_size
    return (
        f"{args.model}, {llm.group.placement.kind}, {ranks} rank{'s' * (ranks != 1)} of {int(llm.shape['num_blocks'])} blocks"
    )
