"""What the planner promises the kernel, beside what tests of the kernel see."""

from __future__ import annotations

import pytest

from imex_persist import abi, planner
from imex_persist.abi import Strategy
from tests.build.shapes import LLAMA_3_1_8B, LLAMA_3_2_1B, SMOLLM2_135M

MODELS = {"1b": LLAMA_3_2_1B, "8b": LLAMA_3_1_8B, "smollm2": SMOLLM2_135M}
GPU = planner.Machine(exact_header=True)


def last_epoch(shape) -> int:
    """Of the last step before epochs begin again (layer_epoch in cuda_src/block.cuh), lm_head's and sample's."""
    return (int(shape["renew_steps"]) - 1) * (int(shape["num_layers"]) + 2) + int(shape["num_layers"]) + 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("float24", "strategy", "bits"),
    [(False, None, 32), (True, None, 16), (True, Strategy.TWO_SHOT, 16), (True, Strategy.SEMAPHORE, 32)],
)
def test_no_two_epochs_look_alike_in_a_word(name, float24, strategy, bits):
    shape = planner.make_shape(MODELS[name], world_size=2, strategy=strategy, float24_partials=float24)
    assert 2 ** (bits - 3) < last_epoch(shape) < 2**bits  # and renewals are no more frequent than they must be


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_attention_has_room_for_every_warp(name, rows):
    s = planner.make_shape(MODELS[name], max_rows=rows, num_slots=rows, machine=GPU)
    sizes = {key: int(s[key]) for key in s.dtype.names}
    queries = sizes["attention_rows"] * sizes["num_heads"] // sizes["num_kv_heads"]
    warp = queries * (sizes["head_dim"] + abi.MERGE_EXTRA) * 4
    inputs = sizes["head_dim"] * 2 * queries
    assert sizes["scratch_warps"] * warp <= abi.STAGE_BYTES
    assert inputs + (abi.CONSUMER_WARPS - sizes["scratch_warps"]) * warp <= sizes["smem_part"] - sizes["smem_x"]


def test_an_exact_header_and_attention_in_the_ring_leave_room_for_a_stage_more():
    """Than a header for any shape, where a GPU's kernel is built for one row and slot."""
    for model, stages in ((LLAMA_3_2_1B, 13), (LLAMA_3_1_8B, 12)):
        exact, any_shape = (planner.make_shape(model, machine=machine) for machine in (GPU, planner.Machine()))
        assert exact["ring_stages"] == stages > any_shape["ring_stages"]
        assert exact["smem_x"] == planner.header_bytes(1, 1, GPU.max_stages) < any_shape["smem_x"] == abi.SHARED_HEADER_BYTES
        assert exact["smem_bytes"] <= GPU.shared_memory_bytes
