"""The benchmark kernels compile for every GPU that the decode kernel does, without local memory."""

from __future__ import annotations

import pytest

from imex_persist.bench.floor import WINDOWS, floor_shape
from imex_persist.device import nvrtc, sources
from tests.build.shapes import MACHINES


@pytest.mark.parametrize("arch", nvrtc.TARGETS)
def test_floor(arch):
    for window in WINDOWS:
        build = nvrtc.compile_kernel(floor_shape(MACHINES[arch], 1, 2, window), arch, sources.cuda_src() / "bench" / "floor.cu")
        spilled = {name: found for name, found in build.resources.items() if found.spills}
        assert not spilled and "cp.async.bulk" in build.ptx
