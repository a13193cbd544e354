"""Where the kernel's sources are, and the cache of what was built from them. Both machines use it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from imex_persist.errors import DeviceError

_PACKAGE = Path(__file__).resolve().parent.parent


def cuda_src() -> Path:
    """The folder of the kernel's sources: in the package once installed from a wheel, beside it in a checkout."""
    for folder in (_PACKAGE / "cuda_src", _PACKAGE.parent / "cuda_src"):
        if (folder / "primitives.cuh").is_file():
            return folder
    raise DeviceError(
        f"the kernel sources (cuda_src) are neither in {_PACKAGE} nor beside it: this installation is incomplete; "
        "install the wheel again, or run from a checkout"
    )


def source_files(*, without: Iterable[str] = ()) -> list[Path]:
    """Every source and header in a fixed order, except those in the sub-folders `without`."""
    root, skip = cuda_src(), set(without)
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix in {".cu", ".cuh", ".cpp", ".h", ".hpp", ".inc", ".S"}
        and not skip & set(path.relative_to(root).parts[:-1])
    )


def digest(files: Iterable[Path], *facts: object) -> str:
    """A name for what would be built from these files and facts (flags, versions): same name, same build."""
    sha = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        sha.update(f"{path.name}\0{len(content)}\0".encode() + content)
    for fact in facts:
        sha.update(f"{fact}\0".encode())
    return sha.hexdigest()[:32]


def cache_dir() -> Path:
    """$IMEX_CACHE, else ~/.cache/imex_persist (below $XDG_CACHE_HOME if that is set)."""
    chosen = os.environ.get("IMEX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imex_persist"


def cache_is_writable() -> bool:
    folder = cache_dir()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder `name` ("cuda/<digest>"), made by `build(empty folder)` if it is not there.

    The folder appears by one rename, whole or not at all: several ranks may build at once, and a build that was interrupted
    leaves nothing that looks finished. Whoever comes second throws its own away.
    """
    final = cache_dir() / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise DeviceError(
            f"the cache folder {final.parent} cannot be written ({error.strerror}): set IMEX_CACHE to a folder that can"
        ) from error
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from other users
        try:
            scratch.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
