"""A peer process: vLLM's custom all-reduce of bf16 values in a CUDA graph; a child process a GPU."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from imex_persist.bench.peers.answer import answer
from imex_persist.bench.peers.decode_torch import timed

IN_A_GRAPH, LIMIT_S = 50, 60


def measure(job: dict) -> dict:
    world = torch.cuda.device_count()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    results = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(_rank, (world, address, job, results), nprocs=world, join=False, daemon=True)
    while not ranks.join(1):  # raises what a rank raised
        pass
    return {"rows": results.get()}


def _rank(rank: int, world: int, address: str, job: dict, results) -> None:
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT_S))
    reducer = CustomAllreduce(dist.group.WORLD, torch.device("cuda", rank))
    if reducer.disabled:
        raise RuntimeError("vLLM's custom all-reduce is disabled between these GPUs")
    rows = []
    for values in job["sizes"]:
        tensor = torch.full((values,), float(rank + 1), dtype=torch.bfloat16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with reducer.capture(), torch.cuda.graph(graph):
            for _ in range(IN_A_GRAPH):
                out = reducer.custom_all_reduce(tensor)
        dist.barrier()
        us = torch.tensor(timed(graph.replay, 3, 50))
        if not bool((out == float(sum(range(1, world + 1)))).all()):
            raise RuntimeError("the sums are wrong")
        dist.all_reduce(us, dist.ReduceOp.MAX)
        rows.append({"values": values, "us": float(us) / IN_A_GRAPH})
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    answer(measure, sys.argv)
