"""LLM and the command line on the real kernel in the simulator, with a small model of random weights."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
from itertools import pairwise

import pytest

from imex_persist import LLM, DeviceError, FaultError, SamplingParams
from imex_persist.cli import main
from tests.runtime.groups import all_gone, pids

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 160,
    "vocab_size": 301,
    "max_position_embeddings": 4096,
    "eos_token_id": 0,
    "rms_norm_eps": 1e-5,
}
PROMPT = [5, 6, 7, 8]


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0, **{"max_tokens": 12, "ignore_eos": True, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, load_format="dummy", device="sim", tensor_parallel_size=2, max_model_len=256, max_num_seqs=3) as made:
        yield made


def ids(output) -> list[int]:
    return output.outputs[0].token_ids


def test_generate_is_vllm_shaped(llm):
    (output,) = llm.generate(PROMPT, greedy())
    assert output.prompt is None and output.prompt_token_ids == PROMPT and output.finished
    (completion,) = output.outputs
    assert (completion.index, completion.text, completion.finish_reason, completion.logprobs) == (0, "", "length", None)
    assert len(completion.token_ids) == 12 and all(0 <= t < 301 for t in completion.token_ids)
    assert output.metrics.time_to_first_token > 0 and len(output.metrics.device_time_ns) == 12


def test_company_does_not_change_the_tokens(llm):
    prompts = [[i + 1, 2 * i + 3, 40] * (i + 1) for i in range(7)]
    alone = [ids(llm.generate(prompt, greedy())[0]) for prompt in prompts]
    together = [ids(output) for output in llm.generate(prompts, greedy())]
    assert alone == together


def test_stop_token_ids(llm):
    tokens = ids(llm.generate(PROMPT, greedy())[0])
    stop = tokens[5]
    (output,) = llm.generate(PROMPT, greedy(stop_token_ids=[stop]))
    at = tokens.index(stop)
    assert ids(output) == tokens[: at + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_stream_is_generate_bit_by_bit(llm):
    steps = list(llm.stream(PROMPT, greedy()))
    assert [t for s in steps for t in s.token_ids] == ids(llm.generate(PROMPT, greedy())[0])
    assert [s.finish_reason for s in steps] == [None] * 11 + ["length"]


def drawn(**options) -> SamplingParams:
    return SamplingParams(**{"seed": 5, "max_tokens": 12, "ignore_eos": True, **options})


def test_a_seed_draws_the_same_tokens_whatever_the_company(llm):
    params = drawn(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    alone = ids(llm.generate(PROMPT, params)[0])
    together = llm.generate([[7] * 9, PROMPT, [3], PROMPT], [drawn(seed=None, max_tokens=30), params, greedy(), params])
    assert ids(together[1]) == ids(together[3]) == alone
    assert alone != ids(llm.generate(PROMPT, drawn(seed=6))[0])
    assert ids(llm.generate(PROMPT, drawn(seed=None))[0]) != ids(llm.generate(PROMPT, drawn(seed=None))[0])


def test_several_completions(llm):
    one, two = llm.generate([PROMPT, [4, 4]], [drawn(n=3), drawn()])
    assert [c.index for c in one.outputs] == [0, 1, 2] and len(two.outputs) == 1
    alone = [ids(llm.generate(PROMPT, drawn(seed=5 + i))[0]) for i in range(3)]
    assert [c.token_ids for c in one.outputs] == alone
    with pytest.raises(ValueError, match="a stream has one completion"):
        llm.stream(PROMPT, drawn(n=2))


def test_logprobs_are_vllm_shaped(llm):
    """Eight requests at once: more records than the ring holds."""
    for output in llm.generate([[i + 1, 40] for i in range(8)], drawn(logprobs=20, max_tokens=60)):
        (completion,) = output.outputs
        assert len(completion.logprobs) == 60
        for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
            assert next(iter(found)) == token and 20 <= len(found) <= 21
            best = sorted(found.values(), key=lambda one: one.rank)[:20]
            assert [one.rank for one in best] == list(range(1, 21))
            assert all(a.logprob >= b.logprob for a, b in pairwise(best))
            assert found[token].decoded_token is None and found[token].logprob < 0
        own = [found[token].logprob for token, found in zip(completion.token_ids, completion.logprobs, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(own))
    steps = list(llm.stream(PROMPT, greedy(logprobs=0, max_tokens=3)))
    assert [list(one.logprobs[0]) for one in steps] == [list(one.token_ids) for one in steps]
    assert all(one.logprobs[0][one.token_ids[0]].rank == 1 for one in steps)


def test_min_tokens_masks_end_tokens(llm):
    """They are not drawn, rather than drawn and ignored; EOS is masked also with ignore_eos, as in vLLM."""
    free = ids(llm.generate(PROMPT, greedy())[0])
    output = llm.generate(PROMPT, greedy(stop_token_ids=free[:2], min_tokens=6))[0]
    assert not set(ids(output)[:6]) & {*free[:2], CONFIG["eos_token_id"]}
    assert ids(output) != free


def test_dropping_a_stream_cancels(llm):
    stream = llm.stream(PROMPT, greedy(max_tokens=200))
    next(stream)
    del stream
    assert llm.engine.drain(10)
    assert llm.engine.free_slots == 3


class Session:
    """A stream in a cycle, so that the garbage collector drops it, wherever that runs."""

    def __init__(self, llm):
        self.stream, self.me = llm.stream(PROMPT, greedy(max_tokens=200)), self


@pytest.mark.timeout(120)
def test_streams_that_the_collector_drops(llm):
    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        for _ in range(60):
            next(Session(llm).stream)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert llm.engine.drain(30)
    assert llm.engine.free_slots == 3


@pytest.mark.timeout(120)
def test_an_llm_that_the_collector_drops(folder):
    owner = {"llm": LLM(folder, load_format="dummy", device="sim", max_model_len=256)}
    owner["me"] = owner  # only the collector finds it
    owner["llm"].generate(PROMPT, greedy(max_tokens=3))
    numbers = pids(owner["llm"].group)
    del owner
    gc.collect()
    assert all_gone(numbers, 20)


@pytest.mark.parametrize("given", [{"temperature": 0}, [SamplingParams(), SamplingParams()], [5]])
def test_bad_parameters_of_a_stream(llm, given):
    with pytest.raises(ValueError, match="sampling_params"):
        llm.stream(PROMPT, given)


@pytest.mark.parametrize("given", [{"role": "user", "content": "x"}, [5], "x", [[5]], [{"role": "user"}], []])
def test_bad_conversations(llm, given):
    with pytest.raises(ValueError, match=r"message|conversation"):
        llm.chat(given)


def test_an_exception_while_streaming_cancels(llm):
    with pytest.raises(RuntimeError), llm.stream(PROMPT, greedy(max_tokens=200)) as stream:
        for _ in stream:
            raise RuntimeError("user code")
    assert llm.engine.drain(10)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("text", greedy(), "no tokenizer"),
        ([301], greedy(), "0 to 300"),
        ([], greedy(), "empty"),
        ([[]], greedy(), "no tokens"),
        ([1] * 256, greedy(), "at most 255"),
        (PROMPT, greedy(stop_token_ids=[301]), "stop_token_ids has 301"),
        (PROMPT, SamplingParams(min_tokens=1, stop_token_ids=range(1, 17), max_tokens=2), "at most 16"),
        (PROMPT, greedy(stop="x"), "no tokenizer"),
        ([PROMPT, PROMPT], [greedy()], "sampling_params"),
    ],
)
def test_bad_requests_leave_running_ones_alone(llm, prompt, params, words):
    running = llm.stream(PROMPT, greedy(max_tokens=20))
    next(running)
    with pytest.raises(ValueError, match=words):
        llm.generate(prompt, params)
    assert len([t for s in running for t in s.token_ids]) == 19


def test_threads_may_share_an_llm(llm):
    wanted = ids(llm.generate(PROMPT, greedy())[0])
    got = []
    threads = [threading.Thread(target=lambda: got.append(ids(llm.generate(PROMPT, greedy())[0]))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [wanted] * 5


def test_no_call_reaches_a_device_while_decoding(folder):
    llm = LLM(folder, load_format="dummy", device="sim", tensor_parallel_size=2, max_model_len=256)
    llm.generate([PROMPT] * 3, greedy(max_tokens=60))
    llm.close()
    llm.close()
    assert [worker.returned["host_calls"] for worker in llm.group.workers] == [0, 0]
    assert [worker.process.returncode for worker in llm.group.workers] == [0, 0]


# -------------------------------------------------------------------------------------------------- command line
def test_generate_json(folder, capsys):
    command = ["generate", folder, "--load-format", "dummy", "--device", "sim", "--tp", "2", "--max-model-len", "128", "--json"]
    code = main([*command, "--prompt-token-ids", "5,6,7,8", "--max-tokens", "4", "--ignore-eos"])
    out, err = capsys.readouterr()
    assert code == 0
    result = json.loads(out)
    assert result["prompt_token_ids"] == PROMPT and len(result["outputs"][0]["token_ids"]) == 4
    lines = err.splitlines()
    assert lines[:2] == ["[imex] world size: 2, rank: 0", "[imex] world size: 2, rank: 1"]
    assert "[imex] topology: simulated" in lines and "[imex] exchange: ENABLED (in-kernel, tagged words)" in lines
    assert re.fullmatch(r"\[imex\] kernel: resident, \d+ blocks, sim", lines[-1])


def test_generate_draws_as_the_flags_say(folder, capsys):
    command = ["generate", folder, "--load-format", "dummy", "--device", "sim", "--max-model-len", "128", "--json"]
    command += ["--prompt-token-ids", "5,6,7,8", "--max-tokens", "8", "--temperature", "1.2", "--top-k", "50", "--top-p", "0.9"]
    command += ["--min-p", "0.01", "--repetition-penalty", "1.1", "--presence-penalty", "0.1", "--frequency-penalty", "0.1"]
    results = []
    for seed in ("3", "3", None):
        assert main([*command, "--logprobs", "2", "--stop-token-ids", "299,300", *(["--seed", seed] if seed else [])]) == 0
        results.append(json.loads(capsys.readouterr().out)["outputs"][0])
    assert results[0] == results[1] != results[2]
    assert [len(found) >= 2 for found in results[0]["logprobs"]] == [True] * len(results[0]["token_ids"])
    assert set(results[0]["logprobs"][0][0]) == {"token_id", "logprob", "rank", "decoded_token"}


def test_demo_ends_with_its_line(folder, capsys):
    assert main(["demo", "--model", folder, "--load-format", "dummy", "--device", "sim", "--max-model-len", "128"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[imex\] sim, 2 ranks, [A-Z_]+, \d+\.\d ms/token, \d+\.\d tok/s", out[-1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "/nowhere", "--prompt", "x", "--device", "sim"], "/nowhere"),
        (["generate", "MODEL"], "no prompt"),
        (["generate", "MODEL", "--prompt", "x", "--device", "tpu"], "device is 'tpu'"),
        (["generate", "MODEL", "--prompt", "x", "--device", "sim", "--tp", "99"], "tensor_parallel_size is 99"),
        (["generate", "MODEL", "--prompt", "x", "--device", "sim", "--max-model-len", "9999"], "use at most 4096"),
        (["generate", "MODEL", "--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "MODEL", "--prompt-token-ids", "1,x"], "comma-separated"),
        (["generate", "MODEL", "--prompt-token-ids", "1", "--stop-token-ids", "1,x"], "--stop-token-ids is '1,x'"),
        (["generate", "MODEL", "--prompt-token-ids", "1", "--top-p", "0"], "top_p is 0.0"),
        (["generate", "MODEL", "--prompt-token-ids", "1", "--logprobs", "2"], "add --json"),
        (["generate", "MODEL", "--prompt-token-ids", "1", "--chat"], "--chat needs text"),
        (["generate", "MODEL", "--prompt", "x", "--what"], "--what"),
        (["nothing"], "nothing"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_sentence(folder, capsys, arguments, words):
    arguments = [folder if a == "MODEL" else a for a in arguments]
    assert main([*arguments, *(["--load-format", "dummy"] if folder in arguments else [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"), [(FaultError("rank 1 ended"), 1), (DeviceError("no compiler"), 2), (ValueError("x"), 2)]
)
def test_exit_codes(folder, capsys, monkeypatch, error, code):
    def fail(*_args):
        raise error

    monkeypatch.setattr("imex_persist.cli._engine", fail)
    assert main(["generate", folder, "--prompt", "x"]) == code
    assert capsys.readouterr().err == f"imex-persist: error: {error}\n"


def test_auto_warns_once_where_there_is_no_gpu(folder, capsys, monkeypatch):
    monkeypatch.setattr("imex_persist.runtime.placement.find_gpus", list)
    assert main(["generate", folder, "--load-format", "dummy", "--prompt-token-ids", "1", "--max-tokens", "1"]) == 0
    assert capsys.readouterr().err.count("no GPU was found") == 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("imex-persist ")


def test_importing_is_light():
    code = "import sys, imex_persist; print([m for m in ('numpy', 'cupy', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
