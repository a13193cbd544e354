"""JSON lines over a socket pair: how the parent and its workers talk before and after, never during, decoding."""

from __future__ import annotations

import json
import select
import socket
import threading
import time

MAX_LINE = 16 << 20  # bytes: a peer that sends more without a newline is broken


class Closed(ConnectionError):
    """The other side is gone."""


class Channel:
    """One side. `send` may be called by any thread, `receive` by one."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(True)
        self._socket = sock
        self._buffer = bytearray()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict) -> None:
        """Raises Closed when nobody reads."""
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError as error:
            raise Closed("the other side of the control socket is gone") from error

    def receive(self, timeout_s: float | None = None) -> dict | None:
        """The next message, or None after `timeout_s` seconds without a whole one. Raises Closed at the end of the stream."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (end := self._buffer.find(b"\n")) < 0:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return None
            try:
                data = self._socket.recv(1 << 16)
            except OSError as error:
                raise Closed("the control socket broke") from error
            if not data or len(self._buffer) > MAX_LINE:
                raise Closed("the other side of the control socket is gone")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return json.loads(line)

    @property
    def pending(self) -> bool:
        """Whether a whole message waits in the buffer, where select does not see it."""
        return b"\n" in self._buffer

    def close(self) -> None:
        try:
            self._socket.close()
        except OSError:
            pass
