"""`imex-persist`: results on stdout, logs on stderr; exit codes 0 done, 1 fault, 2 bad input."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import imex_persist
from imex_persist.errors import DeviceError, ImexError

EXIT_DONE, EXIT_FAULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130
DEMO_QUESTION = "What is the capital of France?"
DEMO_TOKENS = 64
SAMPLING_OPTIONS = (  # of generate, by SamplingParams' names
    "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty logprobs max_tokens min_tokens ignore_eos stop"
).split()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        with _uninterrupted():
            from imex_persist.front import settings

            parser = _parser()
        try:
            args = parser.parse_args(argv)
        except SystemExit as error:  # argparse has said why
            return int(error.code or 0)
        settings.apply(args)
        code = args.run(args) or EXIT_DONE
        sys.stdout.flush()  # a full disk or a reader that has gone is found here, not when Python ends
        return code
    except (
        ValueError,
        DeviceError,
    ) as error:  # DeviceError: a machine that cannot do what was asked, found before anything ran
        return _fail(error, EXIT_BAD_INPUT)
    except ImexError as error:
        return _fail(error, EXIT_FAULT)
    except BrokenPipeError:  # `| head`: nobody reads on
        _let_output_go()
        return EXIT_DONE
    except OSError as error:  # a full disk, an output that cannot be written
        _let_output_go()
        return _fail(error, EXIT_FAULT)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _let_output_go() -> None:
    """What still cannot be written is dropped: else Python tries again as it ends, and says so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception, code: int) -> int:
    print(f"imex-persist: error: {error}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back while something heavy is imported: Python's import machinery swallows an interrupt at some moments."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _import_engine() -> None:
    with _uninterrupted():
        imex_persist.LLM, imex_persist.SamplingParams  # noqa: B018


# -------------------------------------------------------------------------------------------------- arguments
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imex-persist", description="LLM decoding in one persistent kernel per GPU.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"imex-persist {imex_persist.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_demo(commands)
    _add_trace(commands)
    _add_front(commands)
    _add_bench(commands)
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def _add_engine_options(command: argparse.ArgumentParser, **defaults) -> None:
    """The options of every command that starts an engine: a flag for each field of config.EngineConfig, and --config."""
    from imex_persist.front import settings

    settings.add_options(command, **defaults)


def _engine(args: argparse.Namespace, model: str, **more):
    from imex_persist.front import settings

    return imex_persist.LLM(model, **(settings.chosen(args) | more))


def _add_front(commands) -> None:
    from imex_persist.front import commands as front

    front.add_commands(lambda name, run, text: _command(commands, name, run, text))


def _add_bench(commands) -> None:
    from imex_persist.bench import command as bench

    text = "Times beside their bounds, and beside what others offer."
    group = commands.add_parser("bench", help=text, description=text, allow_abbrev=False)
    benches = group.add_subparsers(metavar="WHAT", required=True)
    bench.add_commands(lambda name, run, text: _command(benches, name, run, text))


# -------------------------------------------------------------------------------------------------- generate
def _add_generate(commands) -> None:
    command = _command(commands, "generate", _generate, "Complete a prompt, or several, and print the text.")
    add = command.add_argument
    add("model", nargs="?", help="a Hugging Face folder, a GGUF file, or smollm2 (default $IMEX_MODEL)")
    add("--prompt", action="append", metavar="TEXT", help="may be given several times")
    add("--prompt-token-ids", action="append", metavar="IDS", help="comma-separated token ids instead of text")
    add("--chat", action="store_true", help="the prompt is a user's message, put into the model's chat template")
    add("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate at most (default %(default)s)")
    add("--min-tokens", type=int, default=0, metavar="N")
    add("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    add("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0 (the default): all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable tokens that make up P together")
    add("--min-p", type=float, default=0.0, metavar="P", help="draw from tokens at least P times as probable as the first")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: less of what prompt and answer have")
    add("--presence-penalty", type=float, default=0.0, metavar="X", help="above 0: less of what the answer has")
    add("--frequency-penalty", type=float, default=0.0, metavar="X", help="above 0: less of what the answer has often")
    add("--logprobs", type=int, metavar="N", help="with --json: log-probabilities of the N most probable tokens, at most 20")
    add("--stop-token-ids", metavar="IDS", help="end at one of these token ids, comma-separated")
    add("--stop", action="append", metavar="TEXT", help="end at this text; may be given several times")
    add("--json", action="store_true", help="print one JSON object for each prompt instead of streaming text")
    _add_engine_options(command)


def _generate(args: argparse.Namespace) -> int:
    from imex_persist.front.settings import require_model

    _import_engine()
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs has no place beside streamed text: add --json")
    given = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    stop_token_ids = None if args.stop_token_ids is None else _ids(args.stop_token_ids, "--stop-token-ids")
    seed = None if args.sources["seed"] == "default" else args.seed
    params = imex_persist.SamplingParams(**given, stop_token_ids=stop_token_ids, seed=seed)
    prompts = _prompts(args)
    with _engine(args, require_model(args)) as llm:
        if args.json:
            outputs = llm.chat(prompts, params) if args.chat else llm.generate(prompts, params)
            for output in outputs:
                print(json.dumps(_as_json(output)))
        else:
            for prompt in prompts:
                stream = llm.stream_chat(prompt, params) if args.chat else llm.stream(prompt, params)
                _print_stream(stream, text=llm.model.tokenizer is not None)
    return EXIT_DONE


def _prompts(args: argparse.Namespace) -> list:
    if not args.prompt and not args.prompt_token_ids:
        raise ValueError("no prompt was given: use --prompt TEXT or --prompt-token-ids 1,2,3")
    if args.chat and args.prompt_token_ids:
        raise ValueError("--chat needs text: use --prompt, or leave --chat out")
    if args.chat:
        return [[{"role": "user", "content": text}] for text in args.prompt]
    return [*(args.prompt or []), *(_ids(text, "--prompt-token-ids") for text in args.prompt_token_ids or [])]


def _ids(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: comma-separated integers such as 1,2,3 are allowed") from None


def _print_stream(stream, *, text: bool) -> None:
    """Prints text as it comes, token ids where there is no tokenizer."""
    first = True
    for step in stream:
        new = step.text if text else "".join(f"{'' if first else ' '}{token}" for token in step.token_ids)
        first = first and not new
        print(new, end="", flush=True)
    print(flush=True)


def _as_json(output) -> dict:
    return {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": [
            {
                "index": completion.index,
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "cumulative_logprob": completion.cumulative_logprob,
                "logprobs": completion.logprobs and [_logprobs(of_token) for of_token in completion.logprobs],
            }
            for completion in output.outputs
        ],
    }


def _logprobs(of_token: dict) -> list[dict]:
    return [{"token_id": token, **asdict(logprob)} for token, logprob in of_token.items()]


# -------------------------------------------------------------------------------------------------- chat
def _add_chat(commands) -> None:
    from imex_persist.front.chat import add_arguments

    command = _command(commands, "chat", _chat, "Talk with a model in this terminal, or with the lines of a pipe.")
    add_arguments(command)
    _add_engine_options(command)


def _chat(args: argparse.Namespace) -> int:
    from imex_persist.front.chat import run
    from imex_persist.front.settings import require_model

    _import_engine()
    args.model = require_model(args)
    return run(args, lambda: _engine(args, args.model))


# -------------------------------------------------------------------------------------------------- demo
def _add_demo(commands) -> None:
    command = _command(commands, "demo", _demo, "Two ranks answer a question; without a GPU the kernel runs in the simulator.")
    command.add_argument("--model", help="default: $IMEX_MODEL, $MODEL, else smollm2")
    command.add_argument("--prompt", default=DEMO_QUESTION)
    _add_engine_options(command, tensor_parallel_size=2, model=os.environ.get("MODEL") or "smollm2")


def _demo(args: argparse.Namespace) -> int:
    _import_engine()
    from imex_persist.runtime.placement import share_one_gpu
    from imex_persist.runtime.strategy import strategy_of

    args.device = share_one_gpu(args.device, args.tensor_parallel_size)
    with _engine(args, args.model) as llm:
        params = imex_persist.SamplingParams(temperature=0.0, max_tokens=DEMO_TOKENS)
        tokenizer = llm.model.tokenizer
        if tokenizer is not None and tokenizer.chat_template is not None:
            stream = llm.stream_chat([{"role": "user", "content": args.prompt}], params)
        elif tokenizer is not None:
            stream = llm.stream(args.prompt, params)
        else:
            stream = llm.stream([1], params)
        _print_stream(stream, text=tokenizer is not None)
        result = stream.result
        kind, ranks = llm.group.placement.kind, args.tensor_parallel_size
        print(f"[imex] {kind}, {ranks} rank{'s' * (ranks != 1)}, {strategy_of(llm.shape, 1)}, {_rate(result)}")
    return EXIT_DONE


def _rate(result) -> str:
    """ "38.1 ms/token, 26.2 tok/s": between tokens, so without the prompt."""
    tokens, m = len(result.outputs[0].token_ids), result.metrics
    if tokens < 2 or m.last_token_time <= m.first_token_time:
        return "too few tokens to time"
    seconds = (m.last_token_time - m.first_token_time) / (tokens - 1)
    return f"{seconds * 1e3:.1f} ms/token, {1 / seconds:.1f} tok/s"


# -------------------------------------------------------------------------------------------------- trace
def _add_trace(commands) -> None:
    from imex_persist.observe.command import add_arguments

    command = _command(commands, "trace", _trace, "Decode with tracing on: where every microsecond of a step went.")
    add_arguments(command)
    _add_engine_options(command)


def _trace(args: argparse.Namespace) -> int:
    from imex_persist.front.settings import require_model
    from imex_persist.observe.command import run

    _import_engine()
    args.model = require_model(args)
    return run(args, lambda **more: _engine(args, args.model, **more))
