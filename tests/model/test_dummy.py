"""Dummy weights: the same matrix on any number of ranks, never zero, sane statistics and logits."""

import numpy as np

from imex_persist.model.bf16 import to_float32
from imex_persist.model.config import ModelConfig
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.reference import logits
from tests.model.helpers import TINY, tiny

CONFIG = tiny()
DOWN = "model.layers.0.mlp.down_proj.weight"


def test_slices_are_slices_of_the_whole():
    source = DummyWeights(CONFIG, 5)
    whole = source.read(DOWN)
    assert whole.shape == (40, 70) and whole.dtype == np.uint16
    np.testing.assert_array_equal(source.read(DOWN, (3, 17), (8, 30)), whole[3:17, 8:30])
    np.testing.assert_array_equal(source.read(DOWN, columns=(8, 30)), whole[:, 8:30])
    norm = source.read("model.norm.weight")
    np.testing.assert_array_equal(source.read("model.norm.weight", (4, 9)), norm[4:9])


def test_seed_and_name_matter():
    one, other = DummyWeights(CONFIG, 1), DummyWeights(CONFIG, 2)
    assert (one.read(DOWN) != other.read(DOWN)).mean() > 0.9
    assert (one.read(DOWN) != one.read(DOWN.replace("layers.0", "layers.1"))).mean() > 0.9
    np.testing.assert_array_equal(one.read(DOWN), DummyWeights(CONFIG, 1).read(DOWN))


def test_statistics():
    config = ModelConfig.from_dict(TINY | {"hidden_size": 512, "intermediate_size": 1024})
    values = to_float32(DummyWeights(config).read("model.layers.0.mlp.gate_proj.weight"))
    assert not (values == 0).any() and np.isfinite(values).all()
    assert abs(values.std() * 512**0.5 - 1) < 0.01 and abs(values.mean()) < 1e-3
    for axis in (0, 1):  # neighbours are unrelated
        a, b = np.take(values, range(500), axis).ravel(), np.take(values, range(1, 501), axis).ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    norm = to_float32(DummyWeights(config).read("model.norm.weight"))
    assert 0.79 < norm.min() < 0.85 and 1.15 < norm.max() < 1.21


def test_logits_are_sane_and_do_not_depend_on_ranks():
    source = DummyWeights(CONFIG)
    one = logits(CONFIG, source, [1, 2, 3, 4])
    assert 0.5 < one.std() < 2
    assert abs(logits(CONFIG, source, [1, 2, 3, 4], world_size=2) - one).max() < 0.05
