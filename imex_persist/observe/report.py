"""What a trace says in numbers: the tables of the console and the object of `--json` are both made from here."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np

from imex_persist import abi, planner
from imex_persist.abi import Phase
from imex_persist.observe.clocks import TIMER_WRAP, signed
from imex_persist.observe.hops import exchange_places, hop_check, words_left
from imex_persist.observe.path import KINDS, Path, critical_path, suspects, usual
from imex_persist.observe.spans import EXCHANGED, Trace, num_phases

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def name_of(phase: int) -> str:
    return Phase(phase).name.lower()


def distribution(values) -> dict[str, float]:
    """p50, p90, p99 and max, and the mean; zeros for none."""
    values = np.asarray(values, float)
    if not len(values):
        return dict.fromkeys(("mean", *PERCENTILES), 0.0)
    return {"mean": float(values.mean())} | {name: float(np.percentile(values, q)) for name, q in PERCENTILES.items()}


def phase_bytes(shape: np.void, spans: np.ndarray) -> dict[Phase, float]:
    """Bytes one rank streams from its memory in a step, the mean over `spans`' steps: weights by shape, KV pages as they were read."""
    s = {name: int(shape[name]) for name in abi.Shape.names if name not in ("rms_eps", "attn_scale")}
    hidden, layers, width = s["hidden_size"], s["num_layers"], s["num_heads"] * s["head_dim"]
    steps, world = max(1, len(np.unique(spans["step"]))), s["world_size"]
    norm = 2 * hidden
    of = lambda phase: spans[spans["phase"] == phase]  # noqa: E731
    samples = len(np.unique(of(Phase.LM_HEAD)["step"][of(Phase.LM_HEAD)["value"] > 0])) / steps
    embeds = of(Phase.EMBED)
    rows = float(embeds["value"].mean()) if len(embeds) else 0.0
    return {
        Phase.EMBED: rows * hidden * 2,
        Phase.QKV: layers * (2 * (width + 2 * s["num_kv_heads"] * s["head_dim"]) * hidden + norm),
        Phase.ATTENTION: float(of(Phase.ATTENTION)["value"].sum()) / steps / world * planner.page_bytes(shape),
        Phase.O_PROJ: layers * 2 * hidden * width,
        Phase.GATE_UP: (layers - 1 + samples)
        * (4 * s["intermediate_size"] * hidden + norm),  # of the last layer for logits only
        Phase.DOWN_PROJ: (layers - 1 + samples) * 2 * hidden * s["intermediate_size"],
        Phase.LM_HEAD: samples * (2 * s["vocab_rows"] * hidden + norm),
        Phase.SAMPLE: 0.0,
    }


def phase_rows(trace: Trace, paths: list[Path], ceiling_gbs: float | None) -> list[dict]:
    """Per phase, means over the steps: µs on the critical path and its share, bytes and rate, and an average block's waits."""
    steps, blocks = max(1, len(paths)), int(trace.shape["num_blocks"]) * int(trace.shape["world_size"])
    on_path = {phase: dict.fromkeys(KINDS, 0.0) for phase in Phase}
    for path in paths:
        for (phase, kind), us in path.total("phase", "kind").items():
            on_path[phase][kind] += us / steps
    total = sum(sum(kinds.values()) for kinds in on_path.values()) or 1.0
    sizes, waits = phase_bytes(trace.shape, trace.spans), word_waits(trace)
    rows = []
    for phase in Phase:
        s = trace.spans[trace.spans["phase"] == phase]
        us = sum(on_path[phase].values())
        words, peers = waits.get(phase, (0.0, 0.0))
        rows.append(
            {
                "phase": name_of(phase),
                "path_us": us,
                "share": us / total,
                "path_kinds_us": on_path[phase],
                "block_us": float((s["end"] - s["begin"]).sum()) / steps / blocks,
                "bytes": sizes[phase],
                "gbs": sizes[phase] / us / 1e3 if us > 0 else 0.0,
                "ceiling_gbs": ceiling_gbs,
                "wait_tiles_us": float(s["tiles"].sum() + s["ahead"].sum()) / steps / blocks,
                "wait_words_us": words,
                "wait_peers_us": peers,
            }
        )
    return rows


def word_waits(trace: Trace) -> dict[Phase, tuple[float, float]]:
    """µs that an average block waited for words in a step, (of its own rank, of other ranks), by phase.

    A block waited from when it was ready for a phase's words until the last of them left its sender; what follows is the hop, and
    what left earlier was not waited for. Whose the last was decides which kind it is.
    """
    world = int(trace.shape["world_size"])
    sums = {phase: np.zeros(2) for phase in Phase}
    for step in trace.steps:
        table = trace.table(step)
        out = words_left(table)
        for target in range(2, num_phases(trace.shape)):
            phase = Phase(int(table["phase"][0, 0, target]))
            source = target - 1
            ready, taken = table["begin"][..., target], table["input"][..., target]
            left = out[..., source].max(axis=1)  # [ranks]
            for rank in range(world):
                last = int(np.argmax(left)) if phase in EXCHANGED else rank
                waited = np.clip(np.minimum(left[last], taken[rank]) - ready[rank], 0.0, None)
                sums[phase][int(last != rank)] += np.nansum(waited)
    count = max(1, len(trace.steps)) * world * int(trace.shape["num_blocks"])
    return {phase: (float(a) / count, float(b) / count) for phase, (a, b) in sums.items()}


def exchange_rows(trace: Trace) -> list[dict]:
    """Per rank: how often its words of an exchange were the last to leave, by how much, and how long they took to be seen by others.

    export_to_visible_us is from the last word leaving a rank to the last block of another rank having it, of the exchanges in which
    nobody's left later: else the difference would be waiting for somebody else's.
    """
    world, layers = int(trace.shape["world_size"]), int(trace.shape["num_layers"])
    last, lead, visible, count = [0] * world, [[] for _ in range(world)], [[] for _ in range(world)], 0
    for step in trace.steps if world > 1 else ():
        table = trace.table(step)
        out = words_left(table)
        for source, target in exchange_places(layers):
            left = out[..., source].max(axis=1)
            taken = table["sum"][..., target]
            seen = np.where(np.isnan(taken), table["input"][..., target], taken).max(axis=1)
            if not np.isfinite(left).all():  # a step without logits has no last down_proj
                continue
            late = int(np.argmax(left))
            count += 1
            last[late] += 1
            lead[late].append(left[late] - np.delete(left, late).max())
            visible[late] += [float(seen[r] - left[late]) for r in range(world) if r != late]
    return [
        {
            "rank": rank,
            "exchanges": count,
            "arrived_last": last[rank],
            "late_by_us": distribution(lead[rank]),
            "export_to_visible_us": distribution(visible[rank]),
        }
        for rank in range(world)
        if world > 1
    ]


def request_rows(outputs: list, seen_ns: list[int | None]) -> list[dict]:
    """Per request (outputs.RequestOutput): TTFT and inter-token latencies, by host and device clock."""
    rows = []
    for output, seen in zip(outputs, seen_ns, strict=True):
        m = output.metrics
        times = m.device_time_ns
        rows.append(
            {
                "request_id": output.request_id,
                "prompt_tokens": len(output.prompt_token_ids),
                "tokens": len(times),
                "ttft_us": None if m.time_to_first_token is None else m.time_to_first_token * 1e6,
                "device_ttft_us": (times[0] - seen) / 1e3 if times and seen else None,  # descriptor seen -> token published
                "itl_us": distribution(np.diff(times) / 1e3),
                "tokens_per_s": (len(times) - 1) * 1e9 / (times[-1] - times[0])
                if len(times) > 1 and times[-1] > times[0]
                else 0.0,
            }
        )
    return rows


def path_json(path: Path) -> dict:
    return {
        "step": path.step,
        "us": path.us,
        "kinds_us": {kind: path.total("kind").get((kind,), 0.0) for kind in KINDS},
        "segments": [
            {
                "kind": s.kind, "phase": name_of(s.phase), "layer": s.layer, "rank": s.rank, "block": s.block, "begin_us": s.begin_us,
                "us": s.us, "source_rank": s.source_rank, "source_block": s.source_block,
            }
            for s in path.segments
        ],
    }  # fmt: skip


def comparison(slow: Path, typical: Path) -> list[dict]:
    """Where `slow` spent more than `typical`: by phase and kind, the largest difference first, with the longest piece of it."""
    a, b = slow.total("phase", "kind"), typical.total("phase", "kind")
    rows = []
    for phase, kind in sorted(a.keys() | b.keys()):
        mine = [s for s in slow.segments if (s.phase, s.kind) == (phase, kind)]
        longest = max(mine, key=lambda s: s.us, default=None)
        us, typical_us = a.get((phase, kind), 0.0), b.get((phase, kind), 0.0)
        rows.append(
            {
                "phase": name_of(phase), "kind": kind, "us": us, "typical_us": typical_us, "more_us": us - typical_us,
                "longest": longest and {"rank": longest.rank, "block": longest.block, "layer": longest.layer, "us": longest.us},
            }
        )  # fmt: skip
    return sorted(rows, key=lambda r: -r["more_us"])


def suspect_rows(paths: list[Path], trace: Trace, count: int = 3) -> list[dict]:
    """The blocks, phases and kinds whose segments on the paths exceed the usual most; sums over layers, per step."""
    usual_us, sums = usual(trace), {}
    for path in paths:
        for s in suspects(path, usual_us):
            if s.excess_us > 0:
                row = sums.setdefault((s.rank, s.block, s.phase, s.kind), {"excess_us": 0.0, "worst": s})
                row["excess_us"] += s.excess_us / len(paths)
                row["worst"] = max(row["worst"], s, key=lambda one: one.excess_us)
    rows = [
        {
            "rank": rank, "block": block, "phase": name_of(phase), "kind": kind, "excess_us": row["excess_us"],
            "worst_layer": row["worst"].layer, "worst_us": row["worst"].us, "usual_us": row["worst"].usual_us,
        }
        for (rank, block, phase, kind), row in sums.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda r: -r["excess_us"])[:count]


def chain(path: Path) -> dict | None:
    """One layer of the path, phase -> word -> phase: the layer whose time is the median of all. Neighbours of one kind are joined."""
    each = {layer: us for (layer,), us in path.total("layer").items() if layer < max(s.layer for s in path.segments)}
    if not each:
        return None
    layer = sorted(each, key=each.get)[(len(each) - 1) // 2]
    links: list[dict] = []
    for s in path.segments:
        if s.layer != layer or s.phase == Phase.EMBED:
            continue
        who = {
            "phase": name_of(s.phase), "kind": s.kind, "rank": s.rank, "block": s.block, "source_rank": s.source_rank,
            "source_block": s.source_block,
        }  # fmt: skip
        if links and {name: links[-1][name] for name in who} == who:
            links[-1]["us"] += s.us
        else:
            links.append({**who, "us": s.us})
    return {"step": path.step, "layer": layer, "us": each[layer], "links": links}


def published(trace: Trace, times_ns: list[int]) -> np.ndarray:
    """µs from a step's end to its token's record, for a request that ran alone: its tokens are those of the steps that sampled.

    Nothing where steps are missing in between. `times_ns` are of the GPU's timer, so good to its resolution.
    """
    heads = trace.spans[(trace.spans["phase"] == Phase.LM_HEAD) & (trace.spans["value"] > 0)]
    steps = np.unique(heads["step"])
    ends = np.array([float(trace.table(step)["end"][0, 0, -1]) for step in steps.tolist()])
    if len(ends) < len(times_ns) or not len(ends) or np.any(np.diff(steps) != 1):
        return np.zeros(0)
    return signed(np.array(times_ns, np.int64) - trace.origin_ns, TIMER_WRAP) / 1e3 - ends[: len(times_ns)]


def report(
    trace: Trace,
    *,
    requests: list[dict] = (),
    ceiling_gbs: float | None = None,
    ceiling_source: str | None = None,
    published_us=(),
    decode_only: bool = True,
) -> dict:
    """Everything, as plain numbers, lists and dicts. With `decode_only`, steps that hold prompt rows too are left out if others remain."""
    trace = decode_steps(trace) if decode_only else trace
    paths = [critical_path(trace, step) for step in trace.steps]
    shape = trace.shape
    out = {
        "axis": trace.axis,
        "clock_error_us": asdict(trace.errors),
        "hops": hop_check(trace),
        "ranks": int(shape["world_size"]),
        "blocks": int(shape["num_blocks"]),
        "layers": int(shape["num_layers"]),
        "spans_per_block": num_phases(shape),
        "steps": len(paths),
        "lost_steps": len(trace.lost),
        "step_us": distribution([p.us for p in paths]),
        "step_us_each": [p.us for p in paths],
        "gap_us": distribution([b.begin_us - a.end_us for a, b in pairwise(paths) if b.step == a.step + 1]),
        "published_us": distribution(published_us) if len(published_us) else None,
        "ceiling_gbs": ceiling_gbs,
        "ceiling_source": ceiling_source,
        "phases": phase_rows(trace, paths, ceiling_gbs),
        "exchanges": exchange_rows(trace),
        "requests": list(requests),
        "critical_path": None,
    }
    streamed = sum(p["bytes"] for p in out["phases"])
    out["bytes"] = streamed
    out["floor_us"] = streamed / ceiling_gbs / 1e3 if ceiling_gbs else None
    if paths:
        ordered = sorted(paths, key=lambda p: p.us)
        typical, slow = ordered[(len(ordered) - 1) // 2], ordered[-1]
        out["critical_path"] = {
            "kinds_us": {kind: float(np.mean([p.total("kind").get((kind,), 0.0) for p in paths])) for kind in KINDS},
            "typical": path_json(typical),
            "slowest": path_json(slow),
            "chain": chain(typical),
            "why_slower": comparison(slow, typical),
            "suspects": suspect_rows(paths, trace),
        }
    return out


def decode_steps(trace: Trace) -> Trace:
    """The steps that sample for every row: decoding only, where there are such steps."""
    heads = trace.spans[(trace.spans["phase"] == Phase.EMBED) & (trace.spans["rank"] == 0) & (trace.spans["block"] == 0)]
    if not len(heads):
        return trace
    rows = dict(zip(heads["step"].tolist(), heads["value"].tolist(), strict=True))
    usual_rows = min(rows.values())
    keep = [step for step, count in rows.items() if count == usual_rows]
    lm = trace.spans[(trace.spans["phase"] == Phase.LM_HEAD) & (trace.spans["value"] > 0)]
    sampled = set(lm["step"].tolist())
    keep = [step for step in keep if step in sampled] or keep
    return replace(trace, spans=trace.spans[np.isin(trace.spans["step"], keep)], _tables={})
