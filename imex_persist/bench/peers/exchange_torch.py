"""A peer process: all-reduce of bf16 values by NCCL or torch's symmetric memory, captured in a CUDA graph; a child process a GPU.

Their results stay spread over the SMs that computed them, where ours are in every SM: what a graph's next kernel reads is not counted.
"""

from __future__ import annotations

import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from imex_persist.bench.peers.answer import answer
from imex_persist.bench.peers.decode_torch import captured, timed

IN_A_GRAPH, LIMIT_S = 50, 60


def measure(job: dict) -> dict:
    world = torch.cuda.device_count()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = mp.spawn(_rank, (world, address, job, results), nprocs=world, join=False, daemon=True)
    while not ranks.join(1):  # raises what a rank raised
        pass
    return {"rows": results.get(), "torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def _rank(rank: int, world: int, address: str, job: dict, results) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT_S))
    rows = []
    for values in job["sizes"]:
        reduce, check = _reducer(job["mode"], values, rank, world)
        reduce()
        torch.cuda.synchronize()
        check()
        dist.barrier()
        us = torch.tensor(timed(captured(lambda reduce=reduce: [reduce() for _ in range(IN_A_GRAPH)]), 3, 50), device="cuda")
        dist.all_reduce(us, dist.ReduceOp.MAX)
        rows.append({"values": values, "us": float(us) / IN_A_GRAPH})
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _reducer(mode: str, values: int, rank: int, world: int):
    """(what reduces once, what checks that it did)."""
    total = float(sum(range(1, world + 1)))
    if mode == "nccl":
        tensor = torch.full((values,), float(rank + 1), dtype=torch.bfloat16, device="cuda")
        return lambda: dist.all_reduce(tensor), lambda: _check(tensor, total)
    import torch.distributed._symmetric_memory as symmetric_memory

    group = dist.group.WORLD.group_name
    tensor = symmetric_memory.empty(values, dtype=torch.bfloat16, device=f"cuda:{rank}").fill_(float(rank + 1))
    symmetric_memory.rendezvous(tensor, group)
    if mode == "one_shot":
        made: list = [None]

        def reduce() -> None:
            made[0] = torch.ops.symm_mem.one_shot_all_reduce(tensor, "sum", group)

        return reduce, lambda: _check(made[0], total)
    return (lambda: torch.ops.symm_mem.two_shot_all_reduce_(tensor, "sum", group)), lambda: _check(tensor, total)


def _check(tensor, total: float) -> None:
    if not bool((tensor == total).all()):
        raise RuntimeError(f"the sums are not {total}")


if __name__ == "__main__":
    answer(measure, sys.argv)
