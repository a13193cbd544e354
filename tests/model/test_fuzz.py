"""Files from strangers: whatever is in them, a model either opens or is refused by a ValueError in one short sentence."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from imex_persist.model.config import LIMITS, NEUTRAL, ModelConfig
from imex_persist.model.rope import rope_table
from imex_persist.model.safetensors import SafetensorsWeights
from imex_persist.model.shard import model_shape
from tests.model.helpers import TINY, random_tensors, tiny

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
PLAUSIBLE = st.integers(-1, 200) | st.sampled_from([1.0, 1e-5, 0.5, 1e4, "silu", True, False, None, [], [2]])
FIELDS = sorted(
    {*LIMITS, *NEUTRAL, *TINY, "rope_scaling", "rope_parameters", "bos_token_id", "tie_word_embeddings", "layer_types"}
)
ROPE = st.fixed_dictionaries(
    {},
    optional={key: PLAUSIBLE | st.sampled_from(["linear", "llama3", "default", "yarn"]) for key in (
        "type", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta",
    )},
)  # fmt: skip


def one_sentence(error: ValueError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 500, str(error)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from(FIELDS), PLAUSIBLE | ANYTHING | ROPE, max_size=4))
def test_config_fields(changes):
    try:
        config = ModelConfig.from_dict(TINY | changes)
    except ValueError as error:
        one_sentence(error)
        return
    assert np.isfinite(rope_table(config, 3)).all()
    model_shape(config, 3)


@settings(deadline=None, max_examples=100)
@given(ANYTHING)
def test_config_of_any_json(data):
    try:
        ModelConfig.from_dict(data)
    except ValueError as error:
        one_sentence(error)


def test_damaged_safetensors_headers(tmp_path):
    path = tmp_path / "model.safetensors"
    config = tiny()
    save_file(random_tensors(config), path)
    data = path.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        broken = bytearray(data)
        for at in rng.integers(0, header_bytes, 2):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            SafetensorsWeights(tmp_path, config)
        except ValueError as error:
            refused += 1
            one_sentence(error)
    assert refused > 150
    header = {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    try:
        SafetensorsWeights(tmp_path, config)
    except ValueError as error:
        one_sentence(error)
    else:
        raise AssertionError("a tensor of 2^80 elements was taken")
