"""Random load on real ranks, with a fault in every round, for as long as one likes; every request is accounted for.

    python -m tests.multi_gpu.soak --state soak.json                  two GPUs, until 8 minutes are over; again: it goes on from there
    python -m tests.multi_gpu.soak --device sim --faults 4 --tokens 2000 --minutes 2      a test of this script

A round is one LLM: threads submit requests from a pool of prompts whose greedy tokens are known, cancel some, and in the middle a fault
is injected. Then every request must have ended once, with the known tokens or the beginning of them, and with an error only if the
round's fault is one. Memory of this process and of the GPUs must be as it was. Exit code 1: something was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from imex_persist import LLM, FaultError, SamplingParams
from imex_persist.errors import ImexError
from imex_persist.runtime.request import Submission
from tests.gpu.test_llm import CONFIG, save_model, used_bytes
from tests.runtime.groups import all_gone, pids

PROMPTS = 12
CLIENTS = 6
RSS_SLACK, GPU_SLACK = 192 << 20, 64 << 20  # bytes that memory may grow by, in all rounds together
SETTLE_S = 20.0


@dataclass
class Sent:
    """A request and what became of it."""

    prompt: int
    max_tokens: int
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # finish reasons and errors: exactly one
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event) -> None:
        if isinstance(event, Exception):
            self.ends.append("error")
        else:
            if event.token is not None:
                self.tokens.append(event.token)
            if event.finish_reason:
                self.ends.append(event.finish_reason)
        if self.ends:
            self.done.set()


class Round:
    """One LLM under load. `fault` is the name of a method below."""

    def __init__(self, llm: LLM, answers: list[list[int]], rng: random.Random, fault: str, seconds: float):
        self.llm, self.answers, self.rng, self.fault = llm, answers, rng, fault
        self.sent: list[Sent] = []
        self.gate = threading.Event()  # readers go on
        self.gate.set()
        self.over = threading.Event()
        self.fatal = False  # the fault ends the group
        self.end = time.monotonic() + seconds

    def run(self) -> None:
        clients = [threading.Thread(target=self.client, args=(self.rng.random(),)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(self.rng.uniform(0.2, 1.0) * max(0.1, self.end - time.monotonic()))
        getattr(self, self.fault)()
        time.sleep(max(0.0, self.end - time.monotonic()))
        self.over.set()
        for client in clients:
            client.join(60)
            assert not client.is_alive(), "a client waits for ever"

    def client(self, seed: float) -> None:
        rng = random.Random(seed)
        while not self.over.is_set():
            which = rng.randrange(PROMPTS)
            sent = Sent(which, rng.randrange(1, len(self.answers[which])))
            self.sent.append(sent)
            try:
                request = self.llm.engine.submit(
                    Submission((which + 1, 7, which + 3), max_tokens=sent.max_tokens), self.sink(sent)
                )
            except ImexError:
                sent.ends.append("refused")
                return
            if rng.random() < 0.15:
                time.sleep(rng.uniform(0, 0.05))
                sent.cancelled = True
                self.llm.engine.cancel(request)
            assert sent.done.wait(90), "a request never ended"
            if sent.ends == ["error"]:
                return

    def sink(self, sent: Sent):
        def put(event) -> None:
            self.gate.wait()
            sent(event)

        return put

    # ------------------------------------------------------------------------------------------------ faults
    def kill_a_rank(self) -> None:
        self.fatal = True
        os.kill(self.rng.choice(pids(self.llm.group)), signal.SIGKILL)

    def raise_the_stop_word(self) -> None:
        self.fatal = True
        self.llm.group.mailbox.stop()

    def suspend_a_rank(self) -> None:
        worker = self.rng.choice(pids(self.llm.group))
        os.kill(worker, signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.1, 0.8))
        os.kill(worker, signal.SIGCONT)

    def sleep_while_reading(self) -> None:
        self.gate.clear()
        time.sleep(self.rng.uniform(0.5, 2.0))
        self.gate.set()

    def cancel_everything(self) -> None:
        for request in list(self.llm.engine._resident.values()):
            self.llm.engine.cancel(request)
        for sent in self.sent:
            sent.cancelled = True  # may have been: a reason of "abort" is allowed

    def close(self) -> None:
        self.fatal = True
        self.llm.close()

    # ------------------------------------------------------------------------------------------------ accounting
    def check(self) -> Counter:
        """What became of the requests; AssertionError when it is not what must."""
        allowed = {"length"} | ({"error", "refused", "abort"} if self.fatal else set())
        for sent in self.sent:
            assert len(sent.ends) == 1, f"a request ended {sent.ends}"
            (end,) = sent.ends
            assert end in allowed or (end == "abort" and sent.cancelled), f"a request ended with {end} after {self.fault}"
            answer = self.answers[sent.prompt]
            assert sent.tokens == answer[: len(sent.tokens)], f"wrong tokens of prompt {sent.prompt} after {self.fault}"
            assert end != "length" or len(sent.tokens) == sent.max_tokens, "a request was cut short"
        error = self.llm.group.error
        assert self.fault == "close" or (error is not None) == self.fatal, f"after {self.fault} the group's error is {error}"
        return Counter(sent.ends[0] for sent in self.sent)


FAULTS = ("kill_a_rank", "raise_the_stop_word", "suspend_a_rank", "sleep_while_reading", "cancel_everything", "close")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Soak:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.path = Path(args.state) if args.state else None
        self.state = json.loads(self.path.read_text()) if self.path and self.path.exists() else {}
        for name in ("faults", "tokens", "requests", "seconds", "rounds"):
            self.state.setdefault(name, 0)
        for name in ("by_fault", "by_end"):
            self.state[name] = Counter(self.state.get(name, {}))
        self.settings = dict(
            device=args.device, tensor_parallel_size=args.tp, max_num_seqs=4, deadline_s=2.0 if self.cuda else 10.0
        )
        self.settings["max_model_len"] = args.length + 8
        self.folder = save_model(Path(tempfile.mkdtemp(prefix="imex-soak-")), CONFIG)

    @property
    def cuda(self) -> bool:
        return self.args.device.startswith("cuda")

    def gpu_bytes(self) -> int:
        return sum(used_bytes(ordinal) for ordinal in range(self.args.tp)) if self.cuda else 0

    def reached(self) -> bool:
        return self.state["faults"] >= self.args.faults and self.state["tokens"] >= self.args.tokens

    def answers(self) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=self.args.length, ignore_eos=True)
        with LLM(self.folder, **self.settings) as llm:
            outputs = llm.generate([[i + 1, 7, i + 3] for i in range(PROMPTS)], params)
        return [output.outputs[0].token_ids for output in outputs]

    def run(self) -> None:
        end, answers = time.monotonic() + 60 * self.args.minutes, self.answers()
        rss = gpu = None
        while not self.reached() and time.monotonic() < end - SETTLE_S:
            self.one_round(answers)
            now = (resident_bytes(), self.settled_gpu_bytes(gpu))
            if self.state["rounds"] % 5 == 0 or rss is None:
                print(f"  memory: {now[0] >> 20} MiB here, {now[1] >> 20} MiB on the GPUs", flush=True)
            rss, gpu = rss or now[0], now[1] if gpu is None else gpu
            assert now[0] <= rss + RSS_SLACK, f"memory of this process grew from {rss} to {now[0]} bytes"
            assert now[1] <= gpu + GPU_SLACK, f"memory of the GPUs grew from {gpu} to {now[1]} bytes"

    def settled_gpu_bytes(self, limit: int | None) -> int:
        """The driver frees a dead process's memory a little later."""
        end = time.monotonic() + SETTLE_S
        while (used := self.gpu_bytes()) > (limit or used) + GPU_SLACK and time.monotonic() < end:
            time.sleep(0.2)
        return used

    def one_round(self, answers: list[list[int]]) -> None:
        state, began = self.state, time.monotonic()
        rng = random.Random(1000 * self.args.seed + state["rounds"])
        fault = FAULTS[state["rounds"] % len(FAULTS)]
        llm = LLM(self.folder, **self.settings)
        workers = pids(llm.group)
        try:
            this = Round(llm, answers, rng, fault, self.args.round_s)
            this.run()
        finally:
            llm.close()
        assert all_gone(workers, self.settings["deadline_s"] + 3), "a worker was left behind"
        ends = this.check()
        state["rounds"] += 1
        state["faults"] += 1
        state["requests"] += len(this.sent)
        state["tokens"] += sum(len(sent.tokens) for sent in this.sent)
        state["seconds"] += time.monotonic() - began
        state["by_fault"][fault] += 1
        state["by_end"].update(ends)
        if self.path:
            scratch = self.path.with_suffix(".new")
            scratch.write_text(json.dumps(state, indent=1))
            scratch.replace(self.path)
        print(
            f"round {state['rounds']}: {fault}, {len(this.sent)} requests {dict(ends)}; {state['tokens']} tokens so far",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.multi_gpu.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=8.0, help="of this run")
    parser.add_argument("--round-s", type=float, default=3.0, help="seconds of load in a round")
    parser.add_argument("--length", type=int, default=300, help="tokens of a request at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", help="a JSON file that the next run goes on from")
    soak = Soak(parser.parse_args())
    try:
        soak.run()
    except (AssertionError, FaultError) as error:
        print(f"FAILED in round {soak.state['rounds'] + 1}: {error}")
        return 1
    total = {name: round(value) for name, value in soak.state.items() if not isinstance(value, dict)}
    print(f"{'reached' if soak.reached() else 'not reached yet, run it again'}: {total}, {dict(soak.state['by_end'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
