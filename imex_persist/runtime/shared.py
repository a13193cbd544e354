"""Shared host memory without a name: a file descriptor that children inherit, so nothing can be guessed and nothing is left behind."""

from __future__ import annotations

import mmap
import os
import tempfile


def reserve() -> int:
    """A descriptor of nothing yet, so that children can inherit it before its size is known."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("imex", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # no memfd outside Linux: a file of mode 0600 that has no name any more
        return os.dup(file.fileno())


def discard(fd: int) -> None:
    """Gives back a reserved descriptor that never got memory."""
    os.close(fd)


class SharedBlock:
    """`nbytes` (rounded up to pages) of zeroed shared memory. `view` is a page-aligned memoryview of bytes."""

    def __init__(self, fd: int, nbytes: int):
        self.fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, nbytes)
        self.view = memoryview(self._map)

    @classmethod
    def create(cls, nbytes: int) -> SharedBlock:
        return cls.allocate(reserve(), nbytes)

    @classmethod
    def allocate(cls, fd: int, nbytes: int) -> SharedBlock:
        """Gives a reserved descriptor its memory."""
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(fd, nbytes)
        return cls(fd, nbytes)

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> SharedBlock:
        """The block behind an inherited descriptor. Raises ValueError when it is not `nbytes` long."""
        size = os.fstat(fd).st_size
        if size != nbytes:
            raise ValueError(f"shared memory of {size} bytes was inherited: {nbytes} were announced")
        return cls(fd, nbytes)

    def close(self) -> None:
        """Unmaps, unless views of it are still alive: then the mapping goes with the last of them."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            pass
