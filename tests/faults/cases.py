"""Faults, each really done to a running LLM: test_simulated.py does them to simulators, tests/multi_gpu/test_faults.py to GPUs.

Every case is `case(folder, settings)`: a model's folder, and LLM's settings with deadline_s. After each nothing may be left, whatever
happened: see `Nothing`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imex_persist import LLM, FaultError, SamplingParams, abi
from imex_persist.runtime.request import Submission
from tests.runtime.groups import all_gone, pids

ROOT = Path(__file__).parents[2]
GRACE_S = 3.0  # beyond the deadline, for everything to have ended
PROMPTS = [[5, 6, 7, 8], [9, 1], [40] * 7]


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def ids(output) -> list[int]:
    return output.outputs[0].token_ids


def children(pid: int | str = "self") -> list[int]:
    """Of every thread of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


class Nothing:
    """with Nothing(): … leaves no process, no file descriptor, and no shared memory with a name."""

    def __enter__(self) -> Nothing:
        self.before = self.seen()
        return self

    def __exit__(self, kind, *_more) -> None:
        end = time.monotonic() + GRACE_S
        while (after := self.seen()) != self.before and time.monotonic() < end:
            time.sleep(0.05)
        if kind is None:
            assert after == self.before

    @staticmethod
    def seen() -> tuple:
        named = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []
        return [pid for pid in children() if "imex_persist" in _command(pid)], len(os.listdir("/proc/self/fd")), named


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def one_message(error: Exception) -> None:
    assert "\n" not in str(error) and len(str(error)) < 700, str(error)


def check_works(folder: str, settings: dict) -> list[list[int]]:
    """A new LLM answers at once; its tokens."""
    with LLM(folder, **settings) as llm:
        return [ids(output) for output in llm.generate(PROMPTS, greedy())]


# ------------------------------------------------------------------------------------------------ processes that end
def killed_rank(folder: str, settings: dict, victim: int) -> None:
    """SIGKILL while three requests decode: one error in time, every request with the tokens it had; a new LLM works."""
    wanted = check_works(folder, settings)
    with Nothing(), LLM(folder, **settings) as llm:
        long = settings["max_model_len"] - 20
        timer = threading.Timer(0.5, os.kill, (pids(llm.group)[victim], signal.SIGKILL))
        timer.start()
        began = time.monotonic()
        with pytest.raises(FaultError, match=f"rank {victim}") as caught:
            llm.generate(PROMPTS, greedy(long))
        assert time.monotonic() - began < 0.5 + settings["deadline_s"] + GRACE_S
        one_message(caught.value)
        for output, tokens in zip(caught.value.outputs, wanted, strict=True):
            assert 0 < len(ids(output)) < long and not output.finished
            assert ids(output)[:12] == tokens[: len(ids(output))]
        with pytest.raises(FaultError):
            llm.generate(PROMPTS, greedy())
    with Nothing():
        assert check_works(folder, settings) == wanted


def killed_parent(folder: str, settings: dict, how: int) -> None:
    """The workers of a process that is gone end too; nothing of it, such as stale shared memory, is in the way of a new one."""
    command = [sys.executable, "-m", "tests.faults.cases", folder, json.dumps(settings)]
    with Nothing():
        parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert workers
        parent.send_signal(how)
        parent.wait(10)
        assert all_gone(workers, settings["deadline_s"] + GRACE_S)
        parent.stdout.close()
        check_works(folder, settings)


def interrupted(folder: str, settings: dict, seed: int) -> None:
    """Ctrl-C at a random moment, from the first import to the middle of decoding: exit code 130, no traceback, nobody left."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "imex_persist", "generate", folder, *flags]
    more = ["--prompt-token-ids", "1,2", "--max-tokens", str(settings["max_model_len"] - 20), "--ignore-eos"]
    process = subprocess.Popen(
        [*command, *more], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    time.sleep(random.Random(seed).uniform(0.05, 4.0))
    workers = children(process.pid) if process.poll() is None else []
    process.send_signal(signal.SIGINT)  # two seconds more: the interpreter's own end, on a busy machine
    err = process.communicate(timeout=settings["deadline_s"] + GRACE_S + 2)[1].decode()
    assert process.returncode in (130, -signal.SIGINT, 0), err  # the second: before main has begun; the last: it was done
    assert process.returncode == -signal.SIGINT or "Traceback" not in err, err
    assert all_gone(workers, settings["deadline_s"] + GRACE_S)


# ------------------------------------------------------------------------------------------------ processes that stand still
def suspended_rank(folder: str, settings: dict, victim: int, seconds: float) -> None:
    """SIGSTOP of a rank's process and SIGCONT `seconds` later, which the kernel does not mind: all tokens come."""
    wanted = check_works(folder, settings)
    with Nothing(), LLM(folder, **settings) as llm:
        worker, stream = pids(llm.group)[victim], llm.stream(PROMPTS[0], greedy(200))
        next(stream)
        os.kill(worker, signal.SIGSTOP)
        threading.Timer(seconds, os.kill, (worker, signal.SIGCONT)).start()
        for _ in stream:
            pass
        assert len(ids(stream.result)) == 200 and ids(stream.result)[:12] == wanted[0]
        time.sleep(seconds)
        assert [ids(output) for output in llm.generate(PROMPTS, greedy())] == wanted


def suspended_for_too_long(folder: str, settings: dict, victim: int) -> None:
    """SIGSTOP of a simulated rank, whose kernel stops with it: the other's deadline names it; a late SIGCONT changes nothing."""
    with Nothing(), LLM(folder, **settings) as llm:
        worker, stream = pids(llm.group)[victim], llm.stream(PROMPTS[0], greedy(settings["max_model_len"] - 20))
        next(stream)
        os.kill(worker, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(FaultError, match=f"rank {victim} stopped answering: rank {1 - victim}, block ") as caught:
            list(stream)
        assert time.monotonic() - began < settings["deadline_s"] + GRACE_S and ids(stream.result)
        one_message(caught.value)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
        assert all_gone(pids(llm.group), GRACE_S)


# ------------------------------------------------------------------------------------------------ rings
def sleeping_reader(folder: str, settings: dict) -> None:
    """Nobody reads records for longer than the deadline: the kernel pauses when their ring is full, and that is no fault."""
    requests, each = 3, abi.RECORD_SLOTS // 2 - 100  # together more than the ring holds
    with Nothing(), LLM(folder, **settings | {"max_num_seqs": requests}) as llm:
        awake, done, tokens = threading.Event(), threading.Semaphore(0), []

        def sink(event) -> None:  # runs in the thread that reads the ring, and that posts requests: so all of them first
            if llm.engine.num_running == requests:
                awake.wait(240)
            tokens.append(getattr(event, "token", None))
            if isinstance(event, Exception) or event.finish_reason:
                done.release()

        mailbox = llm.group.mailbox
        for first in range(requests):
            llm.engine.submit(Submission((5 + first, 6), max_tokens=each), sink)
        before, since = -1, time.monotonic()
        while time.monotonic() - since < settings["deadline_s"] + 0.5:
            if mailbox.steps != before:
                before, since = mailbox.steps, time.monotonic()
            time.sleep(0.02)
        assert abi.RECORD_SLOTS // 2 < requests * before < requests * each
        awake.set()
        assert all(done.acquire(timeout=120) for _ in range(requests))
        got = len([t for t in tokens if t is not None])
        assert got == requests * each, f"{got} tokens of {requests * each}"
        assert llm.group.error is None and llm.engine.drain(5)


def corrupted_descriptor(folder: str, settings: dict) -> None:
    """A line of which any one word is not what it must be is no descriptor yet; what then stands there is."""
    with Nothing(), LLM(folder, **settings) as llm:
        wanted, box = [ids(output) for output in llm.generate(PROMPTS, greedy())], llm.group.mailbox
        assert llm.engine.drain(5)
        sequence = box.descriptors.posted + 1
        first = abi.Mailbox.fields["descriptors"][1] // 4 + (sequence - 1) % abi.DESCRIPTOR_SLOTS * 16
        line = [sequence, abi.Command.SUBMIT, 77, 0, 0, 1, 1, 0, 4, 0, *[0] * 5]
        line.append(abi.descriptor_check(line))
        for broken in range(16):
            box._u4[first + broken] = line[broken] ^ 1 << broken  # first: at no moment is the whole line right
            for i, word in enumerate(line):
                if i != broken:
                    box._u4[first + i] = word
            time.sleep(0.02)
            assert not box.poll(), f"a line whose word {broken} is wrong was taken"
        assert [ids(output) for output in llm.generate(PROMPTS, greedy())] == wanted


# ------------------------------------------------------------------------------------------------ and the rest
def user_error(folder: str, settings: dict) -> None:
    """An exception in the loop over a stream cancels the request and leaves the engine as it was."""
    with Nothing(), LLM(folder, **settings) as llm:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="user"), llm.stream(PROMPTS[0], greedy(500)) as stream:
                for _ in stream:
                    raise RuntimeError("user code")
        assert llm.engine.drain(10) and llm.engine.free_slots == int(llm.shape["num_slots"])


def two_groups(folder: str, settings: dict, others: dict) -> None:
    """Two engines on one host, one of which loses a rank: the other does not notice."""
    wanted = check_works(folder, settings)
    with Nothing(), LLM(folder, **settings) as first, LLM(folder, **others) as second:
        threading.Timer(0.3, os.kill, (pids(first.group)[-1], signal.SIGKILL)).start()
        for _ in range(20):
            assert [ids(output) for output in second.generate(PROMPTS, greedy())] == wanted
        with pytest.raises(FaultError):
            first.generate(PROMPTS, greedy(settings["max_model_len"] - 20))
        assert [ids(output) for output in second.generate(PROMPTS, greedy())] == wanted


if __name__ == "__main__":  # a parent that will be killed
    with LLM(sys.argv[1], **json.loads(sys.argv[2])) as made:
        steps = made.stream(PROMPTS[0], greedy(made.max_model_len - 20))
        next(steps)
        print(*pids(made.group), flush=True)
        for _ in steps:
            pass
