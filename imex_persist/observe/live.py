"""What `imex-persist trace` shows while tokens come: the step's time, its spread, and which phase holds the critical path."""

from __future__ import annotations

import time

import numpy as np
from rich.live import Live
from rich.text import Text

from imex_persist.observe.console import histogram, make_console, us
from imex_persist.observe.path import critical_path
from imex_persist.observe.report import distribution, name_of
from imex_persist.observe.spans import Trace


class LiveView:
    """Use as a context manager; `update(trace of new steps or None, tokens so far)`."""

    def __init__(self, max_tokens: int, console=None):
        self.max_tokens = max_tokens
        self.steps_us: list[float] = []
        self.by_phase: dict[str, float] = {}
        self._console = console or make_console()
        self._live = Live(console=self._console, refresh_per_second=10, transient=True)
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._live.__exit__(*exc)

    def update(self, trace: Trace | None, tokens: int) -> None:
        self._began = self._began or (time.monotonic(), tokens)
        for step in trace.steps if trace is not None else ():
            path = critical_path(trace, step)
            self.steps_us.append(path.us)
            for (phase,), spent in path.total("phase").items():
                self.by_phase[name_of(phase)] = 0.8 * self.by_phase.get(name_of(phase), spent) + 0.2 * spent
        self._live.update(self.render(tokens))

    def render(self, tokens: int) -> Text:
        since, first = self._began or (time.monotonic(), tokens)
        rate = (tokens - first) / max(time.monotonic() - since, 1e-9)
        lines = [f"token {tokens} of {self.max_tokens}   {rate:.1f} tokens/s"]
        if self.steps_us:
            d = distribution(np.array(self.steps_us))
            lines.append(
                f"step now {us(self.steps_us[-1])}   p50 {us(d['p50'])}   p90 {us(d['p90'])}   p99 {us(d['p99'])}   max {us(d['max'])}"
            )
            lines.append(f"{us(min(self.steps_us))} |{histogram(self.steps_us)}| {us(d['max'])}")
            total = sum(self.by_phase.values()) or 1.0
            order = sorted(self.by_phase.items(), key=lambda item: -item[1])
            lines.append(f"critical path: {order[0][0]} holds {order[0][1] / total:.0%}")
            lines += [f"  {name:10} {'█' * round(40 * spent / total):40} {spent / total:5.1%}" for name, spent in order]
        return Text("\n".join(lines))
