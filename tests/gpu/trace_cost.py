"""What tracing costs on a GPU: the same tokens with and without, in turns, in one run.

    python3 tests/gpu/trace_cost.py MODEL [--tp N] [--device …] [--load-format dummy] [--tokens 256] [--turns 3] [--json]

Each turn starts an engine without tracing, one that traces every step, and one that traces one step of `--sampled`. What is compared is
the time between tokens by the device's clock, which the mailbox writes in every record, tracing or not. Prints the median of each, what
it is more than without, and how well the traced runs knew their clocks. Exits 1 if tracing every step costs more than `--limit` percent.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imex_persist import LLM, SamplingParams
from imex_persist.model.load import load_model
from imex_persist.observe.capture import Capture
from imex_persist.observe.report import report
from imex_persist.observe.ring import ring_events

PROMPT = list(range(1, 33))
SKIPPED = 16  # first tokens: the prompt's steps


def gaps_us(llm: LLM, tokens: int, capture: Capture | None = None) -> np.ndarray:
    """µs between the tokens of one request, by the device's clock."""
    stream = llm.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
    for _ in stream:
        if capture:
            capture.drain()
    return np.diff(stream.result.metrics.device_time_ns)[SKIPPED:] / 1e3


def measure(args: argparse.Namespace, **tracing) -> tuple[np.ndarray, dict | None]:
    engine = LLM(
        args.model, device=args.device, tensor_parallel_size=args.tp, load_format=args.load_format, max_model_len=args.max_model_len,
        max_rows=1, max_num_seqs=1, **tracing,
    )  # fmt: skip
    with engine as llm:
        gaps_us(llm, args.tokens)  # warm: caches, clocks of the card
        capture = Capture(llm) if tracing else None
        gaps = gaps_us(llm, args.tokens, capture)
        numbers = report(capture.finish()) if capture else None
    return gaps, numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model")
    add("--tp", type=int, default=1)
    add("--device", default="auto")
    add("--load-format", default="auto")
    add("--max-model-len", type=int, default=1024)
    add("--tokens", type=int, default=256)
    add("--turns", type=int, default=3)
    add("--sampled", type=int, default=16, help="the third run traces one step of so many")
    add("--limit", type=float, default=2.0, help="percent that tracing every step may cost")
    add("--json", action="store_true")
    args = parser.parse_args()
    if args.tokens <= SKIPPED + 2:
        parser.error(f"--tokens is {args.tokens}: more than {SKIPPED + 2} are needed")
    events = ring_events(load_model(args.model, args.load_format, tokenizer=False).config.num_hidden_layers, args.tokens + 64)
    kinds = {"off": {}, "every step": {"trace_events": events}}
    kinds[f"one of {args.sampled}"] = {"trace_events": events, "trace_every": args.sampled}
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    traces: dict[str, dict] = {}
    for _ in range(args.turns):
        for kind, tracing in kinds.items():
            gaps, numbers = measure(args, **tracing)
            found[kind].append(gaps)
            if numbers:
                traces[kind] = {name: numbers[name] for name in ("steps", "lost_steps", "clock_error_us", "hops")}
                traces[kind]["step_us"] = numbers["step_us"]["p50"]
    rows = {}
    base = float(np.median(np.concatenate(found["off"])))
    for kind, turns in found.items():
        each = [float(np.median(gaps)) for gaps in turns]
        every = np.concatenate(turns)
        rows[kind] = {
            "median_us": float(np.median(every)), "mean_us": float(every.mean()), "p99_us": float(np.percentile(every, 99)),
            "turns_us": each, "more_percent": 100 * (float(np.median(every)) / base - 1), **traces.get(kind, {}),
            "mean_more_percent": 100 * (float(every.mean()) / float(np.concatenate(found["off"]).mean()) - 1),
        }  # fmt: skip
    cost = rows["every step"]["more_percent"]
    if args.json:
        print(json.dumps({"model": args.model, "tp": args.tp, "tokens": args.tokens, "kinds": rows, "cost_percent": cost}))
    else:
        print(f"{args.model}, {args.tp} rank(s), {args.tokens} tokens, {args.turns} turns of each kind; µs between tokens")
        for kind, row in rows.items():
            turns = ", ".join(f"{us:.1f}" for us in row["turns_us"])
            print(
                f"{kind:12} median {row['median_us']:8.2f} ({row['more_percent']:+.2f} %)  mean {row['mean_us']:8.2f} "
                f"({row['mean_more_percent']:+.2f} %)  p99 {row['p99_us']:8.2f}  turns {turns}"
            )
            if kind in traces:
                print(f"{'':12} {json.dumps(traces[kind])}")
        print(f"tracing every step costs {cost:.2f} %, allowed are {args.limit} %")
    return int(cost > args.limit)


if __name__ == "__main__":
    sys.exit(main())
