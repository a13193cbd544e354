"""On a GPU, CuPy assembles, packs and makes the same bytes as NumPy."""

import numpy as np
import pytest

from imex_persist.model.dummy import DummyWeights
from imex_persist.model.packing import pieces
from imex_persist.model.weights import DictWeights
from imex_persist.planner import make_shape
from tests.model.helpers import random_tensors, tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_cupy_packs_the_same_bytes(dummy, world):
    cupy = pytest.importorskip("cupy")
    try:
        cupy.zeros(1)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(str(error))
    config = tiny(tie_word_embeddings=world == 1)
    tensors = random_tensors(config)
    for rank in range(world):
        shape = make_shape(config, world_size=world, max_model_len=64)
        streams = [
            pieces(DummyWeights(config, 2, xp) if dummy else DictWeights(tensors, config), config, shape, rank, xp=xp)
            for xp in (np, cupy)
        ]
        for (field, offset, array), (field_gpu, offset_gpu, array_gpu) in zip(*streams, strict=True):
            assert (field, offset) == (field_gpu, offset_gpu) and isinstance(array_gpu, cupy.ndarray)
            np.testing.assert_array_equal(cupy.asnumpy(array_gpu), array)
