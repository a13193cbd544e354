"""Tensor parallelism: two ranks hold half the model each and add their partial sums inside the kernel. One rank says the same.

Run: python examples/03_two_ranks.py [MODEL] [DEVICE]        (default: smollm2 auto; cuda:0 puts both ranks on one GPU)
"""

import sys

from imex_persist import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def answer(model: str, device: str, ranks: int) -> str:
    with LLM(model, device=device, tensor_parallel_size=ranks, max_model_len=1024) as llm:
        (output,) = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32))
        times, count = output.metrics, len(output.outputs[0].token_ids)
        each = (times.last_token_time - times.first_token_time) / max(1, count - 1)
        print(f"{ranks} rank(s): {output.outputs[0].text!r}, {each * 1e3:.2f} ms a token")
        return output.outputs[0].text


def main(model: str = "smollm2", device: str = "auto") -> None:
    one, two = (answer(model, device, ranks) for ranks in (1, 2))
    print("the same text" if one == two else "different text: sums of another order were rounded differently")


if __name__ == "__main__":
    main(*sys.argv[1:])
