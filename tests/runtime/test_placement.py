"""Which rank lives where, and what is said when it cannot."""

from __future__ import annotations

import pytest

from imex_persist import DeviceError
from imex_persist.runtime import discover, placement
from imex_persist.runtime.discover import Gpu, parse_smi, visible
from imex_persist.runtime.placement import place_ranks

H100 = [Gpu(i, f"GPU-{i}{i}", "NVIDIA H100", (9, 0)) for i in range(4)]
A100 = [Gpu(0, "GPU-a", "NVIDIA A100", (8, 0))]


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    monkeypatch.setattr(placement, "missing_packages", lambda: None)


def ranks(device, world_size, gpus=()):
    placed = place_ranks(device, world_size, list(gpus))
    return [(p.kind, p.ordinal, p.ranks) for p in placed.places]


def test_a_machine_for_every_rank():
    assert ranks("sim", 2) == [("sim", 0, (0,)), ("sim", 1, (1,))]
    assert ranks("cuda", 2, H100) == [("cuda", 0, (0,)), ("cuda", 1, (1,))]
    assert place_ranks("cuda", 1, H100).places[0].uuid == "GPU-00"


def test_ordinals_divide_the_ranks():
    assert ranks("cuda:2", 4, H100) == [("cuda", 2, (0, 1, 2, 3))]
    assert ranks("cuda:3,1", 4, H100) == [("cuda", 3, (0, 1)), ("cuda", 1, (2, 3))]
    assert ranks("sim:0", 3) == [("sim", 0, (0, 1, 2))]


def test_auto_takes_capable_gpus():
    assert ranks("auto", 1, [*A100, Gpu(1, "GPU-b", "NVIDIA H200", (9, 0))]) == [("cuda", 1, (0,))]
    assert place_ranks("auto", 1, H100).warning is None


@pytest.mark.parametrize(("gpus", "why"), [([], "no GPU was found"), (A100, "NVIDIA A100 with compute capability 8.0")])
def test_auto_simulates_and_says_why(gpus, why):
    placed = place_ranks("auto", 2, gpus)
    assert placed.kind == "sim" and why in placed.warning
    assert place_ranks("sim", 2, gpus).warning is None


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "auto:0", "cuda:0,0", "cuda:-1", "", None, 3])
def test_devices_that_do_not_parse(device):
    with pytest.raises(ValueError, match="device is"):
        place_ranks(device, 1, H100)


@pytest.mark.parametrize(
    ("device", "world_size", "gpus", "words"),
    [
        ("cuda", 1, [], "no GPU was found"),
        ("cuda", 1, A100, "compute capability 9.0 or later"),
        ("cuda:0", 1, A100, "compute capability 9.0 or later"),
        ("cuda", 8, H100, "tensor_parallel_size is 8 but 4 capable"),
        ("auto", 8, H100, "tensor_parallel_size is 8 but 4 capable"),
        ("cuda:9", 1, H100, "GPUs 0 to 3 are visible"),
        ("cuda:0,1", 3, H100, "cannot be divided evenly"),
        ("sim", 0, [], "tensor_parallel_size is 0"),
        ("sim", 9, [], "tensor_parallel_size is 9"),
        ("sim", 2.0, [], "tensor_parallel_size is 2.0"),
    ],
)
def test_what_cannot_be_placed(device, world_size, gpus, words):
    with pytest.raises(ValueError, match=words) as caught:
        place_ranks(device, world_size, gpus)
    assert "\n" not in str(caught.value)


def test_a_capable_gpu_without_its_packages_is_an_error(monkeypatch):
    monkeypatch.setattr(placement, "missing_packages", lambda: "run  pip install 'imex-persist[cuda12]'")
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(DeviceError, match="pip install"):
            place_ranks(device, 1, H100)
    assert place_ranks("auto", 1, A100).kind == "sim"


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(discover, "_installed", lambda module: False)
    assert "cupy and cuda-python" in discover.missing_packages()
    monkeypatch.setattr(discover, "_installed", lambda module: True)
    assert discover.missing_packages() is None


@pytest.mark.parametrize(
    ("setting", "uuids"),
    [
        (None, ["GPU-00", "GPU-11", "GPU-22", "GPU-33"]),
        ("2,0", ["GPU-22", "GPU-00"]),
        ("GPU-3,1", ["GPU-33", "GPU-11"]),
        ("1,9,0", ["GPU-11"]),
        ("", []),
        ("-1", []),
    ],
)
def test_visible_devices(setting, uuids):
    found = visible(H100, setting)
    assert [gpu.uuid for gpu in found] == uuids
    assert [gpu.ordinal for gpu in found] == list(range(len(uuids)))


def test_nvidia_smis_table():
    text = "0, GPU-aa, 9.0, NVIDIA H100 80GB HBM3\n1, GPU-bb, [N/A], Odd, one\nnonsense\n"
    assert parse_smi(text) == [Gpu(0, "GPU-aa", "NVIDIA H100 80GB HBM3", (9, 0)), Gpu(1, "GPU-bb", "Odd, one", (0, 0))]
