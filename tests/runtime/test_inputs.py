"""Prompts, settings and capacity: what is taken, and one sentence for what is not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from imex_persist import SamplingParams, abi, planner
from imex_persist.config import EngineConfig
from imex_persist.model import packing
from imex_persist.model.config import ModelConfig
from imex_persist.planner import Machine
from imex_persist.runtime import capacity, inputs, strategy
from imex_persist.runtime.capacity import choose_shape, from_fields, shared_machine, to_fields
from tests.runtime.groups import CONFIG

GREEDY = SamplingParams(temperature=0)
SIM = Machine(4, 232_448, 12)


class Words:
    def encode(self, text):
        return [len(word) for word in text.split()]


def no_tokenizer():
    raise ValueError("no tokenizer")


def model(tokenizer=True):
    words = Words()
    require = (lambda: words) if tokenizer else no_tokenizer
    return SimpleNamespace(config=SimpleNamespace(vocab_size=100), require_tokenizer=require)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        (["a", [1]], ["a", [1]]),
        ([np.int64(1)], [[1]]),
    ],
)
def test_forms_of_prompts(given, prompts):
    assert inputs.as_list(given) == prompts


@pytest.mark.parametrize("given", [[], 3, None, b"bytes"])
def test_what_is_no_prompt(given):
    with pytest.raises(ValueError, match="prompt"):
        inputs.as_list(given)


def test_ids_of_a_prompt():
    assert inputs.to_ids("to be or", model()) == ("to be or", [2, 2, 2])
    assert inputs.to_ids([5, np.int32(6)], model()) == (None, [5, 6])
    assert inputs.to_ids({"prompt_token_ids": [1], "prompt": "x"}, model()) == ("x", [1])


@pytest.mark.parametrize(
    "prompt", ["", [], [100], [-1], [1.0], [True], ["a"], {"text": "a"}, {}, 3, {"prompt_token_ids": "12"}, "   "]
)
def test_bad_prompts(prompt):
    with pytest.raises(ValueError, match="prompt") as caught:
        inputs.to_ids(prompt, model())
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        inputs.to_ids("a", model(tokenizer=False))


def test_one_params_for_each_prompt():
    other = SamplingParams(temperature=0, max_tokens=3)
    assert inputs.params_for(["a", "b"], None, GREEDY) == [GREEDY, GREEDY]
    assert inputs.params_for(["a", "b"], other, GREEDY) == [other, other]
    assert inputs.params_for(["a", "b"], [GREEDY, other], GREEDY) == [GREEDY, other]
    for bad in ([GREEDY], "hot", [GREEDY, 3], {"temperature": 0}):
        with pytest.raises(ValueError, match="sampling_params"):
            inputs.params_for(["a", "b"], bad, GREEDY)


def test_submissions():
    params = SamplingParams(temperature=0, max_tokens=50, min_tokens=3, stop_token_ids=[7, 2])
    s = inputs.submission([1, 2], params, (2, 5), 100, 300)
    assert (s.max_tokens, s.min_tokens, s.stop_token_ids) == (50, 3, (2, 5, 7))
    assert inputs.submission([1] * 80, params, (), 100, 300).max_tokens == 20  # ends at max_model_len, as in vLLM
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    s = inputs.submission([1, 2], params, (2, 5), 100, 300)
    assert (s.max_tokens, s.stop_token_ids, s.sampling) == (98, (), None)
    with pytest.raises(ValueError, match="stop_token_ids has 300: integers of 0 to 299"):
        inputs.submission([1, 2], SamplingParams(stop_token_ids=[300]), (2, 5), 100, 300)


@pytest.mark.parametrize(
    "bad",
    [
        {"model": ""},
        {"model": 3},
        {"tensor_parallel_size": 0},
        {"tensor_parallel_size": 9},
        {"tensor_parallel_size": 1.5},
        {"max_model_len": 0},
        {"max_num_seqs": 33},
        {"max_rows": 17},
        {"kv_cache_memory_bytes": -1},
        {"load_format": "pickle"},
        {"seed": -1},
        {"exchange": "NCCL"},
        {"deadline_s": 0},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngineConfig(**{"model": "x", **bad})


def test_unknown_settings_are_errors():
    with pytest.raises(TypeError, match="gpu_memory_utilization"):
        EngineConfig(model="x", gpu_memory_utilization=0.9)


def shape_for(**settings):
    config = SimpleNamespace(**vars(CONFIG), max_position_embeddings=1024)
    return choose_shape(EngineConfig(model="x", **settings), config, SIM, "sim")


def test_shapes():
    s = shape_for()
    assert (int(s["max_rows"]), int(s["num_slots"])) == (8, 8)
    assert int(s["pages_per_slot"]) * int(s["page_size"]) >= 1024
    s = shape_for(max_model_len=100, max_num_seqs=3, max_rows=2, exchange="TWO_SHOT", tensor_parallel_size=2)
    assert (int(s["max_rows"]), int(s["num_slots"]), int(s["strategy"])) == (2, 3, abi.Strategy.TWO_SHOT)


def test_kv_memory_bounds_the_pages():
    whole = shape_for(max_model_len=512)
    each = 1024 * 32 * 4 * int(whole["num_kv_heads"]) // (1024 // int(whole["page_size"]))
    s = shape_for(max_model_len=512, kv_cache_memory_bytes=each * 10)
    assert int(s["pages_per_slot"]) <= int(s["num_pages"]) < int(whole["num_pages"])
    with pytest.raises(ValueError, match="raise kv_cache_memory_bytes"):
        shape_for(max_model_len=512, kv_cache_memory_bytes=each)


LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
LLAMA_1B |= {"intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True}


def on_a_gpu(free_gib: float, **settings):
    config = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **LLAMA_1B})
    return choose_shape(EngineConfig(model="x", **settings), config, Machine(), "cuda", int(free_gib * 2**30)), config


def test_a_gpu_s_kv_cache_is_what_the_sequences_can_use_or_what_is_free():
    page = 16 * 8 * 16384
    shape, config = on_a_gpu(79)
    assert planner.kv_bytes(shape) == 8 * 8192 // 64 * page  # eight sequences of 8192: 2 GiB
    shape, _ = on_a_gpu(79, max_model_len=131072, max_num_seqs=16)
    assert planner.kv_bytes(shape) == 16 * 131072 // 64 * page, "64 GiB: more than any fixed default"
    shape, _ = on_a_gpu(40, max_model_len=131072, max_num_seqs=16)
    fixed = sum(capacity.fixed_bytes(config, shape).values())
    room = 40 * 2**30 - capacity.RESERVE_BYTES - fixed - planner.kv_bytes(shape)
    assert 0 <= room < page, "as much as is free"
    assert (
        fixed - packing.rank_bytes(config, shape)["rope"] < 2.6e9
        and capacity.fixed_bytes(config, shape)["symmetric_bytes"] < 256 << 20
    )
    assert planner.kv_bytes(on_a_gpu(79, kv_cache_memory_bytes=600 << 20)[0]) == 600 << 20


@pytest.mark.parametrize(
    ("free_gib", "settings", "words"),
    [
        (3, {}, "use more ranks$"),
        (4, {"max_model_len": 131072}, "set max_model_len to at most .*, or use more ranks"),
        (79, {"kv_cache_memory_bytes": 90 << 30}, "or lower kv_cache_memory_bytes"),
        (79, {"kv_cache_memory_bytes": 32 << 20}, "set max_model_len to at most .*, or raise kv_cache_memory_bytes"),
        (79, {"kv_cache_memory_bytes": 1 << 20}, "are allowed: raise kv_cache_memory_bytes"),
    ],
)
def test_a_gpu_that_is_too_small(free_gib, settings, words):
    with pytest.raises(ValueError, match=words):
        on_a_gpu(free_gib, **settings)


def test_max_model_len_is_the_models_at_most():
    with pytest.raises(ValueError, match="use at most 1024"):
        capacity.choose_max_model_len(
            EngineConfig(model="x", max_model_len=1025), SimpleNamespace(max_position_embeddings=1024), "sim"
        )


def test_shapes_travel_as_json():
    s = shape_for(max_rows=3)
    assert from_fields(to_fields(s)).tobytes() == s.tobytes()
    with pytest.raises(ValueError, match="unknown"):
        from_fields({**to_fields(s), "more": 1})


def test_the_smallest_machine_counts():
    machines = [Machine(132, 232_448, 12), Machine(120, 233_472, 12)]
    assert shared_machine(machines, 1) == Machine(120, 232_448, 12)
    assert shared_machine(machines, 2).num_blocks == 60


@pytest.mark.parametrize(
    ("settings", "text", "one_row"),
    [
        ({"one_shot_rows": 2, "strategy": 1}, "ONE_SHOT <= 8 KB, ONE_SHOT_LOCAL above (planned)", "ONE_SHOT"),
        ({"one_shot_rows": 8, "strategy": 2}, "ONE_SHOT <= 32 KB (planned)", "ONE_SHOT"),
        ({"one_shot_rows": 0, "strategy": 2}, "TWO_SHOT (planned)", "TWO_SHOT"),
    ],
)
def test_the_strategy_line(settings, text, one_row):
    shape = np.zeros((), abi.Shape)
    shape["hidden_size"], shape["max_rows"] = 1024, 8
    for name, value in settings.items():
        shape[name] = value
    assert strategy.describe(shape, "planned") == text
    assert strategy.strategy_of(shape, 1) == one_row
