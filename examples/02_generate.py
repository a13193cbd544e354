"""Generation with the calls that everyone knows: several prompts at once, then one streamed.

Run: python examples/02_generate.py [MODEL] [DEVICE]        (default: smollm2 auto)
"""

import sys

from imex_persist import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "The opposite of hot is"]


def main(model: str = "smollm2", device: str = "auto") -> None:
    params = SamplingParams(temperature=0, max_tokens=16)
    with LLM(model, device=device, max_model_len=1024) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")

        print("\nstreamed:", end=" ", flush=True)
        for step in llm.stream_chat([{"role": "user", "content": "What is the capital of Italy?"}], params):
            print(step.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
