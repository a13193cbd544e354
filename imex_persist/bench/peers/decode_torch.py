"""A peer process: torch's step time on the same shapes, compiled or captured by hand, and its prefill. One GPU.

A step here reads and leaves its tokens on the GPU, and steps follow each other without a host between them: torch's best case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from imex_persist.bench.peers.answer import answer
from imex_persist.bench.peers.llama_torch import Llama
from imex_persist.model.config import ModelConfig

WARMUP, STEPS, PREFILLS = 20, 200, 10


def measure(job: dict) -> dict:
    config = ModelConfig.from_folder(job["folder"])
    if job["mode"] == "prefill":
        return {"rows": [_prefill(config, length) for length in job["prompts"]]}
    rows = [_decode(config, context, rows, job["mode"]) for rows in job["rows"] for context in job["contexts"]]
    return {"rows": rows, "torch": torch.__version__}


def _decode(config: ModelConfig, context: int, rows: int, mode: str) -> dict:
    """Every step is the one at position `context`: the cache is read as far as it goes."""
    torch.cuda.empty_cache()  # of the context before
    model = Llama(config, rows=rows, positions=context + 1, device="cuda")
    tokens = torch.ones(rows, dtype=torch.long, device="cuda")
    position = torch.full((1,), context, dtype=torch.long, device="cuda")
    with torch.inference_mode():
        decode = model.decode
        if mode == "compile":
            # Captured like the other: mode="reduce-overhead" gives up CUDA graphs, since a step writes to its KV cache.
            torch._dynamo.reset()
            decode = torch.compile(model.decode, fullgraph=True)
        step = captured(lambda: tokens.copy_(decode(tokens, position)))
        us = timed(step, WARMUP, STEPS)
    return {"kind": "decode", "rows": rows, "context": context, "us": us}


def _prefill(config: ModelConfig, length: int) -> dict:
    torch.cuda.empty_cache()
    model = Llama(config, rows=1, positions=length, device="cuda")
    tokens = torch.ones(1, length, dtype=torch.long, device="cuda")
    with torch.inference_mode():
        us = timed(captured(lambda: model.prefill(tokens)), 3, PREFILLS)
    return {"kind": "prompt", "rows": 1, "context": length, "us": us}


def captured(work: Callable) -> Callable:
    """`work` as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(step: Callable, warmup: int, steps: int) -> float:
    """µs: the median of ten stretches of steps."""
    for _ in range(warmup):
        step()
    each, times = max(1, steps // 10), []
    for _ in range(10):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(each):
            step()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / each)
    return sorted(times)[5]


if __name__ == "__main__":
    answer(measure, sys.argv)
