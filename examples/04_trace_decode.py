"""Tracing from Python: decode with the kernel's trace on, ask which phase held the step, and open the timeline in a browser.

Run: python examples/04_trace_decode.py [MODEL] [DEVICE]        (default: smollm2 auto)
"""

import sys

from imex_persist import LLM, SamplingParams
from imex_persist.observe import chrome, picture
from imex_persist.observe.capture import Capture
from imex_persist.observe.report import report


def main(model: str = "smollm2", device: str = "auto") -> None:
    # Every block of every rank writes its marks to rings in host memory; without trace_events they are not even compiled in.
    with LLM(model, device=device, tensor_parallel_size=2, max_model_len=512, trace_events=8192) as llm:
        capture = Capture(llm)
        llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
        trace = capture.finish()

    numbers = report(trace)
    print(f"{numbers['steps']} decode steps in {numbers['axis']}: median {numbers['step_us']['p50']:.1f} µs")
    for phase in sorted(numbers["phases"], key=lambda p: -p["path_us"])[:3]:
        print(f"  {phase['phase']:10} holds {phase['share']:.0%} of the critical path")
    for suspect in numbers["critical_path"]["suspects"][:1]:
        print(f"  most above the median: {suspect['phase']} on rank {suspect['rank']} block {suspect['block']}")

    step = numbers["critical_path"]["typical"]["step"]
    chrome.write_chrome(trace, "trace.json")  # ui.perfetto.dev
    picture.write_html(trace, step, "step.html")  # any browser, no network
    print("wrote trace.json and step.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
