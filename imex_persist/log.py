"""Log lines: `[imex] …` on stderr, through the logger "imex_persist" so that applications can redirect or silence them."""

from __future__ import annotations

import logging
import sys


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else record.levelname.lower() + ": "
        try:
            print(f"[imex] {level}{record.getMessage()}", file=sys.stderr, flush=True)
        except (OSError, ValueError):  # a closed stderr is no reason to stop decoding
            pass


logger = logging.getLogger("imex_persist")
if not logger.handlers:
    logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log(text: str) -> None:
    logger.info("%s", text)


def warn(text: str) -> None:
    logger.warning("%s", text)
