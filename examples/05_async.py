"""Many requests at once in asyncio: each prints its answer when it is done; the last one is left early, which cancels it.

Run: python examples/05_async.py [MODEL] [DEVICE]        (default: smollm2 auto)
"""

import asyncio
import sys

from imex_persist import AsyncLLM, RequestOutputKind, SamplingParams

PLACES = ["France", "Italy", "Norway", "Japan", "Peru"]


async def ask(llm: AsyncLLM, place: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, output_kind=RequestOutputKind.FINAL_ONLY)
    async for output in llm.generate(f"Cities of the world. The capital of {place} is", params, request_id=place):
        print(f"{place}:{output.outputs[0].text!r}")


async def main(model: str = "smollm2", device: str = "auto") -> None:
    async with AsyncLLM(model, device=device, max_model_len=1024) as llm:
        await asyncio.gather(*(ask(llm, place) for place in PLACES))

        count = 0
        async for _ in llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=500)):
            count += 1
            if count == 5:
                break  # nobody reads on: the request is cancelled
        await llm.drain()
        print(f"left after {count} outputs; free slots: {llm.engine.free_slots}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
