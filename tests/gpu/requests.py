"""Thousands of random requests on Llama-3.2-1B shapes with random weights: nothing lost, equal alone and in company, no long gap,
memory flat.

    python -m tests.gpu.requests [--tp 2] [--requests 2000] [--json FILE]

On GPUs it takes a few minutes. `--device sim --tiny` runs it in the simulator on a small model, to test the script.
Exit code 0 if everything holds, 1 if not; the last line says which.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from imex_persist import LLM, SamplingParams
from imex_persist.runtime import inputs
from imex_persist.runtime.request import Request
from tests.gpu.test_llm import CONFIG, LARGE, used_bytes
from tests.kernel.traffic import Client, Sizes, Wanted, check_ends, traffic
from tests.runtime.groups import pids

LARGE_SIZES = Sizes(128_256, 4096, systems=(100, 500, 1200, 2000), tail=300, max_tokens=120, crowd=16)
TINY_SIZES = Sizes(1003, 512, systems=(40, 130, 260), tail=40, max_tokens=30, crowd=16)
SAMPLE = 60  # requests that are run again alone
BOUND = 2.0  # of the plain step: the longest gap between two tokens of a request
WARM_UP = 0.1  # of the requests: memory is compared from there on
PROMPT = 2000  # tokens, of the one that arrives while another decodes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.requests", description=__doc__.split("\n")[0])
    parser.add_argument("--tp", type=int, default=1, help="GPUs (default 1)")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--json", metavar="FILE", help="the same numbers")
    args = parser.parse_args()
    sizes, config = (TINY_SIZES, CONFIG) if args.tiny else (LARGE_SIZES, LARGE)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        settings = {"load_format": "dummy", "device": args.device, "tensor_parallel_size": args.tp}
        with LLM(folder, **settings, max_model_len=sizes.max_model_len) as llm:
            numbers, broken = measure(llm, args, sizes)
    print_table(numbers)
    if args.json:
        Path(args.json).write_text(json.dumps(numbers | {"broken": broken}))
    print("all requests as they must be" if not broken else "BROKEN: " + "; ".join(broken))
    return 1 if broken else 0


def measure(llm: LLM, args: argparse.Namespace, sizes: Sizes) -> tuple[dict, list[str]]:
    """(numbers of the table, what does not hold)."""
    broken: list[str] = []
    client = client_of(llm, sizes)
    plain = plain_step_us(llm, sizes)
    prompt = prompt_gap_us(llm, sizes)
    memory: list[dict[str, int]] = []

    def look(i: int) -> None:
        if i in (int(WARM_UP * args.requests), args.requests - 1):
            memory.append(memory_used(llm, args))

    wanted, began, steps = traffic(args.seed, args.requests, sizes), time.perf_counter(), llm.group.mailbox.steps
    counted = llm.engine.num_prompt_tokens, llm.engine.num_cached_tokens
    client.run(wanted, look)
    counted = [
        now - before for now, before in zip((llm.engine.num_prompt_tokens, llm.engine.num_cached_tokens), counted, strict=True)
    ]
    drained = llm.engine.drain(10)
    seconds, steps = time.perf_counter() - began, llm.group.mailbox.steps - steps
    ends = check_ends(wanted)
    if (
        not drained
        or llm.engine.free_slots != int(llm.shape["num_slots"])
        or llm.engine.free_pages != int(llm.shape["num_pages"])
    ):
        broken.append(f"{llm.engine.free_slots} slots and {llm.engine.free_pages} pages came back")
    llm.engine._share_pages = False  # alone means: computed from the first token on
    different = run_again_alone(client, wanted, args.seed)
    if different:
        broken.append(f"requests {different} are different alone")
    gaps = gaps_us(wanted)
    longest = max(float(gaps.max()), prompt)
    if longest > BOUND * plain:
        broken.append(f"a gap of {longest:.0f} µs is more than {BOUND:g} x the plain step of {plain:.0f} µs")
    grown = {name: memory[1][name] - memory[0][name] for name in memory[0]}
    if max(grown[name] for name in grown if name != "this process, which keeps all events") > 8 << 20:
        broken.append(f"memory grew: {grown}")
    rank = llm.group.identities[0]
    return {
        "card": f"{args.tp} x {rank.get('name', 'simulator')}",
        "requests": len(wanted),
        "ended": ends,
        "run again alone": min(SAMPLE, len(wanted)),
        "different": len(different),
        "tokens": sum(len(one.tokens) for one in wanted),
        "prompt tokens": counted[0],
        "of these from the cache": counted[1],
        "steps": steps,
        "seconds": round(seconds, 1),
        "plain step, µs": round(plain, 1),
        "gap median, µs": round(float(np.median(gaps)), 1),
        "gap 99.9 %, µs": round(float(np.quantile(gaps, 0.999)), 1),
        "gap longest, µs": round(float(gaps.max()), 1),
        f"longest beside a prompt of {min(PROMPT, sizes.max_model_len - 2)}, µs": round(prompt, 1),
        "gaps above the bound": int(np.count_nonzero(gaps > BOUND * plain)),
        "cancel to release, steps": cancel_steps(llm, sizes),
        "memory grown, bytes": grown,
    }, broken


def client_of(llm: LLM, sizes: Sizes) -> Client:
    def submit(prompt: list[int], params: SamplingParams, sink) -> Request:
        return llm.engine.submit(
            inputs.submission(prompt, params, llm.model.eos_token_ids, llm.max_model_len, llm.model.config.vocab_size), sink
        )

    return Client(submit, llm.engine.cancel, sizes)


def run_again_alone(client: Client, wanted: list[Wanted], seed: int) -> list[int]:
    """Numbers of the requests, of a sample, that were told something else in company."""
    chosen = np.random.default_rng(seed).permutation(len(wanted))[:SAMPLE]
    again = [Wanted(wanted[i].prompt, wanted[i].params, 1) for i in chosen]
    client.run(again)
    pairs = [(int(i), wanted[i], other) for i, other in zip(chosen, again, strict=True)]
    return [i for i, one, other in pairs if other.told()[: len(one.told())] != one.told()]


# ------------------------------------------------------------------------------------------------ times, of the device's clock
def gaps_us(wanted: list[Wanted]) -> np.ndarray:
    """Between neighbouring tokens of every request."""
    times = [[event.device_time_ns for event in one.events if event.token is not None] for one in wanted]
    return np.concatenate([np.diff(t) for t in times if len(t) > 1]) / 1e3


def plain_step_us(llm: LLM, sizes: Sizes) -> float:
    """Median of one sequence that decodes alone."""
    params = SamplingParams(temperature=0, max_tokens=sizes.max_model_len // 4, ignore_eos=True)
    (output,) = llm.generate([1, 2, 3], params)
    return float(np.median(np.diff(output.metrics.device_time_ns[20:]))) / 1e3


def prompt_gap_us(llm: LLM, sizes: Sizes) -> float:
    """The longest gap of a sequence that decodes while a long prompt comes."""
    tokens = min(PROMPT, sizes.max_model_len - 8)
    rows = int(llm.shape["max_rows"])
    params = SamplingParams(
        temperature=0, max_tokens=min(tokens // max(1, rows - 1) + 200, sizes.max_model_len - 8), ignore_eos=True
    )
    with llm.stream([9, 8, 7], params) as first:
        for _ in range(10):
            next(first)
        prompt = [int(t) for t in np.random.default_rng(1).integers(0, sizes.vocab_size, tokens)]
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert not first.request.finished, "the prompt took longer than the sequence beside it"
        first.close()
        list(first)  # what had come by then
        return float(np.diff(first.result.metrics.device_time_ns).max()) / 1e3


def cancel_steps(llm: LLM, sizes: Sizes, trials: int = 20) -> int:
    """The most steps between a call of cancel and the moment when slot and pages are free, seen from the host, of some trials."""
    most = 0
    for i in range(trials):
        stream = llm.stream([i + 1] * 5, SamplingParams(temperature=0, max_tokens=sizes.max_model_len // 2, ignore_eos=True))
        for _ in range(3):
            next(stream)
        steps = llm.group.mailbox.steps
        stream.close()
        llm.engine.drain(10)
        most = max(most, llm.group.mailbox.steps - steps)
    return most


# ------------------------------------------------------------------------------------------------ memory
def memory_used(llm: LLM, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of this process, of the workers together, and of the GPUs."""
    used = {
        "this process, which keeps all events": resident(os.getpid()),
        "workers": sum(resident(pid) for pid in pids(llm.group)),
    }
    if llm.group.placement.kind == "cuda":
        used["GPUs"] = sum(used_bytes(place.ordinal) for place in llm.group.placement.places)
    return used


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_table(numbers: dict) -> None:
    width = max(map(len, numbers))
    for name, value in numbers.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    sys.exit(main())
