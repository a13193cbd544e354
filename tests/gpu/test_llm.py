"""LLM on one GPU, with its processes: from a folder as transformers writes it to tokens, and back to a clean machine.

`TEST_DEVICE=sim pytest --noconftest tests/gpu/test_llm.py` runs it in the simulator, to test the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from imex_persist import LLM, FaultError, SamplingParams
from imex_persist.cli import main
from imex_persist.model.config import ModelConfig
from imex_persist.model.load import load_model
from imex_persist.model.packing import rank_bytes
from imex_persist.model.reference import Reference
from imex_persist.model.sampling import log_softmax
from imex_persist.planner import kv_bytes
from imex_persist.runtime import startup
from imex_persist.runtime.discover import find_gpus
from tests.gpu.bench import capable_gpus
from tests.kernel.whole import logit_limit
from tests.model.helpers import random_tensors
from tests.runtime.groups import all_gone, pids

SIMULATED = os.environ.get("TEST_DEVICE") == "sim"
DEVICE = "sim" if SIMULATED else "cuda"
DEADLINE_S = 2.0
GRACE_S = 3.0  # beyond the deadline, for a fault to be told
MEMORY_BYTES = 256 << 20  # of a GPU, beside weights, KV pages and the CUDA context
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 701,
    "vocab_size": 1003,
    "tie_word_embeddings": False,
    "max_position_embeddings": 65536,
    "eos_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LARGE = CONFIG | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
LARGE |= {"intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True}  # the shapes of Llama-3.2-1B
PROMPT = [5, 6, 7, 8]
LONG = 500 if SIMULATED else 60_000  # tokens: seconds, so that a test can interfere
SETTINGS = {"max_model_len": 512 if SIMULATED else 65536, "max_num_seqs": 3, "deadline_s": DEADLINE_S}


def one_machine() -> str:
    """The device on which all ranks are parts of one launch."""
    return "sim:0" if SIMULATED else f"cuda:{capable_gpus()[0][0]}"


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0, **{"max_tokens": 40, "ignore_eos": True, **options})


def ids(output) -> list[int]:
    return output.outputs[0].token_ids


def save_model(path, config: dict = CONFIG) -> str:
    """config.json and model.safetensors in bf16, with the names and shapes of LlamaForCausalLM.save_pretrained."""
    (path / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(ModelConfig.from_dict(config), seed=4)
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}, path / "model.safetensors")
    return str(path)


def check_greedy(folder: str, prompt: list[int], tokens: list[int]) -> None:
    """Every token has the reference's largest logit, or one that the tolerance cannot tell from it (tests/kernel/whole.py)."""
    model = load_model(folder)
    reference = Reference(model.config, model.weights)
    logits = reference.forward(reference.sequence(), [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    margins = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
    assert np.all(margins <= 2 * logit_limit(logits)), f"tokens {tokens} are not greedy; margins {margins}"


def used_bytes(ordinal: int) -> int:
    """Of a GPU, by all processes."""
    (gpu,) = [gpu for gpu in find_gpus() if gpu.ordinal == ordinal]
    query = ["nvidia-smi", "-i", gpu.uuid, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout) << 20


def check_ended(llm: LLM, numbers: list[int]) -> None:
    """Closed as it should be: all processes are gone, by themselves, and none of their kernels needed the host while resident."""
    assert all_gone(numbers, 5)
    assert [worker.process.returncode for worker in llm.group.workers] == [0] * len(numbers)
    assert [worker.returned["host_calls"] for worker in llm.group.workers] == [0] * len(numbers)


def check_killed_rank(folder: str, victim: int, **settings) -> None:
    """SIGKILL while decoding is one FaultError in time, with what there is; then a new LLM works."""
    with LLM(folder, **SETTINGS | settings) as first:
        numbers = pids(first.group)
        stream = first.stream(PROMPT, greedy(max_tokens=LONG))
        next(stream)
        os.kill(numbers[victim], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(FaultError, match=f"rank {victim}"):
            list(stream)
        assert time.monotonic() - start < DEADLINE_S + GRACE_S
        assert 0 < len(ids(stream.result)) < LONG
        with pytest.raises(FaultError):
            first.generate(PROMPT, greedy())
        assert all_gone(numbers, 5)
    with LLM(folder, **SETTINGS | settings) as second:
        numbers = pids(second.group)
        check_greedy(folder, PROMPT, ids(second.generate(PROMPT, greedy())[0]))
    check_ended(second, numbers)


def check_paris(**settings) -> None:
    """SmolLM2, where it and the package that reads its GGUF file are installed."""
    try:
        model = load_model("smollm2")
        model.weights.read("model.norm.weight")
        model.weights.read("model.layers.0.mlp.up_proj.weight", (0, 8))
    except ValueError as error:
        pytest.skip(str(error))
    with LLM("smollm2", max_model_len=512, **settings) as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        (answer,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=24))
        assert "Paris" in answer.outputs[0].text and answer.outputs[0].finish_reason == "stop"


# ------------------------------------------------------------------------------------------------ one rank
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, device=DEVICE, **SETTINGS) as made:
        yield made


def test_generate(llm, folder):
    (output,) = llm.generate(PROMPT, greedy())
    (completion,) = output.outputs
    assert output.finished and (completion.text, completion.finish_reason) == ("", "length")
    assert len(ids(output)) == 40 == len(output.metrics.device_time_ns)
    check_greedy(folder, PROMPT, ids(output))


def test_stream_is_generate(llm):
    steps = list(llm.stream(PROMPT, greedy()))
    assert [t for step in steps for t in step.token_ids] == ids(llm.generate(PROMPT, greedy())[0])
    assert [step.finish_reason for step in steps] == [None] * 39 + ["length"]


def test_company_does_not_change_the_tokens(llm):
    prompts = [[i + 1, 2 * i + 3, 40] * (3 * i + 1) for i in range(7)]
    alone = [ids(llm.generate(prompt, greedy())[0]) for prompt in prompts]
    assert [ids(output) for output in llm.generate(prompts, greedy())] == alone


def test_the_next_turn_computes_what_is_new_and_says_the_same(llm, folder):
    prompt = [(7 * i) % 1003 for i in range(200)]
    turn = [*prompt, *ids(llm.generate(prompt, greedy())[0]), 17, 4]
    (shared,) = llm.generate(turn, greedy())
    assert shared.num_cached_tokens == 239 // int(llm.shape["page_size"]) * int(llm.shape["page_size"])
    with LLM(folder, device=DEVICE, enable_prefix_caching=False, **SETTINGS) as other:
        (alone,) = other.generate(turn, greedy())
        (again,) = other.generate(turn, greedy())
    assert alone.num_cached_tokens == again.num_cached_tokens == 0
    assert ids(shared) == ids(alone) == ids(again)
    check_greedy(folder, turn, ids(shared))


def test_a_stop_token_ends(llm):
    tokens = ids(llm.generate(PROMPT, greedy())[0])
    (output,) = llm.generate(PROMPT, greedy(stop_token_ids=[tokens[9]]))
    assert ids(output) == tokens[: tokens.index(tokens[9]) + 1] and output.outputs[0].finish_reason == "stop"


def test_dropping_a_stream_cancels(llm):
    before = llm.group.mailbox.steps
    stream = llm.stream(PROMPT, greedy(max_tokens=LONG))
    next(stream)
    del stream
    assert llm.engine.drain(10)
    assert (llm.engine.free_slots, llm.engine.free_pages) == (3, int(llm.shape["num_pages"]))
    assert llm.group.mailbox.steps - before < LONG, "it was not cancelled but ran to its end"
    assert len(ids(llm.generate(PROMPT, greedy())[0])) == 40


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("text", greedy(), "no tokenizer"),
        ([1003], greedy(), "0 to 1002"),
        ([1] * SETTINGS["max_model_len"], greedy(), f"at most {SETTINGS['max_model_len'] - 1}"),
        (PROMPT, SamplingParams(stop_token_ids=[1003]), "stop_token_ids has 1003"),
    ],
)
def test_bad_requests_leave_running_ones_alone(llm, prompt, params, words):
    running = llm.stream(PROMPT, greedy())
    next(running)
    with pytest.raises(ValueError, match=words):
        llm.generate(prompt, params)
    assert len([t for step in running for t in step.token_ids]) == 39


def test_sampling(llm, folder):
    """Seeds, log-probabilities against the reference's, and what min_tokens and stop tokens do, through the whole engine."""
    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=5, max_tokens=20, logprobs=20, ignore_eos=True)
    (first,), (again,) = llm.generate(PROMPT, params), llm.generate([PROMPT, [9] * 40, [3]], params)[:1]
    assert ids(first) == ids(again) != ids(llm.generate(PROMPT, greedy(max_tokens=20))[0])
    model = load_model(folder)
    reference = Reference(model.config, model.weights)
    logits = reference.forward(reference.sequence(), [*PROMPT, *ids(first)[:-1]])[len(PROMPT) - 1 :]
    for token, found, exact, limit in zip(
        ids(first), first.outputs[0].logprobs, logits, np.broadcast_to(logit_limit(logits), len(logits)), strict=True
    ):
        assert token in found and 20 <= len(found) <= 21
        for id, one in found.items():
            assert abs(one.logprob - log_softmax(exact)[id]) <= 2 * limit
    (masked,) = llm.generate(
        PROMPT, greedy(max_tokens=12, min_tokens=6, stop_token_ids=ids(llm.generate(PROMPT, greedy())[0])[:3])
    )
    assert not set(ids(masked)[:6]) & set(ids(llm.generate(PROMPT, greedy())[0])[:3])
    (several,) = llm.generate(PROMPT, SamplingParams(n=3, seed=5, max_tokens=5))
    assert [one.index for one in several.outputs] == [0, 1, 2]


def test_two_after_each_other_and_no_host_calls(llm, folder):
    """The second beside the one of the other tests, which idles meanwhile; then the command line."""
    wanted = ids(llm.generate(PROMPT, greedy())[0])
    for _ in range(2):
        with LLM(folder, device=DEVICE, **SETTINGS) as made:
            numbers = pids(made.group)
            assert [ids(output) for output in made.generate([PROMPT] * 4, greedy())] == [wanted] * 4
        made.close()
        check_ended(made, numbers)


def test_command_line(folder, capsys):
    words = f"--device {DEVICE} --max-model-len {SETTINGS['max_model_len']} --max-num-seqs 3 --json"
    words += " --prompt-token-ids 5,6,7,8 --max-tokens 12 --ignore-eos"
    assert main(["generate", folder, *words.split()]) == 0
    out, err = capsys.readouterr()
    check_greedy(folder, PROMPT, json.loads(out)["outputs"][0]["token_ids"])
    assert "[imex] world size: 1, rank: 0" in err and "[imex] kernel: resident" in err


# ------------------------------------------------------------------------------------------------ what can go wrong
def test_a_killed_process_is_one_error_and_a_new_llm_works(folder):
    check_killed_rank(folder, 0, device=DEVICE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 99}, "tensor_parallel_size is 99"),
        ({"device": "cuda:77"}, "GPUs 0 to|no GPU was found"),
        ({"device": "cuda", "tensor_parallel_size": 8}, r"tensor_parallel_size is 8 but \d capable|no GPU was found"),
        ({"max_model_len": 99999}, "use at most 65536"),
        ({"kv_cache_memory_bytes": 1000}, "raise kv_cache_memory_bytes"),
        ({"load_format": "pickle"}, "load_format is 'pickle'"),
    ],
)
def test_bad_settings(folder, settings, words):
    if settings.get("tensor_parallel_size") == 8 and len(capable_gpus()[0]) >= 8:
        pytest.skip("this machine has as many GPUs")
    with pytest.raises(ValueError, match=words) as caught:
        LLM(folder, **{"device": DEVICE, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "missing", "another shape"])
def test_bad_files(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "missing":
        file.unlink()
    else:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 702}))
    words = {"truncated": "no complete safetensors file", "missing": "neither model.safetensors", "another shape": "has shape"}
    with pytest.raises(ValueError, match=words[damage]):
        LLM(str(tmp_path), device=DEVICE)


@pytest.mark.skipif(SIMULATED, reason="of CUDA only")
def test_launch_blocking_is_refused(folder, monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(ValueError, match="CUDA_LAUNCH_BLOCKING"):
        LLM(folder, device=DEVICE)


# ------------------------------------------------------------------------------------------------ more of the machine
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_in_one_launch(folder, world_size):
    with LLM(folder, device=one_machine(), tensor_parallel_size=world_size, **SETTINGS) as llm:
        numbers = pids(llm.group)
        assert len(numbers) == 1
        lines = startup.lines(llm.shape, llm.group)
        assert f"world size: {world_size}, rank: {world_size - 1}" in lines
        assert "exchange: ENABLED (in-kernel, tagged words)" in lines
        prompts = [PROMPT, [9] * 33]
        outputs = llm.generate(prompts, greedy())
        for prompt, output in zip(prompts, outputs, strict=True):
            check_greedy(folder, prompt, ids(output))
        assert [ids(output) for output in llm.generate(prompts, greedy())] == [ids(output) for output in outputs]
    check_ended(llm, numbers)


@pytest.mark.skipif(SIMULATED, reason="the simulator's memory is the host's")
def test_memory(tmp_path):
    """Beside weights and KV pages a rank takes at most 256 MB; the CUDA context is not counted: a tiny model has the same."""
    ordinal = capable_gpus()[0][0]
    before, used, known = used_bytes(ordinal), {}, {}
    for name, config in (("tiny", CONFIG), ("large", LARGE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        settings = {"load_format": "dummy", "device": f"cuda:{ordinal}", "max_model_len": 4096, "max_num_seqs": 4}
        with LLM(str(tmp_path / name), **settings) as llm:
            assert len(ids(llm.generate(PROMPT, greedy())[0])) == 40
            used[name] = used_bytes(ordinal) - before
            known[name] = sum(rank_bytes(llm.model.config, llm.shape).values()) + kv_bytes(llm.shape)
    print("MB beside weights and KV pages, context included:", {name: (used[name] - known[name]) >> 20 for name in used})
    assert used["large"] - used["tiny"] <= known["large"] - known["tiny"] + MEMORY_BYTES
    check_memory_is_back(ordinal, before)


def check_memory_is_back(ordinal: int, before: int, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while (now := used_bytes(ordinal)) > before + (8 << 20):
        assert time.monotonic() < end, f"GPU {ordinal}: {(now - before) >> 20} MB are still in use"
        time.sleep(0.2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_smollm2_answers_paris(world_size):
    check_paris(device=one_machine(), tensor_parallel_size=world_size)
