"""Whole models on a GPU against transformers: 256 greedy tokens at TP 1, 2 and 4, the ranks being parts of one launch.

The kernel decodes alone first. Then prompts made of its own tokens, each one step longer, show the logits of every position in the
tap, since a step that samples computes those of all its rows. A position has the same bits in a prompt as when it was decoded: that
is checked too, and so the logits are those the tokens were chosen from.

`TEST_DEVICE=sim pytest --noconftest tests/gpu/test_accuracy.py` runs the small models in the simulator, to test the tests.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from unittest.mock import patch

import numpy as np
import pytest

from imex_persist import planner
from imex_persist.abi import Phase, Strategy
from imex_persist.device import nvrtc
from imex_persist.model.config import ModelConfig
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.packing import load_rank
from imex_persist.model.weights import tensor_shapes
from imex_persist.runtime.capacity import shared_machine
from imex_persist.tap import tap_floats, tap_offset
from tests.gpu.bench import capable_gpus
from tests.kernel import harness
from tests.kernel.harness import KernelRun
from tests.kernel.pages import garbage

SIMULATED = os.environ.get("TEST_DEVICE") == "sim"
SMALLER = 4 if SIMULATED else 1
SEED = 7
NUM_PROMPT, NUM_TOKENS = 16, 40 if SIMULATED else 256
MAX_MODEL_LEN = NUM_PROMPT + NUM_TOKENS
ALLOWED = 2.0  # times the error of bf16 transformers
MEMORY_BYTES = 256 << 20  # beside weights and KV pages
SIM_BLOCKS = 4  # of a rank

# ------------------------------------------------------------------------------------------------ the models
ROPES = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
)  # fmt: skip
BASE = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}


def random_fields(index: int) -> dict:
    """A config.json of sizes that divide nothing."""
    rng = np.random.default_rng([SEED, index])
    kv_heads, group = int(rng.integers(1, 6)), (4, 1, 3, 8, 2)[index % 5]
    return BASE | {
        "hidden_size": int(rng.integers(130, 900)) // SMALLER,
        "head_dim": (64, 128, 48, 96, 32)[index % 5],
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 2 * (int(rng.integers(150, 1200)) // SMALLER) + 1,
        "vocab_size": int(rng.integers(500, 6000)) // SMALLER,
        "num_hidden_layers": int(rng.integers(2, 6)),
        "tie_word_embeddings": bool(index % 2),
        "rope_parameters": ROPES[index % 3],
    }


LLAMA_1B = BASE | {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    "rope_parameters": ROPES[1] | {"factor": 32.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
MODELS = {f"random{i}": random_fields(i) for i in range(5)} | ({} if SIMULATED else {"llama-3.2-1b": LLAMA_1B})
ROWS = {"random3": 16, "random4": 4}  # of a step; 8 for all others


@dataclass(frozen=True)
class Subject:
    """A model of MODELS and how it is run."""

    name: str
    world_size: int = 1
    max_rows: int = 8

    def __str__(self) -> str:
        return f"{self.name}-tp{self.world_size}-rows{self.max_rows}"

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(MODELS[self.name])

    def shape(self, machine: planner.Machine) -> np.void:
        """On a machine of one rank's blocks."""
        return planner.make_shape(
            self.config, world_size=self.world_size, max_rows=self.max_rows, num_slots=min(8, self.max_rows),
            max_model_len=MAX_MODEL_LEN, machine=machine, tap=True, float24_partials=True,
        )  # fmt: skip

    def tokens(self, length: int, salt: int = 0) -> list[int]:
        rng = np.random.default_rng([SEED, salt, length])
        return [int(t) for t in rng.integers(0, self.config.vocab_size, length)]


SUBJECTS = [Subject(name, world, ROWS.get(name, 8)) for name in MODELS for world in (1, 2, 4)]
SUBJECTS += [Subject("llama-3.2-1b", 1, 1)] if "llama-3.2-1b" in MODELS else []


# ------------------------------------------------------------------------------------------------ the kernel
def open_device(world_size: int):
    """One GPU, or a simulator of enough blocks; the caller closes it."""
    if SIMULATED:
        from imex_persist.device.sim import SimDevice

        return SimDevice(num_blocks=SIM_BLOCKS * world_size)
    from imex_persist.device.cuda import CudaDevice

    return CudaDevice(capable_gpus()[0][0])


def array_module(device):
    """Where weights are made and packed."""
    return getattr(device, "xp", np)


def free_bytes(device) -> int:
    """Of the GPU, CuPy's own stock given back."""
    if SIMULATED:
        return 0
    device.xp.get_default_memory_pool().free_all_blocks()
    return device.memory()[0]


class WholeRun(KernelRun):
    """A KernelRun that can decode again and again, every time in memory of which nothing is as the last run left it."""

    def __init__(self, device, config, source, shape):
        with patch.object(harness, "load_rank", partial(load_rank, xp=array_module(device))):
            super().__init__(device, config, source, shape)
        self.noise = make_noise(shape)

    def clear(self) -> None:
        for memory, tap in zip(self.ranks, self.taps, strict=True):
            clear_rank(self.device, memory, tap, self.noise)

    def read(self, rank: int, what: str, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] of a rank's "tap", "kv" or "symmetric" memory."""
        return self.device.download(self.taps[rank] if what == "tap" else getattr(self.ranks[rank], what), offset, nbytes)

    # What follows is for runs of several processes too (tests/multi_gpu/ranks.py).
    def decode(self, requests: list[dict]) -> list[list[int]]:
        self.host[:] = 0
        self.faults[:] = 0
        self.clear()
        return super().decode(requests)

    def size(self, *fields: str) -> int:
        return int(np.prod([int(self.shape[field]) for field in fields]))

    def last_logits(self, rows: int) -> np.ndarray:
        """float32 [rows, vocab_size] of the last step that sampled."""
        offset, nbytes = 4 * tap_offset(self.shape, Phase.LM_HEAD), 4 * rows * self.size("vocab_rows")
        parts = [self.read(r, "tap", offset, nbytes).view(np.float32).reshape(rows, -1) for r in range(self.world)]
        return np.concatenate(parts, axis=1)[:, : self.config.vocab_size]

    def logits(self, tokens: list[int], first: int) -> dict[int, np.ndarray]:
        """Logits [vocab_size] after position p of `tokens`, from `first` on: all where a step has several rows, else some."""
        rows, found = self.size("max_rows"), {}
        ends = list(range(first // rows * rows + rows, len(tokens) + rows, rows))
        for end in ends if rows > 1 else ends[:: -max(1, len(ends) // 20)]:
            end = min(end, len(tokens))
            start = (end - 1) // rows * rows
            self.decode([{"prompt": tokens[:end], "max_tokens": 1}])
            found |= {p: row for p, row in enumerate(self.last_logits(end - start), start) if p >= first}
        return found

    def words(self, rank: int, field: str, count: int) -> np.ndarray:
        return self.read(rank, "symmetric", 8 * int(self.shape[field]), 8 * count).view(np.uint64)

    def sets(self, rank: int, field: str) -> np.ndarray:
        return harness.bare_sets(self.shape, field, lambda *part: self.read(rank, "symmetric", *part))

    def memory(self) -> list[np.ndarray]:
        """Every phase's output in the last step, and all keys and values, of every rank."""
        sizes = {"tap": 4 * tap_floats(self.shape), "kv": planner.kv_bytes(self.shape)}
        return [self.read(r, what, 0, nbytes) for r in range(self.world) for what, nbytes in sizes.items()]


def make_noise(shape: np.void) -> np.ndarray:
    """uint8, as many as there are bytes of KV pages."""
    return np.resize(garbage(np.random.default_rng(0), 500_009), planner.kv_bytes(shape) // 2).view(np.uint8)


def clear_rank(device, memory, tap, noise: np.ndarray) -> None:
    """As the kernel asks for it: words and claims zero. KV pages get noise, the tap NaN."""
    for buffer in (memory.symmetric, memory.claims):
        device.upload(buffer, 0, np.zeros(buffer.nbytes, np.uint8))
    device.upload(memory.kv, 0, noise)
    device.upload(tap, 0, np.full(tap.nbytes, 0xFF, np.uint8))


def compile_all(shapes: list[np.void], arch: str) -> None:
    """Into the cache, on all cores: one after another they would take longer than the tests. A test tells of a failure."""
    with ProcessPoolExecutor(min(len(shapes), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(nvrtc.compile_kernel, shape, arch) for shape in shapes], timeout=150)


# ------------------------------------------------------------------------------------------------ transformers
class Oracle:
    """transformers' model of the same weights, on the GPU (or CPU) that the kernel's weights were made on."""

    def __init__(self, name: str, xp):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers", "5.0")
        torch.set_float32_matmul_precision("highest")
        fields, config = MODELS[name], ModelConfig.from_dict(MODELS[name])
        place = "cpu" if xp is np else f"cuda:{xp.cuda.Device().id}"
        # transformers asks that heads divide the hidden size even where head_dim is given; its modules do not need it
        theirs = transformers.LlamaConfig(**(fields | {"hidden_size": 8 * config.num_attention_heads}))
        theirs.hidden_size = config.hidden_size
        source = DummyWeights(config, SEED, xp)
        weights = {key: torch.from_dlpack(source.read(key).view(xp.int16)) for key in tensor_shapes(config)}
        # in fp32 as exact as it goes; in bf16 what a user gets. Only from_config keeps RoPE's frequencies in fp32: .bfloat16() does not
        ways = {"fp32": (torch.float32, "eager"), "bf16": (torch.bfloat16, "sdpa")}
        self.torch, self.place, self.models = torch, place, {}
        for way, (dtype, attention) in ways.items():
            with torch.device(place):
                model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype, attn_implementation=attention).eval()
            state = {key: bits.to(place).view(torch.bfloat16).to(dtype) for key, bits in weights.items()}
            missing, unexpected = model.load_state_dict(state, strict=False)
            assert not unexpected and set(missing) == ({"lm_head.weight"} if config.tie_word_embeddings else set())
            assert model.dtype == dtype and model.model.rotary_emb.inv_freq.dtype == torch.float32
            self.models[way] = model

    def logits(self, way: str, tokens: list[int]) -> np.ndarray:
        """float32 [tokens, vocab_size]."""
        with self.torch.no_grad():
            ids = self.torch.tensor([tokens], device=self.place)
            return self.models[way](ids, use_cache=False).logits[0].float().cpu().numpy()


@lru_cache(maxsize=1)
def oracle_of(name: str, xp) -> Oracle:
    return Oracle(name, xp)


def check_logits(run: WholeRun, oracle: Oracle, prompt: list[int], tokens: list[int]) -> str:
    """Every token is the kernel's own first choice, and the logits it was chosen from are as near as the bound asks: how near."""
    sequence, first = [*prompt, *tokens[:-1]], len(prompt) - 1
    exact, rounded = oracle.logits("fp32", sequence)[first:], oracle.logits("bf16", sequence)[first:]
    found = run.logits(sequence, first)
    at = np.array(sorted(found)) - first
    got = np.stack([found[position] for position in sorted(found)])
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got.argmax(axis=1), np.array(tokens)[at], "these logits would have given other tokens")
    kernel, bf16 = np.abs(got - exact[at]).max(axis=1), np.abs(rounded - exact).max(axis=1)
    limit, ratios = ALLOWED * bf16.max(), kernel / bf16[at]
    margins = exact.max(axis=1) - exact[np.arange(len(tokens)), tokens]
    text = (
        f"{len(at)} positions: kernel {kernel.max():.4f}, bf16 {bf16.max():.4f}, ratio {kernel.max() / bf16.max():.2f} "
        f"(worst position {ratios.max():.2f}), {np.count_nonzero(margins)} tokens are not fp32's"
    )
    assert kernel.max() <= limit, f"token {at[kernel.argmax()]} is worst; {text}"
    assert margins.max() <= 2 * limit, f"token {margins.argmax()} is {margins.max():.4f} below the best one; {text}"
    assert ratios.max() <= ALLOWED, f"within the bound over all positions, but not at token {at[ratios.argmax()]}; {text}"
    return text


def check_ranks_agree(run: WholeRun) -> None:
    """What all ranks hold, they hold bit for bit: plans, the best tokens, the residual, the words of every exchange."""
    rows, wide = run.size("max_rows"), run.size("hidden_size")
    shared = {"off_plan": 2 * planner.plan_words(rows), "off_best": run.size("world_size", "num_blocks") * rows * 2}
    if run.size("strategy") != Strategy.TWO_SHOT:  # else only a slice's owner has its partial sums
        sources = run.world * rows * planner.partial_width(wide)
        shared |= {"off_o_part": sources, "off_down_part": sources * run.size("down_slices")}
    for rank in range(1, run.world):
        for name in "off_o_sum", "off_down_sum":
            np.testing.assert_array_equal(run.sets(rank, name), run.sets(0, name), f"{name} of rank {rank}")
    taps = 4 * tap_offset(run.shape, Phase.EMBED), 4 * rows * wide
    for rank in range(1, run.world):
        for name, count in shared.items():
            np.testing.assert_array_equal(run.words(rank, name, count), run.words(0, name, count), f"{name} of rank {rank}")
        np.testing.assert_array_equal(run.read(rank, "tap", *taps), run.read(0, "tap", *taps), f"residual of rank {rank}")


def check_same_bits(one: list[np.ndarray], two: list[np.ndarray]) -> None:
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16), f"{('tap', 'KV pages')[i % 2]} of rank {i // 2}")


# ------------------------------------------------------------------------------------------------ the tests
@pytest.fixture(scope="module")
def prepared(request):
    """All kernels that the chosen tests need are compiled, and what was imported no longer slows the collection before a launch."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers.models.llama.modeling_llama")
    chosen = {item.callspec.params["run"] for item in request.session.items if item.path == request.path}
    if not SIMULATED:
        device = open_device(1)
        compile_all([s.shape(shared_machine([device.machine], s.world_size)) for s in SUBJECTS if s in chosen], device.arch)
        device.close()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    oracle_of.cache_clear()


@dataclass
class Decoded:
    """A model that has decoded NUM_TOKENS tokens, and what its memory held then."""

    subject: Subject
    kernel: WholeRun
    allocated: int | None = None  # bytes of the GPU
    tokens: list[int] = field(default_factory=list)
    memory: list[np.ndarray] = field(default_factory=list)

    @property
    def request(self) -> dict:
        return {"prompt": self.subject.tokens(NUM_PROMPT), "max_tokens": NUM_TOKENS}

    def start(self) -> None:
        (self.tokens,) = self.kernel.decode([self.request])
        self.memory = self.kernel.memory()


@pytest.fixture(scope="module", params=SUBJECTS, ids=str)
def run(request, prepared):
    subject: Subject = request.param
    device = open_device(subject.world_size)
    try:
        free_before = free_bytes(device)
        shape = subject.shape(shared_machine([device.machine], subject.world_size))
        kernel = WholeRun(device, subject.config, DummyWeights(subject.config, SEED, array_module(device)), shape)
        allocated = free_before - free_bytes(device)
        decoded = Decoded(subject, kernel, allocated=None if SIMULATED else allocated)
        decoded.start()
        yield decoded
    finally:
        device.close()


def test_logits(run, record_property):
    """max |Δlogit| against fp32 transformers is at most twice that of bf16 transformers, over all positions and at every one."""
    assert len(run.tokens) == NUM_TOKENS
    oracle = oracle_of(run.subject.name, array_module(run.kernel.device))
    text = check_logits(run.kernel, oracle, run.request["prompt"], run.tokens)
    record_property(str(run.subject), text)
    print(f"{run.subject}: {text}")


def test_a_position_has_the_same_bits_in_a_prompt(run):
    """Else the logits that test_logits looks at would not be those of the decoded tokens."""
    prompt = run.request["prompt"]
    for length in (2, 17, NUM_TOKENS // 2, NUM_TOKENS):
        assert run.kernel.decode([run.request | {"max_tokens": length}]) == [run.tokens[:length]]
        decoded = run.kernel.last_logits(1)[0]
        position = len(prompt) + length - 2
        again = run.kernel.logits([*prompt, *run.tokens[: length - 1]], position)[position]
        np.testing.assert_array_equal(decoded.view(np.uint32), again.view(np.uint32), f"position {position}")


def test_same_run_twice(run):
    assert run.kernel.decode([run.request]) == [run.tokens]
    check_same_bits(run.memory, run.kernel.memory())


def test_ranks_agree(run):
    if run.kernel.world == 1:
        pytest.skip("one rank")
    run.kernel.decode([run.request | {"max_tokens": 30}])
    check_ranks_agree(run.kernel)


def test_alone_and_in_company(run):
    slots = run.kernel.size("num_slots")
    if slots == 1:
        pytest.skip("one slot")
    prompts = [run.subject.tokens(length, salt=1) for length in (1, 40, 7, 16, 3, 25, 9, 31)[:slots]]
    requests = [{"prompt": prompt, "max_tokens": 3 * NUM_TOKENS // 8} for prompt in prompts]
    together = run.kernel.decode(requests)
    for i, request in enumerate(requests):
        assert run.kernel.decode([request]) == [together[i]], f"request {i} of {slots}"


def test_memory(run):
    """GPU memory allocated is weights, KV pages and at most 256 MB."""
    if run.allocated is None:
        pytest.skip("the simulator's memory is the host's")
    ranks = run.kernel.ranks
    buffers = {buffer.address: buffer.nbytes for rank in ranks for buffer in (*rank.weights.values(), rank.kv)}
    taps = sum(tap.nbytes for tap in run.kernel.taps)  # for tests only
    assert run.allocated <= sum(buffers.values()) + taps + MEMORY_BYTES
