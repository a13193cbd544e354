"""The benchmark kernels compile for every GPU that the decode kernel does, without local memory."""

from __future__ import annotations

import pytest

from imex_persist.bench.exchange import SOURCE, VARIANTS
from imex_persist.bench.floor import WINDOWS, floor_shape
from imex_persist.bench.probe import kernel_source
from imex_persist.device import nvrtc, sources
from tests.build.shapes import CASES, MACHINES

from .exchanges import shape_of


@pytest.mark.parametrize("arch", nvrtc.TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_exchange(arch, variant):
    """The loads that are polled are in flight together: none goes through local memory."""
    for hidden, rows in ((2048, 1), (2048, 4)):
        shape = shape_of(variant, 2, hidden=hidden, rows=rows, machine=MACHINES[arch])
        build = nvrtc.compile_kernel(shape, arch, kernel_source(SOURCE))
        spilled = {name: found for name, found in build.resources.items() if found.spills}
        assert not spilled and ".local" not in build.ptx


@pytest.mark.parametrize("arch", nvrtc.TARGETS)
def test_floor(arch):
    for window in WINDOWS:
        build = nvrtc.compile_kernel(floor_shape(MACHINES[arch], 1, 2, window), arch, sources.cuda_src() / "bench" / "floor.cu")
        spilled = {name: found for name, found in build.resources.items() if found.spills}
        assert not spilled and "cp.async.bulk" in build.ptx


@pytest.mark.parametrize("arch", nvrtc.TARGETS)
def test_marks(arch):
    shape, _ = CASES[-1].shape(arch)
    build = nvrtc.compile_kernel(shape, arch, sources.cuda_src() / "marks.cu")
    assert not any(found.spills for found in build.resources.values())
