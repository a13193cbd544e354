"""A peer process: vLLM on the same shapes with random weights. A step's time is the slope between two lengths of output."""

from __future__ import annotations

import sys
import time

from imex_persist.bench.peers.answer import answer

SHORT, LONG = 8, 208


def measure(job: dict) -> dict:
    import vllm

    longest = max(job["contexts"]) + LONG + 8
    llm = vllm.LLM(
        job["folder"],
        load_format="dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=job["tensor_parallel_size"],
        max_model_len=longest,
        max_num_seqs=max(job["rows"]),
        enable_prefix_caching=False,
        dtype="bfloat16",
    )

    def seconds(rows: int, context: int, tokens: int) -> float:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [1 + (i + r) % 100 for i in range(context)]} for r in range(rows)]
        times = []
        for _ in range(4):
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[1]

    rows = []
    for count in job["rows"]:
        for context in job["contexts"]:
            us = (seconds(count, context, LONG) - seconds(count, context, SHORT)) / (LONG - SHORT) * 1e6
            rows.append({"kind": "decode", "rows": count, "context": context, "us": us})
    return {"rows": rows, "vllm": vllm.__version__}


if __name__ == "__main__":
    answer(measure, sys.argv)
