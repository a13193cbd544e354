"""The kernel on several GPUs with its tap: a process a rank, as the runtime has them, driven step by step by the test.

`ProcessRun` is test_accuracy's WholeRun with its memory elsewhere, so the same checks apply to both.
"""

from __future__ import annotations

import multiprocessing
import os

import numpy as np

from imex_persist.model.config import ModelConfig
from imex_persist.runtime import faults
from imex_persist.runtime.marks import Marks
from imex_persist.runtime.rank import RankMemory, launch_params
from imex_persist.runtime.shared import SharedBlock
from imex_persist.runtime.weights import load_rank
from imex_persist.tap import tap_floats
from tests.gpu.test_accuracy import SIM_BLOCKS, SIMULATED, WholeRun, clear_rank, make_noise
from tests.kernel.harness import HOST_BYTES

ANSWER_S = 90.0  # for a rank to finish what it was asked
LAUNCH_S = 40.0
END_S = 10.0
DEADLINE_US = 10_000_000  # covers that the ranks' launches are not simultaneous


def open_rank_device(ordinal: int):
    if SIMULATED:
        from imex_persist.device.sim import SimDevice

        return SimDevice(num_blocks=SIM_BLOCKS, processes=True)
    from imex_persist.device.cuda import CudaDevice

    return CudaDevice(ordinal)


class RankProcess:
    """What a rank's process does when it is asked: a method a question."""

    def __init__(self, rank: int, ordinal: int):
        self.rank, self.device = rank, open_rank_device(ordinal)

    def machine(self) -> dict:
        return vars(self.device.machine) | {"identity": self.device.identity()}

    def prepare(self, shape: np.void, model: dict) -> str:
        """Loads weights and the kernel; the handle of the symmetric memory."""
        self.shape, self.noise = shape, make_noise(shape)
        self.memory = RankMemory(self.device, shape, self.rank)
        self.memory.weights = load_rank(self.device, model, shape, self.rank)
        self.tap = self.device.zeros(4 * tap_floats(shape))
        self.kernel = self.device.load(shape)
        return self.device.export(self.memory.symmetric)

    def connect(self, handles: dict[int, str], fds: tuple[int, int]) -> None:
        """`fds` are the parent's, of mailbox and faults."""
        self.memory.connect(handles, {self.rank: self.memory})
        paths = [f"/proc/{os.getppid()}/fd/{fd}" for fd in fds]
        self.blocks = [SharedBlock(os.open(path, os.O_RDWR | os.O_CLOEXEC), os.stat(path).st_size) for path in paths]
        mailbox, fault = (self.device.map_host(block.view) for block in self.blocks)
        params = self.memory.params(
            mailbox=0 if self.rank else mailbox, fault=fault + faults.fault_offset(self.rank), deadline_us=DEADLINE_US
        ).copy()
        params["tap"] = self.tap.address
        self.params = launch_params([params])

    def verify(self, nonce: int) -> None:
        Marks(self.device, self.shape).verify(self.params, nonce, self.blocks[1].view)

    def clear_marks(self) -> None:
        self.memory.clear_marks()

    def clear(self) -> None:
        clear_rank(self.device, self.memory, self.tap, self.noise)
        self.read("symmetric", 0, 8)  # so that the upload has arrived before a peer stores there

    def launch(self) -> bool:
        return self.device.launch(self.kernel, self.params).wait(LAUNCH_S)

    def read(self, what: str, offset: int, nbytes: int) -> np.ndarray:
        return self.device.download(self.tap if what == "tap" else getattr(self.memory, what), offset, nbytes)

    def disconnect(self) -> None:
        """Before any rank frees what another still maps."""
        getattr(self.device, "close_peers", lambda: None)()


def serve(rank: int, ordinal: int, pipe, kind: type) -> None:
    """A rank's process: answers (name, arguments) with (value, None) or (None, error), and ends with the parent."""
    process = kind(rank, ordinal)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((getattr(process, name)(*arguments), None))
        except Exception as error:  # whatever it is, the test shows it
            pipe.send((None, f"{type(error).__name__}: {error}"))
    process.device.close()


class Ranks:
    """The processes. Every question has an answer within ANSWER_S, or an AssertionError."""

    def __init__(self, ordinals: list[int], kind: type = RankProcess):
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank, ordinal in enumerate(ordinals):
            mine, theirs = spawn.Pipe()
            self.processes.append(spawn.Process(target=serve, args=(rank, ordinal, theirs, kind), daemon=True))
            self.pipes.append(mine)
            self.processes[-1].start()
            theirs.close()

    def ask_all(self, name: str, *arguments, timeout_s: float = ANSWER_S) -> list:
        """The same question to all ranks at once, which makes it a barrier."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        answers = [self._answer(rank, name, timeout_s) for rank in range(len(self.pipes))]
        errors = [error for _, error in answers if error]
        assert not errors, f"{name}: {'; '.join(errors)}"
        return [value for value, _ in answers]

    def ask(self, rank: int, name: str, *arguments):
        self.pipes[rank].send((name, arguments))
        value, error = self._answer(rank, name, ANSWER_S)
        assert not error, f"{name}: {error}"
        return value

    def _answer(self, rank: int, name: str, timeout_s: float) -> tuple:
        if not self.pipes[rank].poll(timeout_s):
            return None, f"rank {rank} does not answer"
        try:
            value, error = self.pipes[rank].recv()
        except (EOFError, ConnectionError):
            return None, f"rank {rank} ended; its own words are on stderr"
        return value, error and f"rank {rank}: {error}"

    def close(self) -> None:
        try:
            self.ask_all("disconnect", timeout_s=END_S)
        finally:
            for pipe in self.pipes:
                pipe.close()
            for process in self.processes:
                process.join(END_S)
                if process.is_alive():
                    process.kill()


class ProcessRun(WholeRun):
    """A WholeRun of `len(ordinals)` ranks, each in a process and on a GPU of its own. `folder` has a config.json."""

    def __init__(self, ordinals: list[int], folder: str, seed: int, make_shape):
        self.config = ModelConfig.from_folder(folder)
        self.world = len(ordinals)
        self.processes = Ranks(ordinals)
        try:
            machines = self.processes.ask_all("machine")
            self.identities = [machine.pop("identity") for machine in machines]
            self.shape = make_shape(machines)
            self._connect({"model": folder, "load_format": "dummy", "seed": seed})
        except BaseException:
            self.processes.close()
            raise

    def _connect(self, model: dict) -> None:
        handles = dict(enumerate(self.processes.ask_all("prepare", self.shape, model)))
        self.blocks = [SharedBlock.create(HOST_BYTES), SharedBlock.create(faults.fault_bytes(self.world))]
        self.host, self.faults = (np.frombuffer(block.view, np.uint8) for block in self.blocks)
        self.processes.ask_all("connect", handles, tuple(block.fd for block in self.blocks))
        self.processes.ask_all("verify", 12345)
        self.processes.ask_all("clear_marks")

    def clear(self) -> None:
        self.processes.ask_all("clear")

    def launch(self, mailbox: bool = True, timeout_s: float = LAUNCH_S) -> None:
        ended = self.processes.ask_all("launch")
        records = faults.read_faults(self.faults, self.world)
        assert not records, faults.explain(records)
        assert ended == [True] * self.world, "a kernel did not return"

    def read(self, rank: int, what: str, offset: int, nbytes: int) -> np.ndarray:
        return self.processes.ask(rank, "read", what, offset, nbytes)

    def close(self) -> None:
        self.processes.close()
        del self.host, self.faults
        for block in self.blocks:
            block.close()
