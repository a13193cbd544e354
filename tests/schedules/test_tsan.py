"""ThreadSanitizer on the whole kernel, one fiber a thread: what sanitized.KNOWN does not explain is a failure. And UBSan.

Words count as ordering here (cuda_src/sim/tsan.h); that they order nothing but themselves is for the weak-memory schedules.
"""

from __future__ import annotations

import pytest

from imex_persist.device import hostcc
from imex_persist.errors import DeviceError

from . import sanitized

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
    hostcc.build(1, tsan=True)
    out, err = sanitized.run("tsan", 1, None, "t0", "t1", "1")
    assert sanitized.races(err) == []
    assert out == "right", err[-4000:]


def test_nothing_undefined():
    """Address sanitizer adds nothing: all memory of a simulated kernel is two mappings; poison and misuse reports guard those."""
    hostcc.build(1, cxx=sanitized.UBSAN)
    out, err = sanitized.run("ubsan", 1, None, "t0", "t1", "1")
    assert "runtime error" not in err, err[:4000]
    assert out == "right", err[-4000:]
