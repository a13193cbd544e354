"""What nobody closed ends, wherever the garbage collector happens to find it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from imex_persist.runtime.dropping import Ending


class Owner:
    """In a cycle, so that only the collector finds it."""

    def __init__(self, end):
        self.me = self
        self.ending = Ending(self, end)


@pytest.mark.timeout(20)
def test_a_dropped_owner_is_ended_though_the_lock_is_held_that_ending_takes():
    lock, ended = threading.Lock(), threading.Event()

    def end():
        with lock:
            ended.set()

    Owner(end)
    with lock:
        gc.collect()
        assert not ended.is_set()
    assert ended.wait(5)


def test_it_ends_once():
    calls = []
    owner = Owner(lambda: calls.append(threading.current_thread()))
    owner.ending()
    owner.ending()
    del owner
    gc.collect()
    assert calls == [threading.current_thread()]


def test_at_the_interpreters_end_all_are_ended():
    code = (
        "from tests.runtime.test_dropping import Owner, gc\n"
        "kept = Owner(lambda: print('kept'))\n"
        "Owner(lambda: print('dropped'))\n"
        "gc.collect()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["dropped", "kept"], "")
