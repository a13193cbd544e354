"""A trace of two ranks on two GPUs, in processes of their own: clocks aligned over the links.

`TEST_DEVICE=sim pytest tests/multi_gpu/test_trace.py` runs it as two simulators, whose clock is the host's.
"""

from __future__ import annotations

import pytest

from imex_persist import LLM, SamplingParams
from imex_persist.observe.capture import Capture
from imex_persist.observe.report import report
from tests.gpu.test_llm import DEVICE, SETTINGS, SIMULATED, save_model


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"))
    with LLM(folder, device=DEVICE, tensor_parallel_size=2, trace_events=1 << 14, **SETTINGS) as llm:
        capture = Capture(llm)
        for _ in llm.stream([5, 6, 7], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)):
            capture.drain()
        return report(capture.finish())


def test_ranks_agree(numbers):
    hops, errors = numbers["hops"], numbers["clock_error_us"]
    print(errors, hops, numbers["exchanges"])
    assert numbers["steps"] > 32 and not numbers["lost_steps"]
    if not SIMULATED:
        assert hops["contradictions"] == 0
        assert 0 < errors["blocks"] < 3 and 0 < errors["ranks"] < 5 and errors["drift"] < 2
        assert hops["shortest_peers_us"] > 0.3


def test_words_take_as_long_there_as_back(numbers):
    """A wrong offset between the ranks' clocks would be added to one way and taken from the other."""
    if SIMULATED:
        pytest.skip("two simulators on one CPU take turns as the host likes")
    rows = [row for row in numbers["exchanges"] if row["arrived_last"]]
    print({row["rank"]: (row["arrived_last"], row["export_to_visible_us"]) for row in rows})
    seen = [row["export_to_visible_us"]["p50"] for row in rows]
    assert min(seen) > 0 and max(seen) - min(seen) < 2 * numbers["clock_error_us"]["ranks"] + 1
