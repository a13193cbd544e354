"""ThreadSanitizer on the whole kernel, one fiber a thread: what sanitized.KNOWN does not explain is a failure. UBSan and ASan too.

Words count as ordering here (cuda_src/sim/tsan.h); that they order nothing but themselves is for the weak-memory schedules.
"""

from __future__ import annotations

import pytest

from imex_persist.device import hostcc
from imex_persist.errors import DeviceError

from . import sanitized
from .mutations import Mutation

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(autouse=True)
def compiler():
    try:
        if "g++" not in hostcc.find_compiler().command[0]:
            pytest.skip("needs g++")
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("configuration", ["t0", "t1", "t2"])
def test_no_race_between_threads(configuration):
    hostcc.build(32, tsan=True)
    out, err = sanitized.run("tsan", 32, None, configuration)
    assert sanitized.races(err) == []
    assert out == "right", err[-4000:]


def test_no_race_between_warps():
    """In 41 some adders have no unit of their block's own slice of down_proj: words of the others say what they have read."""
    hostcc.build(1, tsan=True)
    out, err = sanitized.run("tsan", 1, None, "t0", "t1", "1", "41")
    assert sanitized.races(err) == []
    assert out == "right", err[-4000:]


def test_nothing_undefined():
    hostcc.build(1, cxx=sanitized.UBSAN)
    out, err = sanitized.run("ubsan", 1, None, "t0", "t1", "1")
    assert "runtime error" not in err, err[:4000]
    assert out == "right", err[-4000:]


@pytest.mark.parametrize("lanes", [1, 32])
def test_nothing_out_of_bounds(lanes):
    """Beyond a block's shared memory, a buffer of the kernel, or an array of the simulator."""
    hostcc.build(lanes, cxx=sanitized.ASAN)
    for configuration in ("t0", "t1", "1") if lanes == 1 else ("t1",):  # a process each: what was poisoned stays so
        out, err = sanitized.run("asan", lanes, None, configuration)
        assert "AddressSanitizer" not in err, err[:4000]
        assert out == "right", err[-4000:]


def test_it_would_be_found(tmp_path):
    """Claim counters of a step too many, and activations multiplied with what follows the ring."""
    for name, old, new in (
        ("stream.cuh", "+ layer * per_layer + which", "+ layer * per_layer + which + 2 * per_step"),
        (
            "stream.cuh",
            "tile = ring_stage(b, ahead(at, i).stage);",
            "tile = ring_stage(b, ahead(at, i).stage) + shape().ring_stages * kStageBytes;",
        ),
    ):
        mutant = Mutation("beyond", "an address", ((name, old, new),)).apply(tmp_path)
        hostcc.build(1, mutant, cxx=sanitized.ASAN)
        _, err = sanitized.run("asan", 1, mutant, "t0")
        assert "AddressSanitizer: use-after-poison" in err, err[-2000:]
