"""What NVML says, as topology shows it, as the start log says it, and as p2p_level judges it."""

from __future__ import annotations

import json
import sys

import pytest

from imex_persist.cli import main
from imex_persist.runtime import discover, topology
from imex_persist.runtime.peers import check_peers, describe_peers
from imex_persist.runtime.placement import Place, Placement
from imex_persist.runtime.topology import Topology, read_topology
from tests.front.fake_nvml import FakeNvml, NVMLError


def placed(count: int, each: int = 1) -> Placement:
    return Placement(
        tuple(Place("cuda", i, tuple(range(i * each, (i + 1) * each)), f"GPU-{i}{i}", "NVIDIA H200") for i in range(count))
    )


SWITCHED = FakeNvml(4, switch=18)
DIRECT = FakeNvml(2, links={(0, 1): 12})
PCIE = FakeNvml(2, ancestor=20, fabric=0)
MIXED = FakeNvml(3, links={(0, 1): 18}, p2p={2: 5})  # GPU 2 has no link


def test_an_nvswitch_machine():
    found = read_topology(SWITCHED)
    assert [(g.ordinal, g.uuid, g.numa_node, g.nvlink_generation, g.nvlink_links) for g in found.gpus][2] == (
        2,
        "GPU-22",
        1,
        "4",
        18,
    )
    gpu = found.gpus[0]
    assert (gpu.nvlink_switch, gpu.fabric_state, gpu.nvlink_link_gb_s, gpu.memory_bytes) == (
        True,
        "completed",
        26.562,
        143771 << 20,
    )
    assert len(found.pairs) == 6 and found.driver == "580.159.04" and found.note is None
    assert {(p.path, p.links, p.gb_s_each_way, p.via_switch, p.native_atomics) for p in found.pairs} == {
        ("NVLink", 18, 478.1, True, True)
    }
    assert SWITCHED.open == 0


def test_direct_links_and_pcie():
    (pair,) = read_topology(DIRECT).pairs
    assert (pair.path, pair.links, pair.gb_s_each_way, pair.via_switch) == ("NVLink", 12, 318.7, False)
    (pair,) = read_topology(PCIE).pairs
    assert (pair.path, pair.links, pair.gb_s_each_way, pair.pcie_level, pair.peer_access) == ("PCIe", 0, None, "PXB", True)
    assert [pair.path for pair in read_topology(MIXED).pairs] == ["NVLink", "PCIe", "PCIe"]


def test_no_peer_access():
    (pair,) = read_topology(FakeNvml(2, p2p={0: 1, 1: 1, 3: 1})).pairs
    assert (pair.path, pair.peer_access, pair.why_not, pair.native_atomics) == ("none", False, "chipset not supported", False)
    (pair,) = read_topology(FakeNvml(2, p2p=dict.fromkeys(range(4)))).pairs
    assert (pair.peer_access, pair.native_atomics) == (None, None)


def test_cuda_visible_devices():
    found = read_topology(SWITCHED, "3,GPU-11")
    assert [(g.ordinal, g.uuid) for g in found.gpus] == [(0, "GPU-33"), (1, "GPU-11")]
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1)]
    assert found.pair("GPU-11", "GPU-33") is found.pairs[0] and found.pair("GPU-11", "GPU-22") is None
    assert "hides every GPU of 4" in read_topology(SWITCHED, "").note


def test_nvml_that_fails(monkeypatch):
    class Broken(FakeNvml):
        def nvmlDeviceGetUUID(self, handle):
            raise NVMLError("GPU is lost")

    broken = Broken()
    assert "GPU is lost" in read_topology(broken).note and broken.open == 0
    monkeypatch.setattr(discover, "find_gpus", lambda: [discover.Gpu(0, "GPU-00", "NVIDIA H200", (9, 0))])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = read_topology()
    assert [g.name for g in found.gpus] == ["NVIDIA H200"] and "nvidia-ml-py is not installed" in found.note


# -------------------------------------------------------------------------------------------------- the start log
@pytest.mark.parametrize(
    ("nvml", "count", "line"),
    [
        (SWITCHED, 4, "NVLink, 18 links, 478 GB/s each way, peer access verified"),
        (PCIE, 2, "PCIe, no NVLink between GPU 0 and GPU 1, peer access verified"),
        (MIXED, 2, "NVLink, 18 links, 478 GB/s each way, peer access verified"),
        (MIXED, 3, "PCIe, no NVLink between GPU 0 and GPU 2, peer access verified"),
    ],
)
def test_the_topology_line(nvml, count, line):
    assert describe_peers(placed(count).places, lambda: read_topology(nvml)) == line


def test_the_topology_line_elsewhere():
    assert describe_peers((Place("sim", 0, (0,)), Place("sim", 1, (1,)))) == "simulated"
    assert describe_peers(placed(1, 2).places) == "one GPU (NVIDIA H200), 2 rank(s)"
    line = describe_peers(placed(2).places, lambda: Topology(note="nvidia-ml-py is not installed"))
    assert line == "2 GPUs (NVIDIA H200), links unknown (nvidia-ml-py is not installed), peer access verified"


# -------------------------------------------------------------------------------------------------- p2p_level
def judged(level: str | None, nvml, count: int) -> str | None:
    try:
        check_peers(level, placed(count), lambda: read_topology(nvml))
    except ValueError as error:
        return str(error)
    return None


def test_p2p_level_nvl():
    assert judged("NVL", SWITCHED, 4) is None and judged(None, PCIE, 2) is None and judged("NVL", PCIE, 1) is None
    assert "between GPU 0 (NVIDIA H200) and GPU 2 the way is PCIe" in judged("NVL", MIXED, 3)
    assert "there is no peer access" in judged("NVL", FakeNvml(2, p2p={0: 1, 1: 1}), 2)
    with pytest.raises(ValueError, match="is unknown"):
        check_peers("NVL", placed(2), lambda: Topology(note="nvidia-ml-py is not installed"))


def test_p2p_level_by_pcie_distance():
    assert [judged(level, PCIE, 2) is None for level in ("PIX", "PXB", "PHB", "SYS")] == [False, True, True, True]


def test_p2p_level_loc():
    assert "tensor_parallel_size is 2" in judged("LOC", SWITCHED, 2) and judged("LOC", SWITCHED, 1) is None
    with pytest.raises(ValueError, match="LOC"):
        check_peers("LOC", Placement((Place("sim", 0, (0, 1)),)))


def test_generate_respects_nccl_p2p_level(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NCCL_P2P_LEVEL", "LOC")
    assert main(["generate", str(tmp_path), "--prompt", "x", "--device", "sim", "--tp", "2"]) == 2
    assert "p2p_level is LOC" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def nvml(monkeypatch):
    """nvml(fake): what `import pynvml` gives."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda fake: monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_the_tables(nvml, capsys, monkeypatch):
    nvml(MIXED)
    assert main(["topology"]) == 0
    out = capsys.readouterr().out
    for words in ("driver 580.159.04", "NVIDIA H200", "GPU-22", "140.4 GiB", "PCIe only", "478.1", "not measured", "completed"):
        assert words in out
    assert "\x1b" not in out


def test_json_and_require(nvml, capsys):
    nvml(SWITCHED)
    assert main(["topology", "--json", "--require", "4"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["pairs"][5]["gb_s_each_way"] == 478.1 and data["gpus"][3]["capability"] == [9, 0] and data["missing"] is None
    assert main(["topology", "--require", "8"]) == 1
    assert "not met: 4 GPU(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (FakeNvml(2, p2p={0: 1, 1: 1}), "have no peer access (chipset not supported)"),
        (FakeNvml(2, p2p=dict.fromkeys(range(4))), "is unknown"),
        (FakeNvml(2, capability=(8, 0)), "0 GPU(s) of compute capability 9.0"),
    ],
)
def test_require_finds_what_is_missing(nvml, capsys, fake, words):
    nvml(fake)
    assert main(["topology", "--require", "2"]) == 1
    assert words in capsys.readouterr().out


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(topology.discover, "find_gpus", list)
    assert main(["topology"]) == 0
    assert "no GPU found" in capsys.readouterr().out
    assert main(["topology", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == []
    assert main(["topology", "--require", "0"]) == 2
