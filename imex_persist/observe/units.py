"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

_US = ((1e3, 1.0, "µs"), (1e6, 1e3, "ms"), (float("inf"), 1e6, "s"))
_BYTES = ((1e3, 1.0, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (float("inf"), 1e9, "GB"))
_GBS = ((1e3, 1.0, "GB/s"), (float("inf"), 1e3, "TB/s"))


def _scaled(value: float, units) -> str:
    scale, unit = next((scale, unit) for limit, scale, unit in units if abs(value) < limit or limit == float("inf"))
    number = value / scale
    return f"{number:.{2 if abs(number) < 10 else 1 if abs(number) < 100 else 0}f} {unit}"


def us(value: float | None) -> str:
    """ "0.42 µs", "87.3 µs", "1.20 ms"."""
    return "unknown" if value is None else _scaled(value, _US)


def size(count: float) -> str:
    """ "98.3 kB", "3.76 GB"; "-" for nothing."""
    return _scaled(count, _BYTES) if count else "-"


def rate(gbs: float) -> str:
    """Of GB/s: "17.9 GB/s", "4.69 TB/s"."""
    return _scaled(gbs, _GBS)
