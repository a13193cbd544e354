"""Finding a compiler, and what is said when there is none or a source does not compile."""

from __future__ import annotations

import importlib.util

import pytest

from imex_persist.device import hostcc
from imex_persist.errors import DeviceError
from tests.sim.kernels import HERE, Small


def test_a_compiler_from_the_environment_must_run(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    with pytest.raises(DeviceError, match="no-such-compiler -O9"):
        hostcc.find_compiler()


@pytest.mark.parametrize("command", ['"', " ", "odd"])
def test_what_is_no_command(monkeypatch, command, tmp_path):
    odd = tmp_path / "odd"
    odd.write_bytes(b"\x00\x01")  # may be executed, says its mode; what it is no kernel knows
    odd.chmod(0o755)
    monkeypatch.setenv("CXX", str(odd) if command == "odd" else command)
    with pytest.raises(DeviceError, match="unset it"):
        hostcc.find_compiler()


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="needs a C\\+\\+ compiler and this host has none"):
        hostcc.find_compiler()


def test_a_source_that_does_not_compile(tmp_path):
    bad = tmp_path / "bad.cu"
    bad.write_text("this is no kernel")
    with pytest.raises(DeviceError, match="does not compile for the simulator"):
        hostcc.build(1, bad)


def test_the_same_source_is_built_once():
    assert hostcc.build(1, HERE / "kv.cu") == hostcc.build(1, HERE / "kv.cu") != hostcc.build(32, HERE / "kv.cu")


def test_only_two_numbers_of_lanes():
    with pytest.raises(ValueError, match="lanes is 8"):
        hostcc.build(8)


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the ziglang wheel")
@pytest.mark.parametrize("lanes", [1, 32])
def test_the_ziglang_wheel_will_do(lanes):
    import sys

    kernel = Small("kv.cu", lanes, blocks=2, rounds=3, mode="random", delay=True, cxx=f"{sys.executable} -m ziglang c++")
    assert not kernel.run()[:2].any()
