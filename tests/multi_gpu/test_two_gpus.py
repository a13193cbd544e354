"""Two ranks on two GPUs, a process each, storing into each other's memory over CUDA IPC.

`TEST_DEVICE=sim pytest tests/multi_gpu` runs them as two simulators over shared memory, to test the tests.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from imex_persist import LLM
from imex_persist.model.dummy import DummyWeights
from imex_persist.planner import Machine
from imex_persist.runtime import startup
from imex_persist.runtime.capacity import shared_machine
from tests.gpu import test_accuracy as accuracy
from tests.gpu.bench import capable_gpus
from tests.gpu.test_accuracy import NUM_PROMPT, NUM_TOKENS, SEED, Subject, WholeRun
from tests.gpu.test_llm import (
    DEVICE,
    PROMPT,
    SETTINGS,
    SIMULATED,
    check_ended,
    check_greedy,
    check_killed_rank,
    check_memory_is_back,
    check_paris,
    greedy,
    ids,
    one_machine,
    save_model,
    used_bytes,
)
from tests.multi_gpu.ranks import ProcessRun
from tests.runtime.groups import pids

WORLD = 2
ONE_RUN = 256  # positions that one block attends to at once: up to there the number of blocks does not change a bit
PROMPTS = [PROMPT, [9] * 33, list(range(1, 150))]


def ordinals() -> list[int]:
    return [0, 1] if SIMULATED else capable_gpus()[0][:WORLD]


# ------------------------------------------------------------------------------------------------ through LLM
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_tokens(folder):
    """Those of the same two ranks in one launch, whose sums have the same order; and greedy, as those of one rank are."""
    params, tokens = greedy(max_tokens=100), {}
    for device, world in ((DEVICE, WORLD), (one_machine(), WORLD), (DEVICE, 1)):
        with LLM(folder, device=device, tensor_parallel_size=world, **SETTINGS) as llm:
            numbers, lines = pids(llm.group), startup.lines(llm.shape, llm.group)
            tokens[device, world] = [ids(output) for output in llm.generate(PROMPTS, params)]
        check_ended(llm, numbers)
        if (device, world) == (DEVICE, WORLD):
            assert len(numbers) == WORLD and len({identity["uuid"] for identity in llm.group.identities}) == WORLD
            topology = next(line for line in lines if line.startswith("topology: "))
            assert re.fullmatch(r"topology: (simulated|.*, peer access verified)", topology)
            chosen = next(line for line in lines if line.startswith("all-reduce strategy: "))
            assert chosen.endswith("(planned)" if SIMULATED else "(measured)")
    assert tokens[DEVICE, WORLD] == tokens[one_machine(), WORLD]
    for of_prompts in tokens.values():
        for prompt, answer in zip(PROMPTS, of_prompts, strict=True):
            check_greedy(folder, prompt, answer)


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_killed_rank_is_one_error_and_a_new_llm_works(folder, victim):
    check_killed_rank(folder, victim, device=DEVICE, tensor_parallel_size=WORLD)


@pytest.mark.skipif(SIMULATED, reason="the simulator's memory is the host's")
def test_memory_is_back(folder):
    before = [used_bytes(ordinal) for ordinal in ordinals()]
    with LLM(folder, device=DEVICE, tensor_parallel_size=WORLD, **SETTINGS) as llm:
        assert len(ids(llm.generate(PROMPT, greedy())[0])) == 40
        assert all(used_bytes(ordinal) > used for ordinal, used in zip(ordinals(), before, strict=True))
    for ordinal, used in zip(ordinals(), before, strict=True):
        check_memory_is_back(ordinal, used)


def test_smollm2_answers_paris():
    check_paris(device=DEVICE, tensor_parallel_size=WORLD)


# ------------------------------------------------------------------------------------------------ with the tap
SUBJECTS = [Subject(name, WORLD) for name in ("random0", "llama-3.2-1b") if name in accuracy.MODELS]


@pytest.fixture(scope="module", params=SUBJECTS, ids=str)
def run(request, tmp_path_factory):
    """A model that has decoded NUM_TOKENS tokens on both GPUs: test_accuracy's Decoded."""
    pytest.importorskip("torch")
    subject: Subject = request.param
    folder = tmp_path_factory.mktemp(subject.name)
    (folder / "config.json").write_text(json.dumps(accuracy.MODELS[subject.name]))

    def make_shape(machines: list[dict]) -> np.void:
        return subject.shape(shared_machine([Machine(**machine) for machine in machines], 1))

    kernel = ProcessRun(ordinals(), str(folder), SEED, make_shape)
    try:
        decoded = accuracy.Decoded(subject, kernel)
        decoded.start()
        yield decoded
    finally:
        kernel.close()
    accuracy.oracle_of.cache_clear()


def test_logits(run, record_property):
    """As test_accuracy asks of ranks in one launch: every position, against transformers in fp32 and bf16."""
    device = accuracy.open_device(1)
    oracle = accuracy.oracle_of(run.subject.name, accuracy.array_module(device))
    text = accuracy.check_logits(run.kernel, oracle, run.request["prompt"], run.tokens)
    device.close()
    record_property(f"{run.subject} on two GPUs", text)
    print(f"{run.subject} on two GPUs: {text}")


def test_ranks_agree(run):
    uuids = {identity["uuid"] for identity in run.kernel.identities}
    assert len(uuids) == WORLD
    run.kernel.decode([run.request | {"max_tokens": 30}])
    accuracy.check_ranks_agree(run.kernel)


def test_same_run_twice(run):
    assert run.kernel.decode([run.request]) == [run.tokens]
    accuracy.check_same_bits(run.memory, run.kernel.memory())


def test_same_bits_as_in_one_launch(run):
    """On one GPU a rank has half as many blocks, and nothing else is different."""
    device = accuracy.open_device(WORLD)
    shape = run.subject.shape(shared_machine([device.machine], WORLD))
    try:
        source = DummyWeights(run.subject.config, SEED, accuracy.array_module(device))
        one = WholeRun(device, run.subject.config, source, shape)
        count = min(NUM_TOKENS, ONE_RUN - NUM_PROMPT)
        request = run.request | {"max_tokens": count}
        assert one.decode([request]) == [run.tokens[:count]]
        assert run.kernel.decode([request]) == [run.tokens[:count]]
        np.testing.assert_array_equal(one.last_logits(1).view(np.uint32), run.kernel.last_logits(1).view(np.uint32))
    finally:
        device.close()
