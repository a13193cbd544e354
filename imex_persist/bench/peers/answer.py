"""How a peer's process answers: its job as JSON in the first argument, the answer in the file that the second one names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def answer(measure: Callable[[dict], dict], argv: list[str]) -> None:
    Path(argv[2]).write_text(json.dumps(measure(json.loads(argv[1]))))
