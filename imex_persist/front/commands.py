"""The front's subcommands: config, plan, topology, doctor. What they do is in the modules of those names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from imex_persist.front import settings

PLAN_SETTINGS = tuple("tensor_parallel_size max_model_len max_num_seqs max_rows kv_cache_memory_bytes exchange".split())
DOCTOR_SETTINGS = ("tensor_parallel_size", "device", "deadline_s", "p2p_level")
AddCommand = Callable[[str, Callable, str], argparse.ArgumentParser]


def add_commands(add_command: AddCommand) -> None:
    """Registers them; `add_command(name, run, text)` gives the parser of a new one."""
    command = add_command("config", _config, "Print every setting, its value and where that is from.")
    command.add_argument("--markdown", action="store_true", help="print README's table instead")
    command.add_argument("--json", action="store_true")
    settings.add_options(command)

    command = add_command("plan", _plan, "What a model needs and how fast it can be on a card, without starting anything.")
    command.add_argument("model", nargs="?", help="a Hugging Face folder, a GGUF file, or smollm2 (default $IMEX_MODEL)")
    command.add_argument("--gpu", metavar="CARD", help="h100, h200 or b200 (default: this machine's GPU, else h100)")
    command.add_argument("--context", type=int, action="append", metavar="N", help="positions attended to; may be repeated")
    command.add_argument("--json", action="store_true")
    settings.add_options(command, only=PLAN_SETTINGS, tensor_parallel_size=None)

    command = add_command("topology", _topology, "This machine's GPUs and how they reach each other; makes no CUDA context.")
    command.add_argument("--json", action="store_true")
    command.add_argument("--require", type=int, metavar="N", help="exit 1 unless N capable GPUs can exchange with each other")

    command = add_command("doctor", _doctor, "Test the exchange and one decode step; exit 0 if IMEX is active, 1 if not.")
    command.add_argument("--json", action="store_true")
    settings.add_options(command, only=DOCTOR_SETTINGS, tensor_parallel_size=None)


def _config(args: argparse.Namespace) -> int:
    if args.markdown:
        print(settings.markdown(), end="")
    elif args.json:
        print(json.dumps({name: {"value": getattr(args, name), "source": source} for name, source in args.sources.items()}))
    else:
        for name, source in args.sources.items():
            value = getattr(args, name)
            none = "not given" if name == "model" else "chosen from model and machine"
            print(f"{name} = {none if value is None else value}  ({source})")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from imex_persist.front import plan

    return plan.run(args)


def _topology(args: argparse.Namespace) -> int:
    from imex_persist.front import topology

    return topology.run(args)


def _doctor(args: argparse.Namespace) -> int:
    from imex_persist.front import doctor

    return doctor.run(args)
