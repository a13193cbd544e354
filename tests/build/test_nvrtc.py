"""The CUDA build without a GPU: every kernel compiles for every target, in its registers, with the instructions that were meant."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from imex_persist import abi, abi_render
from imex_persist.device import nvrtc, sources
from imex_persist.errors import DeviceError
from tests.gpu.bench import KERNELS, make_shape
from tests.sim.litmus import LITMUS, source
from tests.sim.litmus import make_shape as litmus_shape

from .disassembly import basic_blocks, nvdisasm, unwritten_registers
from .shapes import CASES, MACHINES

THREADS = abi.NUM_WARPS * 32
REGISTER_FILE = 65536
# Bytes a thread may store to local memory. The compiler moves more out of the loops than registers hold, and stores what lives across
# attention around it: with heads of 128 once a layer. On Hopper next to none of it may stand among the matrix instructions; later
# targets are compiled, not tuned, as nobody has run them yet.
SPILL_BYTES = {"sm_90a": 16}
SPILL_BYTES_LATER = 768
LOCAL_BESIDE = 0  # instructions with local memory in blocks that have matrix instructions
LOCAL_BESIDE_OF = {"smollm2-tp2": 4}  # the warp's number, which is used at a unit's end
UNROLLED = 4  # matrix instructions in a row, at least, where a tile is multiplied: fewer means a branch inside the loop


@pytest.fixture(scope="module", autouse=True)
def _needs_nvrtc():
    try:
        nvrtc.version()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(params=nvrtc.TARGETS)
def arch(request):
    return request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_compiles_within_its_budget(case, arch):
    shape, rows = case.shape(arch)
    build = nvrtc.compile_kernel(shape, arch)
    entry = build.resources["decode"]
    print(f"{case.name} {arch}: {rows} row(s), {shape['ring_stages']} tiles, {shape['smem_bytes']} bytes shared, {entry}")
    assert 0 < entry.registers <= REGISTER_FILE // THREADS
    assert int(shape["smem_bytes"]) + entry.shared_bytes <= MACHINES[arch].shared_memory_bytes
    spilled = {
        name: found
        for name, found in build.resources.items()
        if found.spill_store_bytes > SPILL_BYTES.get(arch, SPILL_BYTES_LATER)
    }
    assert not spilled, f"more local memory is used than what is stored around attention: {spilled}"
    check_ptx(build.ptx)
    if tool := nvdisasm():
        check_sass(basic_blocks(build.cubin, tool), arch in SPILL_BYTES, LOCAL_BESIDE_OF.get(case.name, LOCAL_BESIDE))


def check_ptx(ptx: str) -> None:
    for instruction, why in (
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "weights meet activations on the tensor cores"),
        ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint", "weights stream by bulk copies"),
        ("ld.shared.v4", "the operands of the tensor cores are 16-byte loads that are known to be of shared memory"),
        ("st.relaxed.sys.global.v2.u64", "words are stored in pairs"),
        ("ld.relaxed.sys.global.v2.u64", "words are polled in pairs"),
        ("ld.relaxed.sys.global.L2::cache_hint.v4.u32", "bare words are polled four at a time, and kept in L2"),
        ("mbarrier.try_wait.parity.acquire.cta", "tiles are awaited on mbarriers"),
    ):
        assert instruction in ptx, f"{instruction} is missing from the PTX: {why}"
    assert not unwritten_registers(ptx), "what an empty asm writes, nothing does"
    assert ".local" not in ptx, "an array is indexed by a number that the compiler does not know, and lives in local memory"


def test_a_register_that_nothing_writes_is_found():
    ptx = """
    {
        .reg .b32 %r<9>;
        ld.global.v2.u32 {%r1, %r2}, [%rd1];  // rd1 as well
        @%p1 mov.u32 %r3, %r4;
    $L1: setp.eq.s32 %p1, %r2, 0; st.global.u32 [%rd2], %r1;
        mul.wide.u32 %rd2, %r3, 4;
        // begin inline asm
        { .reg .pred p; mbarrier.test_wait.parity.b64 p, [%r5], %r6; selp.u32 %r6, 1, 0, p; }
    }"""
    assert unwritten_registers(ptx) == {"%rd1", "%r4", "%r5"}


def check_sass(blocks: list[list[str]], tuned: bool, beside: int) -> None:
    opcodes = Counter(opcode for block in blocks for opcode in block)
    for wanted in ("HMMA.16816.F32.BF16", "LDS.128", "UBLKCP.S.G", "LDG.E.128.STRONG.SYS", "STG.E.128.STRONG.SYS"):
        assert opcodes[wanted], f"{wanted} is missing from the machine code"
    for wanted in ("USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC"):  # a call might have made the compiler ignore the new deal
        assert not tuned or any(opcode.startswith(wanted) for opcode in opcodes), (
            f"{wanted} is missing: registers are not dealt anew"
        )
    matrix = [Counter(block) for block in blocks if any(opcode.startswith("HMMA") for opcode in block)]
    local = [opcode for block in matrix for opcode in block.elements() if opcode.startswith(("LDL", "STL"))]
    assert len(local) <= beside or not tuned, f"local memory is used beside the matrix instructions: {local}"
    narrow = {opcode for block in matrix for opcode in block if opcode.startswith(("LDS.U", "LDS.S"))}
    assert not narrow, f"beside the matrix instructions shared memory is read with {narrow}, value by value"
    generic = {opcode for block in matrix for opcode in block if opcode.partition(".")[0] == "LD"}
    assert not generic, f"the compiler does not know that {generic} read shared memory"
    products = sum(block["HMMA.16816.F32.BF16"] for block in matrix)
    assert opcodes["LDS.128"] * 2 >= products, "operands are read in pieces"
    assert max(block["HMMA.16816.F32.BF16"] for block in matrix) >= UNROLLED


def test_the_gpu_tests_kernels_compile(arch):
    for rows, head_dim in ((1, 32), (8, 64), (16, 128)):
        build = nvrtc.compile_kernel(make_shape(max_rows=rows, head_dim=head_dim), arch, KERNELS)
        spilled = {name: found for name, found in build.resources.items() if found.spills}
        assert not spilled, f"a primitive uses local memory at {rows} rows, head_dim {head_dim}: {spilled}"


@pytest.mark.parametrize("name", LITMUS)
def test_the_litmus_tests_compile(name):
    build = nvrtc.compile_kernel(litmus_shape(LITMUS[name].ranks[-1], 66, 1000), "sm_90a", source(name))
    assert not any(found.spills for found in build.resources.values())


def test_each_phase_alone_compiles_with_the_tap():
    for phase in abi.Phase:
        shape, _ = CASES[0].shape("sm_90a")
        shape["only_phase"], shape["only_layer"], shape["tap"] = 1 + phase, 1, 1
        nvrtc.compile_kernel(shape, "sm_90a")


def test_a_second_build_comes_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("IMEX_CACHE", str(tmp_path))
    first = nvrtc.compile_kernel(make_shape(), "sm_90a", KERNELS)
    monkeypatch.setattr(nvrtc, "_run", lambda *_: pytest.fail("compiled twice"))
    second = nvrtc.compile_kernel(make_shape(), "sm_90a", KERNELS)
    assert first == second
    assert first.cubin.read_bytes()[:4] == b"\x7fELF"
    assert [path.name for path in tmp_path.iterdir()] == ["cuda"]
    assert len(list((tmp_path / "cuda").iterdir())) == 1, "a scratch folder was left behind"


def test_what_changes_a_build_changes_its_name(monkeypatch, tmp_path):
    monkeypatch.setenv("IMEX_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_run", lambda *_: (b"cubin", b"ptx", "log"))
    folders = {
        nvrtc.compile_kernel(make_shape(), "sm_90a", KERNELS).folder,
        nvrtc.compile_kernel(make_shape(), "sm_100a", KERNELS).folder,
        nvrtc.compile_kernel(make_shape(max_rows=2), "sm_90a", KERNELS).folder,
        nvrtc.compile_kernel(make_shape(), "sm_90a").folder,
    }
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 1))
    folders.add(nvrtc.compile_kernel(make_shape(), "sm_90a", KERNELS).folder)
    assert len(folders) == 5


def test_errors_are_sentences(monkeypatch, tmp_path):
    monkeypatch.setenv("IMEX_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void f() { undefined(); }\n")
    with pytest.raises(DeviceError, match=r"broken.cu does not compile for sm_90a: .*undefined"):
        nvrtc.compile_kernel(make_shape(), "sm_90a", broken)
    with pytest.raises(DeviceError, match="does not compile for sm_77a"):
        nvrtc.compile_kernel(make_shape(), "sm_77a", KERNELS)
    assert not any(path.name.startswith(".") for path in (tmp_path / "cache").rglob("*"))


def test_a_log_with_spills_is_understood():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'decode' for 'sm_90a'
ptxas info    : Function properties for decode
ptxas         .     48 bytes stack frame, 44 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 48 bytes cumulative stack size, 16 bytes smem
ptxas info    : Function properties for give_up
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    found = nvrtc.parse_resources(log)
    assert found["decode"] == nvrtc.Resources(168, 48, 44, 40, shared_bytes=16, barriers=2)
    assert found["decode"].spills
    assert not found["give_up"].spills


def test_the_sources_are_found_and_an_unwritable_cache_is_named(monkeypatch, tmp_path):
    assert (sources.cuda_src() / "decode.cu").is_file()
    assert not any("sim" in path.relative_to(sources.cuda_src()).parts for path in sources.source_files(without=["sim"]))
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("IMEX_CACHE", str(blocked))
    with pytest.raises(DeviceError, match="IMEX_CACHE"):
        sources.cached("cuda/x", lambda folder: None)


def test_shape_survives_the_command_line():
    """Numbers that are awkward as C++ literals: a small float, the largest offset."""
    shape = make_shape()
    shape["rms_eps"], shape["symmetric_words"] = np.float32(1e-6), 2**32 - 1
    text = abi_render.shape_initializer(shape)
    assert text.startswith("{") and text.endswith("}")
    assert f"{2**32 - 1}u" in text
    nvrtc.compile_kernel(shape, "sm_90a", KERNELS)
