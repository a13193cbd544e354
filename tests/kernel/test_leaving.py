"""How the kernel ends when something is wrong, and that sequences share rows when there are more of them."""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist import abi, planner
from imex_persist.device.sim import SimDevice
from imex_persist.model.config import ModelConfig
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.reference import generate
from tests.kernel.harness import KernelRun

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "intermediate_size": 200,
        "vocab_size": 301,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
    }
)
DEADLINE_US = 50_000


@pytest.mark.parametrize("lanes", [1, 32])
@pytest.mark.parametrize("max_stages", [4, 5, 12])
def test_a_rank_that_never_answers_ends_the_kernel(lanes, max_stages):
    """Rank 1 is not launched. Rank 0 names it and returns, also with its producer held up by a full ring (few stages)."""
    device = SimDevice(lanes=lanes, num_blocks=2, max_stages=max_stages, on_deadlock="expire")
    shape = planner.make_shape(CONFIG, world_size=2, max_model_len=256, machine=device.machine)
    run = KernelRun(device, CONFIG, DummyWeights(CONFIG, seed=1), shape)
    params = run.params(mailbox=True).copy()
    params["num_ranks"] = 1
    params["ranks"][0]["deadline_us"] = DEADLINE_US
    run.host[abi.Mailbox.itemsize :].view(np.uint32)[:4] = [1, 2, 3, 0]  # three prompt ids, one page
    mailbox = run.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]
    run._descriptor(mailbox, 1, abi.Command.SUBMIT, prompt_len=3, num_pages=1, max_tokens=4)
    assert device.launch(run.kernel, params).wait(60), "the kernel did not return"
    fault = run.faults[: abi.FaultRecord.itemsize].view(abi.FaultRecord)[0]
    assert fault["valid"] and fault["rank"] == 0 and fault["source"] == 1
    assert fault["phase"] == abi.Phase.GATE_UP and fault["layer"] == 0, (
        "o_proj's sums of layer 0 are the first that rank 1 owes"
    )
    assert fault["waited_us"] >= DEADLINE_US


@pytest.mark.parametrize(("rows", "slots"), [(2, 5), (1, 3)])
def test_more_sequences_than_rows_all_get_theirs(rows, slots):
    device = SimDevice(lanes=1, num_blocks=4)
    weights = DummyWeights(CONFIG, seed=1)
    shape = planner.make_shape(CONFIG, world_size=2, max_rows=rows, num_slots=slots, max_model_len=256, machine=device.machine)
    run = KernelRun(device, CONFIG, weights, shape)
    requests = [{"prompt": [5 + i, 17, 200 - i, 33][: 2 + i % 3], "max_tokens": 6 + i} for i in range(slots)]
    expected = [generate(CONFIG, weights, r["prompt"], r["max_tokens"], world_size=2) for r in requests]
    assert run.decode(requests) == expected
