"""`imex-persist doctor`: is IMEX active on this machine? A small model of random weights runs through the real runtime.

The start itself writes and verifies a mark in every peer's memory. Then a prompt of many rows and steps of one row exchange as planned
for them, and every token is compared with the NumPy reference. Another start forces a strategy that no plan has used yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from imex_persist import abi
from imex_persist.config import PLANNED
from imex_persist.errors import FaultError, ImexError
from imex_persist.log import logger
from imex_persist.runtime.discover import MIN_CAPABILITY, Gpu, find_gpus
from imex_persist.runtime.placement import parse_device, share_one_gpu
from imex_persist.runtime.strategy import strategy_of

EXIT_ACTIVE, EXIT_NOT_ACTIVE = 0, 1
MODEL = {  # wide enough that 8 rows exceed what ONE_SHOT takes on any number of ranks, and 1 row does not
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "rms_norm_eps": 1e-5,
}
ROWS = 8
PROMPT = tuple(range(3, 3 + 2 * ROWS))
MAX_TOKENS = 8
TOLERANCE = 0.05  # of a logit, whose deviation is about 1: bf16 activations through two layers, sums of another order
LIMIT_S = 60  # for a request that takes milliseconds; the kernel's own deadlines are shorter
SERVICE = "nvidia-imex"


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    text: str


@dataclass
class Report:
    """What was found. `lines` are the engine's own start log."""

    world_size: int
    lines: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    kind: str = ""  # "cuda" or "sim", once ranks are placed
    gpus: int = 0
    why_not: str | None = None  # and what to do

    @property
    def active(self) -> bool:
        return self.why_not is None

    def verdict(self) -> str:
        if not self.active:
            return f"IMEX is not active: {self.why_not}"
        simulated = "in the simulator, which says nothing about this machine's GPUs"
        where = simulated if self.kind == "sim" else f"on {self.gpus} GPU(s)"
        return f"IMEX is active: {self.world_size} ranks exchange inside the kernel {where}"


def run(args: argparse.Namespace) -> int:
    """The command. Raises ValueError for a device that means nothing; what the machine cannot do is a finding, not an error."""
    parse_device(args.device)
    report = examine(args.device, args.tensor_parallel_size, deadline_s=args.deadline_s, p2p_level=args.p2p_level)
    if args.json:
        print(json.dumps({**asdict(report), "active": report.active, "verdict": report.verdict(), "service": service_line()}))
    else:
        for line in report.lines:
            print(f"[imex] {line}")
        for check in report.checks:
            print(f"[imex] check: {check.name}: {'ok' if check.ok else 'FAILED'} ({check.text})")
        print(f"[imex] note: {service_line()}")
        print(f"[imex] {report.verdict()}")
    return EXIT_ACTIVE if report.active else EXIT_NOT_ACTIVE


def examine(device: str, world_size: int | None, **options) -> Report:
    """Tests `device` with `world_size` ranks (None: every capable GPU, at least two ranks)."""
    gpus = [] if device.startswith("sim") else find_gpus()
    capable = [gpu for gpu in gpus if gpu.capability >= MIN_CAPABILITY]
    report = Report(world_size or max(2, min(len(capable), abi.MAX_RANKS)))
    if device == "auto" and not capable:
        report.why_not = _no_gpu(gpus)
        return report
    device = share_one_gpu(device, report.world_size, gpus)
    try:
        with tempfile.TemporaryDirectory(prefix="imex-doctor-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(MODEL))
            tried = _run_once(report, folder, device, None, options)
            for strategy in abi.Strategy:
                if strategy.name not in tried and report.world_size > 1 and all(check.ok for check in report.checks):
                    tried |= _run_once(report, folder, device, strategy.name, options)
    except (ValueError, ImexError) as error:
        report.checks.append(Check("start" if not report.lines else "run", False, type(error).__name__))
        report.why_not = str(error)
        return report
    failed = [check for check in report.checks if not check.ok]
    if failed:
        report.why_not = (
            f"the check '{failed[0].name}' failed, {failed[0].text}: the exchange or the kernel computes wrongly on this machine, so do "
            "not use it, and report this with the output of 'imex-persist topology --json'"
        )
    elif report.world_size == 1:
        report.why_not = "one rank has nobody to exchange with: use --tp 2 or more"
    return report


def _no_gpu(gpus: list[Gpu]) -> str:
    names = ", ".join(f"{gpu.name} with compute capability {gpu.capability[0]}.{gpu.capability[1]}" for gpu in gpus)
    why = f"{names} cannot run the kernel, 9.0 or later (Hopper) is needed" if gpus else "no GPU was found"
    return f"{why}: check with nvidia-smi; 'imex-persist doctor --device sim' tests the kernel in the simulator"


def _run_once(report: Report, folder: str, device: str, strategy: str | None, options: dict) -> set[str]:
    """One start, one request; adds to `report`. Returns the strategies that were used."""
    from imex_persist import LLM, SamplingParams
    from imex_persist.runtime import startup

    world, first = report.world_size, not report.lines
    logger.info(
        "doctor: a start with the exchange %s; one that was never made here builds its kernel first", strategy or "as planned"
    )
    sizes = dict(max_model_len=MODEL["max_position_embeddings"], max_num_seqs=1, max_rows=ROWS, load_format="dummy")
    with (
        _quietly(),
        LLM(folder, device=device, tensor_parallel_size=world, exchange=strategy or PLANNED, **sizes, **options) as llm,
    ):
        shape, group = llm.shape.copy(), llm.group
        if first:
            report.lines = startup.lines(shape, group)
            report.kind, report.gpus = group.placement.kind, len(group.placement.places)
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        stream = llm.stream(list(PROMPT), params)
        if not llm.engine.drain(LIMIT_S):
            raise FaultError(f"{MAX_TOKENS} tokens did not come in {LIMIT_S} s and no wait of the kernel expired: report this")
        tokens = [token for step in stream for token in step.token_ids]
        problem, gap = _compare(llm.model, shape, tokens)
    used = strategies(shape) if world > 1 else {}
    if first and used:
        pairs = world * (world - 1)
        report.checks.append(Check("write and verify", True, f"{pairs} of {pairs} directions between ranks"))
    for name, rows in used.items():
        if strategy in (None, name):
            size = rows * int(shape["hidden_size"]) * 4 / 1024
            text = f"{rows} row(s), {size:.4g} KB of partial sums, {2 * MODEL['num_hidden_layers']} exchanges a step"
            report.checks.append(Check(f"exchange {name}", problem is None, problem or text))
    if first:
        text = f"{len(tokens)} tokens agree with the NumPy reference, logits within {gap:.2g} of its best"
        report.checks.append(Check("decode step", problem is None, problem or text))
    return set(used)


def strategies(shape: np.void) -> dict[str, int]:
    """The strategies that the self-test uses with a shape, and the rows of a step that does."""
    return {strategy_of(shape, rows): rows for rows in (1, ROWS)}


def _compare(model, shape, tokens: list[int]) -> tuple[str | None, float]:
    """(what is wrong, or None; how far below the reference's best logit the worst token is)."""
    from imex_persist.model.reference import logits

    if len(tokens) != MAX_TOKENS:
        return f"{len(tokens)} tokens came instead of {MAX_TOKENS}", 0.0
    scores = logits(model.config, model.weights, [*PROMPT, *tokens[:-1]], shape=shape)[len(PROMPT) - 1 :]
    gaps = [float(row.max() - row[token]) for row, token in zip(scores, tokens, strict=True)]
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    if gaps[worst] <= TOLERANCE:
        return None, gaps[worst]
    best = int(scores[worst].argmax())
    return f"token {worst} is {tokens[worst]} where the reference has {best}, {gaps[worst]:.3g} above it", gaps[worst]


def service_line() -> str:
    """Keeps implicit exchange apart from NVIDIA's service of the same name, in one sentence."""
    state = "runs here" if _service_runs() else "does not run here"
    return (
        f"NVIDIA's {SERVICE} service, which shares GPU memory between the hosts of an NVLink domain, is another thing: it {state}, and "
        "implicit exchange inside one host neither needs nor uses it"
    )


def _service_runs() -> bool:
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == SERVICE:
                return True
    return False


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The engine's own start log is shown once, by `run`."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
