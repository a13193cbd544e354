"""Ends what its owner did not close. The garbage collector may find an owner anywhere: in any thread, between any two bytecodes, with any
lock held. So all that it does is to put a note into a queue, and a thread of its own ends what was dropped.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable

from imex_persist.log import warn

_notes: queue.SimpleQueue[Ending | None] = queue.SimpleQueue()  # its put may be called in the middle of itself
_open: set[Ending] = set()  # not ended yet; knows no owner
_thread: threading.Thread | None = None
_starting = threading.Lock()


class Ending:
    """Calls `end()` once: when it is called, soon after `owner` is collected, or at the interpreter's end. `end` must not know `owner`."""

    def __init__(self, owner: object, end: Callable[[], None]):
        global _thread
        self._end = end
        self._finalizer = weakref.finalize(owner, _notes.put, self)
        self._finalizer.atexit = False  # then nothing runs beside it, and it waits: see _at_exit
        _open.add(self)
        with _starting:
            if _thread is None:
                _thread = threading.Thread(target=_work, name="imex-dropped", daemon=True)
                _thread.start()

    def __call__(self) -> None:
        if self._finalizer.detach():
            self.end()

    def end(self) -> None:
        _open.discard(self)
        self._end()


def _work() -> None:
    while ending := _notes.get():
        try:
            ending.end()
        except Exception as error:
            warn(f"what was dropped did not end well: {error}")


@atexit.register
def _at_exit() -> None:
    if _thread is not None:
        _notes.put(None)  # behind those that were dropped
        _thread.join()
    for ending in list(_open):
        ending()
