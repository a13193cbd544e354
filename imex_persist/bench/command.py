"""`imex-persist bench …`: its subcommands and their flags. What each measures is in the module of its name."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from imex_persist.front import settings

SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
AddCommand = Callable[[str, Callable, str], argparse.ArgumentParser]
MODEL_HELP = "a folder, a GGUF file, smollm2, or a shape with random weights: llama-3.2-1b, llama-3.1-8b, llama-3.3-70b"


def add_commands(add_command: AddCommand) -> None:
    """Registers them; `add_command(name, run, text)` gives the parser of a new one."""
    command = add_command("latency", _run("latency"), "A batch from prompt to last token, with vllm bench latency's flags.")
    _add_model(command)
    add = command.add_argument
    add("--input-len", type=int, default=32, metavar="N", help="tokens of each prompt (default %(default)s)")
    add("--output-len", type=int, default=128, metavar="N", help="tokens to generate (default %(default)s)")
    add("--batch-size", type=int, default=1, metavar="N", help="requests at once (default %(default)s)")
    add("--num-iters-warmup", type=int, default=10, metavar="N", help="rounds that are not timed (default %(default)s)")
    add("--num-iters", type=int, default=30, metavar="N", help="rounds that are (default %(default)s)")
    settings.add_options(command, model=None)

    command = add_command("decode", _run("decode"), "Step time by context and rows, and prompts: llama-bench's table.")
    _add_model(command)
    add = command.add_argument
    add("--context", "-d", type=numbers, default=[128], metavar="N,…", help="positions before the steps (default 128)")
    add("--rows", type=numbers, default=[1], metavar="N,…", help="sequences that decode at once (default 1)")
    add("--steps", "-n", type=int, default=200, metavar="N", help="steps of each context (default %(default)s)")
    add("--n-prompt", "-p", type=numbers, default=[512], metavar="N,…", help="lengths of prompts (default 512; 0: none)")
    _add_peers(command)
    settings.add_options(command, model=None)

    command = add_command(
        "doorbell", _run("doorbell"), "The host's part: a no-op descriptor's round trip, an idle kernel's first token."
    )
    _add_model(command)
    settings.add_options(command, model=None)

    command = add_command(
        "exchange", _run("exchange"), "The exchange alone: every strategy at every size, checked bit for bit."
    )
    _add_output(command)
    add = command.add_argument
    add("--sizes", type=numbers, default=list(SIZES), metavar="N,…", help="fp32 values to sum (default 512 … 32768)")
    add("--hidden-size", type=int, default=4096, metavar="N", help="values of a row: more are rows (default %(default)s)")
    _add_peers(command)
    settings.add_options(command, only=("tensor_parallel_size", "device"), tensor_parallel_size=2)

    command = add_command(
        "floor", _run("floor"), "What the hardware allows: read ceiling, gathers, barrier, doorbell, one way to a peer."
    )
    _add_output(command)
    settings.add_options(command, only=("tensor_parallel_size", "device"))

    command = add_command(
        "plot", _plot, "Draw the JSON of decode (time by context) or exchange (time by size); needs matplotlib."
    )
    command.add_argument("file", metavar="FILE.json", help="what --output-json wrote")
    command.add_argument("--out", required=True, metavar="X.svg", help="the picture, .svg or .png")
    command.add_argument("--rows", type=int, metavar="N", help="rows a step of decode's plot (default: the fewest measured)")


def _plot(args: argparse.Namespace) -> int:
    from imex_persist.bench import plot

    return plot.run(args)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", help=f"{MODEL_HELP} (default $IMEX_MODEL)")
    _add_output(command)


def _add_peers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--peers", action="store_true", help="run what others offer, too, where it is installed; takes minutes"
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    command.add_argument("--output-json", metavar="FILE", help="write that object to a file as well")


def _run(name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from imex_persist.bench import runs

        return getattr(runs, name)(args)

    return run


def numbers(text: str) -> list[int]:
    """ "128,2048" as argparse wants it; 0 for none."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers such as 128,2048 are allowed") from None
    if any(value < 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: no number may be negative")
    return sorted({value for value in values if value})
