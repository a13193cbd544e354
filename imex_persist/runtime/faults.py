"""Fault records of all ranks (abi.FaultRecord) and the sentence that a user reads."""

from __future__ import annotations

import numpy as np

from imex_persist import abi

PER_LAYER = (abi.Phase.QKV, abi.Phase.ATTENTION, abi.Phase.O_PROJ, abi.Phase.GATE_UP, abi.Phase.DOWN_PROJ)
_WAITED_FOR = {
    abi.Wait.WORDS: "words of {phase}",
    abi.Wait.TILE: "a tile of {phase} to arrive in shared memory",
    abi.Wait.STAGE: "a free ring stage in {phase}",
    abi.Wait.PARTIAL: "partial sums of its own warps in {phase}",
    abi.Wait.PLAN: "the plan of the next step",
    abi.Wait.STEP: "its own warps to finish a step",
    abi.Wait.COUNT: "nothing: the kernel has run as many steps as it can count, start a new one",
}


def fault_bytes(world_size: int) -> int:
    """Bytes of the fault block: one record a rank."""
    return world_size * abi.FaultRecord.itemsize


def fault_offset(rank: int) -> int:
    return rank * abi.FaultRecord.itemsize


def read_faults(view: memoryview, world_size: int) -> list[np.void]:
    """The valid records, in rank order, copied."""
    records = np.frombuffer(view, abi.FaultRecord, world_size).copy()
    return [record for record in records if record["valid"]]


def describe(record: np.void) -> str:
    """One fault record as a sentence without its full stop."""
    wait = _WAITED_FOR.get(int(record["wait"]), f"wait {record['wait']} in {{phase}}")
    phase = int(record["phase"])
    name = abi.Phase(phase).name.lower() if phase in abi.Phase._value2member_map_ else f"phase {phase}"
    if phase in PER_LAYER:
        name += f" of layer {record['layer']}"
    source = f" of rank {record['source']}" if record["source"] != record["rank"] else ""
    return (
        f"rank {record['rank']}, block {record['block']} waited {record['waited_us'] / 1e6:.1f} s for {wait.format(phase=name)}{source} "
        f"(expected {record['expected']}, saw {record['seen']})"
    )


def suspects(records: list[np.void]) -> list[int]:
    """Ranks that others waited for and that did not report a fault of their own first: the likely cause."""
    waited_for = {int(r["source"]) for r in records if r["source"] != r["rank"]}
    return sorted(waited_for - {int(r["rank"]) for r in records}) or sorted(waited_for)


def explain(records: list[np.void]) -> str:
    """All fault records as one message: who stopped answering, then the earliest witness's words."""
    if not records:
        return "the kernel returned without being asked and left no fault record"
    silent = suspects(records)
    who = f"rank {silent[0]} stopped answering: " if silent else ""
    longest = max(records, key=lambda r: int(r["waited_us"]))
    return who + describe(longest)
