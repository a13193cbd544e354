"""Two processes, a GPU each: handles traded, memory mapped, words stored into it by a kernel, seen by its owner."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from imex_persist import abi

from .bench import KERNELS, capable_gpus, make_shape

COUNT = 1024  # pairs of words, as `push` stores them
NBYTES = COUNT * 16
TIMEOUT_S = 120


def payload_of(rank: int) -> np.ndarray:
    """As in primitives.cu."""
    index = np.arange(2 * COUNT, dtype=np.uint64)
    return (np.uint64(rank * 2654435761 % 2**32) ^ (index * np.uint64(40503))) & np.uint64(0xFFFFFFFF)


def peer_process(rank: int, ordinal: int, pipe) -> None:
    from imex_persist.device.cuda import CudaDevice

    device = CudaDevice(ordinal)
    try:
        own = device.symmetric(NBYTES)
        pipe.send(device.export(own))
        peer = device.open(pipe.recv(), NBYTES)
        kernel = device.load(make_shape(num_blocks=1), source=KERNELS, entry="push")
        params = np.zeros((), abi.LaunchParams)
        params["num_ranks"] = 1
        params["ranks"][0]["rank"] = rank
        params["ranks"][0]["peers"][rank ^ 1] = peer.address
        pipe.send("ready")
        pipe.recv()  # both have zeroed memory and an open mapping
        ended = device.launch(kernel, params[()]).wait(20)
        pipe.send(ended)
        pipe.recv()  # both have stored
        pipe.send(device.download(own, 0, NBYTES).tobytes())
        pipe.recv()  # both have read
        device.close_peers()
        pipe.send("unmapped")
        pipe.recv()  # nobody maps what is freed now
    finally:
        device.close()


def test_words_stored_by_a_peer_arrive():
    gpus, _ = capable_gpus()
    if len(gpus) < 2:
        pytest.skip(f"{len(gpus)} capable GPU, two are needed")
    spawn = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for rank in range(2):
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=peer_process, args=(rank, gpus[rank], theirs), daemon=True)
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)

    def hear() -> list:
        for end in ends:
            assert end.poll(TIMEOUT_S), "a peer process does not answer"
        return [end.recv() for end in ends]

    def tell(messages: list) -> None:
        for end, message in zip(ends, messages, strict=True):
            end.send(message)

    try:
        tell(list(reversed(hear())))  # handles
        assert hear() == ["ready"] * 2
        tell(["go"] * 2)
        assert hear() == [True] * 2, "a kernel that stores to its peer did not end"
        tell(["look"] * 2)
        for rank, memory in enumerate(hear()):
            words = np.frombuffer(memory, np.uint64)
            np.testing.assert_array_equal(words, payload_of(rank ^ 1) | np.uint64(9 << 32))
        tell(["unmap"] * 2)
        assert hear() == ["unmapped"] * 2
        tell(["end"] * 2)
        for process in processes:
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
