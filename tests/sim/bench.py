"""`python tests/sim/bench.py [c++ compiler]`: what the simulator costs on this host."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from imex_persist import abi
from imex_persist.device.sim import SimDevice

MULTIPLY, STREAM, BARRIER, WARP_SUM, WORDS = range(1, 6)


def run(lanes: int, mode: int, count: int, *, rows=1, blocks=1, cxx=None) -> tuple[float, dict]:
    device = SimDevice(lanes, blocks, source=Path(__file__).parent / "bench.cu", cxx=cxx)
    shape = np.zeros((), abi.Shape)
    shape["only_phase"], shape["num_layers"], shape["max_rows"], shape["num_blocks"] = mode, count, rows, blocks
    shape["world_size"], shape["off_abort"] = 1, 4096
    shape["smem_part"], shape["smem_x"], shape["smem_ring"], shape["smem_bytes"] = 1024, 8192, 65536, 65536 + 4 * 16384
    params = np.zeros((), abi.LaunchParams)
    params["num_ranks"] = 1
    tiles = device.zeros(count * 16384 * blocks if mode <= STREAM else 16)
    if mode <= STREAM:  # touch the pages
        np.frombuffer(tiles.owner.memory, np.uint8)[::4096] = 1
    words, result = device.zeros(8 * 4112), device.zeros(8)
    rank = params["ranks"][0]
    rank["qkv"], rank["peers"][0], rank["tap"], rank["deadline_us"] = tiles.address, words.address, result.address, 10**9
    launch = device.launch(device.load(shape), params)
    launch.wait(600)
    return float(device.download(result, 0, 4).view(np.float32)[0]), launch.stats


def main(cxx: str | None = None) -> None:
    for rows in (1, 2, 3, 4, 8, 16):
        for mode, name in ((MULTIPLY, "multiply"), (STREAM, "copy + multiply")):
            tiles = 16384 if rows == 1 else 4096
            seconds, _ = run(1, mode, tiles, rows=rows, cxx=cxx)
            print(f"lanes 1  rows {rows:2}  {name:16} {tiles * 16384 / seconds / 1e9:6.1f} GB/s")
    for lanes in (1, 32):
        for mode, name, count in (
            (BARRIER, "consumer_sync", 20_000),
            (WARP_SUM, "warp_sum", 20_000),
            (WORDS, "store + wait word", 1_000_000),
        ):
            seconds, stats = run(lanes, mode, count, cxx=cxx)
            rate = stats["switches"] / seconds / 1e6
            print(f"lanes {lanes:2}  {name:18} {seconds / count * 1e9:8.1f} ns each, {rate:6.1f} M switches/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
