"""`imex-persist bench latency`: a batch of requests from prompt to last token through `LLM.generate`, as `vllm bench latency` times it."""

from __future__ import annotations

import time
from itertools import pairwise

from imex_persist.bench.floor import Ceiling
from imex_persist.bench.steps import StepBytes, least_us

PERCENTILES = (10, 25, 50, 75, 90, 99)


def settings(input_len: int, output_len: int, batch_size: int) -> dict:
    """Of the engine."""
    return {
        "max_model_len": input_len + output_len,
        "max_num_seqs": batch_size,
        "enable_prefix_caching": False,  # every round sends the same prompts, and the bound is of computing them
    }


def measure(llm, ceiling: Ceiling, *, input_len: int, output_len: int, batch_size: int, warmup: int, iters: int) -> dict:
    """vLLM's keys (`avg_latency`, `latencies`, `percentiles`, in seconds) and the bound."""
    from imex_persist import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    vocabulary = llm.model.config.vocab_size
    prompts = [[(7919 * i + 104729 * b + 1) % vocabulary for i in range(input_len)] for b in range(batch_size)]
    latencies, token_ns = [], []
    for i in range(warmup + iters):
        began = time.perf_counter()
        outputs = llm.generate(prompts, params)
        if i >= warmup:
            latencies.append(time.perf_counter() - began)
            for output in outputs:
                times = output.metrics.device_time_ns
                token_ns += [b - a for a, b in pairwise(times)]
    bound = _bound_us(llm, ceiling, input_len, output_len, batch_size) / 1e6
    average, ordered = sum(latencies) / len(latencies), sorted(latencies)
    return {
        "avg_latency": average,
        "latencies": latencies,
        "percentiles": {str(p): ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES},
        "bound": bound,
        "ratio": average / bound,
        "step_us": sorted(token_ns)[len(token_ns) // 2] / 1e3 if token_ns else None,
        "input_len": input_len,
        "output_len": output_len,
        "batch_size": batch_size,
        "num_iters": iters,
    }


def _bound_us(llm, ceiling: Ceiling, input_len: int, output_len: int, batch_size: int) -> float:
    """As many steps as the rows allow, whatever the order in which prompts and tokens share them."""
    sizes, most = StepBytes.of(llm.model.config, llm.shape), int(llm.shape["max_rows"])
    rows = batch_size * (input_len + output_len - 1)
    steps = max(-(-rows // most), -(-input_len // most) + output_len - 1)  # a sequence decodes one row a step
    with_logits = max(output_len, -(-batch_size * output_len // most))
    attended = batch_size * sum(range(input_len, input_len + output_len - 1))
    nbytes = steps * sizes.weights + with_logits * sizes.logits + attended * sizes.kv_per_position + rows * sizes.per_row
    return least_us(nbytes, ceiling)
