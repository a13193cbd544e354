"""How a worker ends when its parent does, whatever its main thread is busy with.

Three nets: the control socket's end (any death of the parent closes it), Linux's parent-death signal, and a last timer after which
the process exits without asking anybody. A suspended parent keeps all three quiet: its kernel stays resident.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int, on_death: Callable[[], None]) -> None:
    """Calls `on_death` in the main thread once process `parent` is gone. Exits at once if it already is."""

    def check(_signal, _frame) -> None:
        if os.getppid() != parent:  # the signal also comes when only the *thread* that started us ends
            on_death()

    signal.signal(signal.SIGTERM, check)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent, which ends us in order
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def exit_after(seconds: float) -> None:
    """Ends this process after `seconds`, without any clean-up, unless it has ended by itself."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
