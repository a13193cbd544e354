"""One worker as its parent sees it: a process, a socket, and what it has said."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from imex_persist.runtime.control import Channel
from imex_persist.runtime.placement import Place

COMMAND = (sys.executable, "-P", "-m", "imex_persist.runtime.worker")
KILL_S = 10.0


class WorkerProcess:
    """A started worker. `command` is replaced by tests only."""

    def __init__(self, place: Place, fds: tuple[int, ...], command: tuple[str, ...] = COMMAND):
        self.place = place
        self.returned: dict | None = None  # its "returned" event
        ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())],
                pass_fds=(theirs.fileno(), *fds),
                stdin=subprocess.DEVNULL,
                stdout=2,  # results on our stdout are ours alone
                env=environment(),
                start_new_session=True,  # the terminal's Ctrl-C reaches the parent, which ends its workers in order
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.channel = Channel(ours)

    @property
    def title(self) -> str:
        ranks = self.place.ranks
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"

    def how_it_ended(self, timeout_s: float = 1.0) -> str:
        """A sentence's end: "was killed by SIGKILL"; the process gets `timeout_s` to finish dying."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return "closed its control socket"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    def end(self, timeout_s: float) -> None:
        """Closes the socket, which asks the worker to end, and kills it if it has not after `timeout_s`."""
        self.channel.close()
        try:
            self.process.wait(timeout_s)
        except BaseException as error:  # a second Ctrl-C too
            self.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise

    def kill(self) -> None:
        """At once. A driver that is slow to let go of a process is not waited for longer than KILL_S."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_S)


def environment() -> dict[str, str]:
    """Of a child process that imports this package and may use a GPU."""
    home = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": home if not path else f"{home}{os.pathsep}{path}",  # the same package as ours, from a checkout too
        "CUDA_MODULE_LOADING": "EAGER",  # a lazy load would wait for the resident kernel
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # ordinals as discover.py counts them
    }
