"""The benchmark commands from arguments to tables: the ceiling first, on the same cards, then what is measured against it."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imex_persist.bench import decode as decode_bench
from imex_persist.bench import doorbell as doorbell_bench
from imex_persist.bench import exchange as exchange_bench
from imex_persist.bench import facts, tables
from imex_persist.bench import floor as floor_bench
from imex_persist.bench import latency as latency_bench
from imex_persist.bench.floor import Ceiling
from imex_persist.bench.peers.run import run_peers
from imex_persist.bench.ranks import Ranks
from imex_persist.bench.steps import kv_cache_bytes
from imex_persist.front import settings
from imex_persist.front.cards import known_card
from imex_persist.model.load import load_model
from imex_persist.model.locate import locate, shape_names
from imex_persist.observe.command import check_outputs
from imex_persist.runtime import strategy
from imex_persist.runtime.placement import Placement, place_ranks, share_one_gpu

DECIDED = {"kv_cache_memory_bytes"}  # here, for every engine
KERNEL = "num_blocks max_rows ring_stages window down_slices one_shot_rows max_splits page_size smem_bytes".split()


def decode(args: argparse.Namespace) -> int:
    if args.steps < 2:
        raise ValueError(f"--steps is {args.steps}: at least 2 are needed to time what lies between tokens")
    if not args.rows or (not args.context and not args.n_prompt):
        raise ValueError("--rows, and --context or --n-prompt, need at least one number above 0")
    plan = decode_bench.Plan(args.context, args.rows if args.context else [], args.n_prompt, args.steps)
    run = _Run("decode", args, plan.settings(args.max_rows or max(args.rows)))
    with run.engine() as llm:
        run.record["rows"] = decode_bench.measure(llm, plan, run.ceiling, run.look_at_clocks)
    if args.peers:
        run.record["peers"] = _decode_peers(run, plan)
    return run.end(tables.print_decode)


def latency(args: argparse.Namespace) -> int:
    for name in ("input_len", "output_len", "batch_size", "num_iters"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: at least 1 is needed")
    sizes = dict(input_len=args.input_len, output_len=args.output_len, batch_size=args.batch_size)
    run = _Run("latency", args, latency_bench.settings(**sizes))
    with run.engine() as llm:
        run.look_at_clocks()
        run.record |= latency_bench.measure(
            llm, run.ceiling, **sizes, warmup=max(0, args.num_iters_warmup), iters=args.num_iters
        )
    return run.end(tables.print_latency)


def doorbell(args: argparse.Namespace) -> int:
    run = _Run("doorbell", args, doorbell_bench.settings())
    echo, after_idle = (floor_bench.measure_echo(run.placement, pause_s) for pause_s in (0.0, doorbell_bench.IDLE_S))
    with run.engine() as llm:
        run.record |= doorbell_bench.measure(llm)
    run.record["bound_after_idle_us"] = after_idle["median_us"]
    run.record["bound_us"] = echo["median_us"]
    run.record["ratio"] = run.record["noop"]["median_us"] / echo["median_us"]
    return run.end(tables.print_doorbell)


def exchange(args: argparse.Namespace) -> int:
    if args.tensor_parallel_size < 2:
        raise ValueError("an exchange needs two ranks at least: use --tp 2 or more")
    exchange_bench.check_sizes(args.sizes, args.hidden_size)
    args.device = share_one_gpu(args.device, args.tensor_parallel_size)
    run = _Run("exchange", args, {})
    with Ranks(run.placement) as ranks:
        gathers = floor_bench.measure_gathers(ranks)
        run.record["l2_gb_s"] = max(row["gb_s"] for row in gathers)
        run.record["one_way_us"] = max(row["us"] for row in floor_bench.measure_pings(ranks))
        rows = exchange_bench.measure(ranks, args.sizes, args.hidden_size)
        run.look_at_clocks()
    for row in rows:
        if "us" in row:
            row["bound_us"] = exchange_bench.least_us(
                row["values"], row["blocks"], run.record["one_way_us"], run.record["l2_gb_s"]
            )
            row["ratio"] = row["us"] / row["bound_us"]
    run.record["rows"] = rows
    if args.peers:
        run.record["peers"] = run_peers("exchange", run.placement, {"sizes": args.sizes})
    return run.end(tables.print_exchange)


def floor(args: argparse.Namespace) -> int:
    run = _Run("floor", args, {})
    with Ranks(run.placement) as ranks:
        run.record["read"] = _ceiling_fields(floor_bench.measure_read(ranks))
        run.record["read"]["datasheet_tb_s"] = _datasheet_tb_s(run.placement)
        run.look_at_clocks()
        run.record["gather"] = floor_bench.measure_gathers(ranks)
        run.record["barrier_us"] = floor_bench.measure_barrier(ranks)
        run.record["num_blocks"] = int(floor_bench.shape_for(ranks)["num_blocks"])
        run.record["peers_one_way"] = floor_bench.measure_pings(ranks)
    run.record["doorbell"] = floor_bench.measure_echo(run.placement)
    return run.end(tables.print_floor)


def _decode_peers(run: _Run, plan: decode_bench.Plan) -> list[dict]:
    job = {
        "folder": str(locate(run.record["model"])),
        "contexts": plan.contexts,
        "rows": plan.rows,
        "prompts": plan.prompts,
        "tensor_parallel_size": run.record["tensor_parallel_size"],
    }
    peers = run_peers("decode", run.placement, job)
    bounds = {(row["kind"], row["rows"], row["context"]): row["bound_us"] for row in run.record["rows"]}
    for peer in peers:
        for row in peer.get("rows", ()):
            row["ratio"] = row["us"] / bounds[row["kind"], row["rows"], row["context"]]
    return peers


class _Run:
    """One command: where it runs, and the JSON object that it makes. `needed` are settings of the engine that the bench decides."""

    def __init__(self, name: str, args: argparse.Namespace, needed: dict):
        check_outputs(args, "output_json")
        _check_given(name, args, needed)
        self._args, self._needed = args, needed
        self.placement = place_ranks(args.device, args.tensor_parallel_size)
        self.record: dict = {
            "bench": name,
            "where": facts.where(self.placement),
            "tensor_parallel_size": args.tensor_parallel_size,
        }
        self.ceiling: Ceiling | None = None
        self._looks: list[threading.Thread] = []

    @contextmanager
    def engine(self) -> Iterator:
        """The LLM, after the read ceiling of its cards was measured."""
        from imex_persist import LLM

        model = settings.require_model(self._args)
        given = settings.chosen(self._args) | self._needed
        if given["load_format"] == "auto" and model in shape_names():
            given["load_format"] = "dummy"
        config = load_model(model, "dummy", tokenizer=False).config
        sizes = given["tensor_parallel_size"], given["max_model_len"], given["max_num_seqs"]
        given["kv_cache_memory_bytes"] = kv_cache_bytes(config, *sizes)  # every sequence at its longest
        self.ceiling = floor_bench.read_ceiling(self.placement)
        self.record |= {"model": model, "load_format": given["load_format"], "read": _ceiling_fields(self.ceiling)}
        with LLM(model, **given) as llm:
            shape = llm.shape
            self.record["kernel"] = {name: int(shape[name]) for name in KERNEL}
            self.record["kernel"]["strategy"] = strategy.describe(shape, llm.group.strategy_source)
            yield llm

    def look_at_clocks(self) -> None:
        """Asks for the clocks on a thread: whoever drives a kernel meanwhile must not wait for the answer."""

        def look() -> None:
            self.record["busy"] = facts.clocks(self.placement)

        self._looks.append(threading.Thread(target=look))
        self._looks[-1].start()

    def end(self, show) -> int:
        for look in self._looks:
            look.join()
        try:
            if self._args.json:
                print(json.dumps(self.record))
            else:
                show(self.record)
                for line in facts.describe(self.record):
                    print(line)
        finally:  # also where nobody reads on (| head)
            if self._args.output_json:
                Path(self._args.output_json).write_text(json.dumps(self.record, indent=1) + "\n")
        return 0


def _check_given(bench: str, args: argparse.Namespace, needed: dict) -> None:
    """Raises ValueError for a flag whose setting would be overwritten."""
    for name, source in args.sources.items():
        if source == "flag" and name in DECIDED.union(needed) and getattr(args, name) != needed.get(name):
            raise ValueError(f"bench {bench} chooses {name} by what it measures: leave out --{name.replace('_', '-')}")


def _datasheet_tb_s(placement: Placement) -> float | None:
    """Of the card, where it is known (front/cards.py)."""
    card = known_card(placement.places[0].name)
    return card.datasheet_tb_s if card else None


def _ceiling_fields(ceiling: Ceiling) -> dict:
    """TB/s by rank, and by rank and tiles in flight."""
    by_window = {str(w): {str(r): rate / 1e12 for r, rate in one.items()} for w, one in ceiling.by_window.items()}
    return {"tb_s": {str(rank): rate / 1e12 for rank, rate in ceiling.by_rank.items()}, "by_window": by_window}
