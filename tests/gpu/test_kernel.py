"""The kernel's tests (tests/kernel) on a GPU: every phase alone on every random case, whole models, the tap, and drawing.

On a GPU each shape is a build of its own. What the chosen tests will load is compiled first, by as many processes as there are
cores; what is in the cache already costs nothing. All ranks of a model run in one launch on one GPU.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from imex_persist.device import nvrtc
from tests.kernel import test_draw, test_drawing, test_phases, test_tap, test_whole

from .bench import capable_gpus

if importlib.util.find_spec("pytest_timeout"):
    pytestmark = pytest.mark.timeout(1800)  # the first test's includes the builds; a launch has a limit of its own
for module in (test_phases, test_tap, test_whole, test_draw, test_drawing):
    globals().update({name: test for name, test in vars(module).items() if name.startswith("test_")})


def compile_kernel(shape: bytes, dtype: np.dtype, arch: str) -> None:
    """In a process of its own; a failure is told by the test that then tries again."""
    try:
        nvrtc.compile_kernel(np.frombuffer(shape, dtype)[0], arch)
    except Exception as error:
        print(f"not built beforehand: {error}")


@pytest.fixture(scope="module", autouse=True)
def built(request):
    """All kernels that the chosen tests of this file load."""
    from imex_persist.device.cuda import CudaDevice

    device = CudaDevice(capable_gpus()[0][0])
    arch, machine = device.arch, device.machine
    device.close()
    shapes = {}
    for item in request.session.items:
        if item.path == request.path:
            params = getattr(item, "callspec", None)
            for case, options in item.function.kernels(**(params.params if params else {})):
                shape = case.shape(machine, **options)
                shapes[shape.tobytes()] = shape.dtype
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compile_kernel, shape, dtype, arch) for shape, dtype in shapes.items()]:
            future.result()


@pytest.fixture
def make_device(built):
    """make_device(num_blocks, …) as in tests/kernel/conftest.py; the shape says how many blocks there are, the hardware schedules."""
    from imex_persist.device.cuda import CudaDevice

    made = []

    def make(_num_blocks: int, **_sim_options) -> CudaDevice:
        made.append(CudaDevice(capable_gpus()[0][0]))
        return made[-1]

    yield make
    for device in made:
        device.close()
