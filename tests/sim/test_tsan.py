"""ThreadSanitizer on the simulator: silent about what is ordered, loud about what only happens to work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imex_persist.device import hostcc
from imex_persist.errors import DeviceError

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> tuple[str, str]:
    try:
        if "g++" not in hostcc.find_compiler().command[0]:
            pytest.skip("needs g++")
    except DeviceError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.sim.tsan_ring", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=hostcc.tsan_environment(), capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


@pytest.mark.parametrize("lanes", ["1", "32"])
def test_silent_about_the_ring(lanes):
    out, err = run(lanes)
    assert "data race" not in err, err[:4000]
    assert out == "right\n", err[-2000:]


@pytest.mark.parametrize(("lanes", "bug"), [("32", "WARP_SYNC"), ("32", "PART_WAIT"), ("1", "PART_WAIT")])
def test_loud_about_planted_bugs(lanes, bug):
    assert "WARNING: ThreadSanitizer: data race" in run(lanes, f"BUG_NO_{bug}")[1]
