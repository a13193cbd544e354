"""AsyncLLM on the real kernel in the simulator: streams, cancelling, faults, and a loop that is never blocked."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from contextlib import aclosing

import pytest

from imex_persist import AsyncLLM, FaultError, ImexError, RequestOutputKind, SamplingParams
from tests.model.test_tokenizer import byte_backend
from tests.runtime.groups import pids
from tests.runtime.test_llm import CONFIG, PROMPT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")
SETTINGS = dict(load_format="dummy", device="sim", tensor_parallel_size=2, max_model_len=512, max_num_seqs=4)


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0, **{"max_tokens": 12, "ignore_eos": True, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 256}))
    byte_backend().save(str(path / "tokenizer.json"))
    return str(path)


@pytest.fixture(scope="module")
def llm(folder):
    made = AsyncLLM(folder, **SETTINGS)
    yield made
    made.shutdown()


async def all_of(llm, prompt=PROMPT, params=None, request_id=None):
    return [output async for output in llm.generate(prompt, params or greedy(), request_id)]


def ids(output) -> list[int]:
    return output.outputs[0].token_ids


def test_everything_so_far_what_is_new_or_the_end(llm):
    async def run():
        whole, parts, last = [
            await all_of(llm, params=greedy(output_kind=kind), request_id=kind.name) for kind in RequestOutputKind
        ]
        await llm.drain()
        return whole, parts, last

    whole, parts, last = asyncio.run(run())
    assert {output.request_id for output in whole} == {"CUMULATIVE"} and whole[-1].prompt_token_ids == PROMPT
    tokens = ids(whole[-1])
    assert len(tokens) == 12 and all(tokens[: len(ids(output))] == ids(output) for output in whole)
    assert [len(ids(output)) for output in whole] == sorted({len(ids(output)) for output in whole})
    assert [token for output in parts for token in ids(output)] == tokens
    text = whole[-1].outputs[0].text
    assert "".join(output.outputs[0].text for output in parts) == text == last[0].outputs[0].text
    assert len(last) == 1 and ids(last[0]) == tokens
    for outputs in (whole, parts, last):
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].finish_reason == "length" and outputs[-1].metrics.time_to_first_token > 0


def test_many_at_once_are_those_alone(llm):
    prompts = [[i + 1, 2 * i + 3, 40] * (i % 5 + 1) for i in range(40)]

    async def run():
        alone = [ids((await all_of(llm, prompt))[-1]) for prompt in prompts]
        before = threading.active_count()
        late, most = 0.0, 0

        async def watch():
            nonlocal late, most
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0.002)
                late, most = max(late, time.perf_counter() - began), max(most, threading.active_count())

        watcher = asyncio.create_task(watch())
        together = await asyncio.gather(*(all_of(llm, prompt) for prompt in prompts))
        watcher.cancel()
        return alone, [ids(outputs[-1]) for outputs in together], late, most - before

    alone, together, late, threads = asyncio.run(run())
    assert alone == together
    assert late < 0.5, f"the loop stood still for {late:.3f} s"
    assert threads <= (os.cpu_count() or 1) + 4, "the thread pool for prompts, and none for each request"


@pytest.mark.parametrize("how", ["closed", "dropped", "its task cancelled", "an exception"])
def test_whoever_stops_reading_cancels(llm, how):
    async def read():
        if how == "dropped":
            async for _ in llm.generate(PROMPT, greedy(max_tokens=400)):
                return
        async with aclosing(llm.generate(PROMPT, greedy(max_tokens=400))) as stream:
            async for _ in stream:
                if how == "closed":
                    return
                if how == "an exception":
                    raise RuntimeError("user code")

    async def run():
        task = asyncio.create_task(read())
        if how == "its task cancelled":
            await asyncio.sleep(0.05)
            task.cancel()
        (problem,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(
            problem, {"an exception": RuntimeError, "its task cancelled": asyncio.CancelledError}.get(how, type(None))
        )
        assert await llm.drain(10)

    steps = llm._llm.group.mailbox.steps
    asyncio.run(run())
    assert llm._llm.group.mailbox.steps - steps < 400, "it was not cancelled but ran to its end"
    assert (llm.engine.free_slots, llm.engine.free_pages) == (4, int(llm._llm.shape["num_pages"]))


def test_abort(llm):
    async def run():
        tasks = [asyncio.create_task(all_of(llm, [i], greedy(max_tokens=400), f"r{i}")) for i in range(6)]  # two have to wait
        while llm.engine.num_running < 4:
            await asyncio.sleep(0.001)
        with pytest.raises(ValueError, match="'r1' is that of a running request"):
            await all_of(llm, request_id="r1")
        await llm.abort("r0")
        await llm.abort(["r1", "r5", "never seen"])
        await llm.abort(f"r{i}" for i in range(6))
        ended = [outputs[-1] for outputs in await asyncio.gather(*tasks)]
        assert await llm.drain(10)
        return ended

    for i, output in enumerate(asyncio.run(run())):
        assert (output.request_id, output.outputs[0].finish_reason) == (f"r{i}", "abort") and len(ids(output)) < 400


def test_stop_strings_and_the_next_turn(llm):
    async def run():
        prompt = list(range(1, 150))
        free = (await all_of(llm, prompt, greedy(max_tokens=60)))[-1]
        text = free.outputs[0].text
        stop = next(text[i : i + 3] for i in range(4, len(text)) if text.find(text[i : i + 3]) == i and text[i].isprintable())
        parts = await all_of(llm, prompt, greedy(max_tokens=60, stop=stop, output_kind=RequestOutputKind.DELTA))
        assert "".join(p.outputs[0].text for p in parts) == text[: text.index(stop)]
        assert (parts[-1].outputs[0].finish_reason, parts[-1].outputs[0].stop_reason) == ("stop", stop)
        assert parts[-1].num_cached_tokens == 128
        assert await llm.drain(10)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [([], greedy(), "no tokens|empty"), ([256], greedy(), "0 to 255"), ([1] * 512, greedy(), "at most 511")],
)
def test_bad_requests_leave_running_ones_alone(llm, prompt, params, words):
    async def run():
        running = asyncio.create_task(all_of(llm, params=greedy(max_tokens=30)))
        await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match=words):
            await all_of(llm, prompt, params)
        assert len(ids((await running)[-1])) == 30

    asyncio.run(run())


def test_a_killed_rank_ends_every_stream_with_one_sentence(folder):
    async def run():
        async with AsyncLLM(folder, **SETTINGS | {"max_model_len": 2048, "deadline_s": 2}) as llm:
            tasks = [asyncio.create_task(all_of(llm, [i], greedy(max_tokens=2000))) for i in range(6)]
            while llm.engine.num_running < 4:
                await asyncio.sleep(0.001)
            os.kill(pids(llm._llm.group)[1], signal.SIGKILL)
            problems = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(p, FaultError) and "rank 1" in str(p) for p in problems)
            with pytest.raises(FaultError, match="rank 1"):
                await all_of(llm)

    asyncio.run(run())


def test_shutdown_ends_what_runs(folder):
    async def run():
        llm = AsyncLLM(folder, **SETTINGS)
        tasks = [asyncio.create_task(all_of(llm, [i], greedy(max_tokens=500))) for i in range(6)]
        while llm.engine.num_running < 4 or llm.engine.num_waiting < 2:  # on a busy machine a task may not have submitted yet
            await asyncio.sleep(0.001)
        llm.shutdown()
        assert [outputs[-1].outputs[0].finish_reason for outputs in await asyncio.gather(*tasks)] == ["abort"] * 6
        with pytest.raises(ImexError, match="closed"):
            await all_of(llm)
        llm.shutdown()

    asyncio.run(run())
