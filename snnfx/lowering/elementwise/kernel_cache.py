"""The disk cache of generated code: files that are complete, and not more of them than a limit allows.

Two environment variables configure it:

- SNNFX_CACHE_DIR: the folder; by default `snnfx` in the user's cache folder.
- SNNFX_CACHE_LIMIT: the size in MiB above which the least recently used files are removed; by default 256, and 0 for
  no limit.

Several processes may use one folder: a file appears under its name by a rename, and removing a file that another
process has loaded does not affect that process. Files of a read-only folder are used; if a new file cannot be stored
there, a warning says so, and the file lies in a temporary folder of this process.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from snnfx.errors import InputError, warn_once

__all__ = ["cache_directory", "is_complete", "places", "store", "write_atomically"]

_DEFAULT_LIMIT = 256
_SUFFIXES = (".so", ".py")
_ABANDONED_AFTER = 3600.0
"""Age in seconds of a temporary entry that a killed process left."""
_TEMPORARY = ".write_"
_DIGEST_LENGTH = 32


def cache_directory() -> Path:
    """The folder of compiled kernels: SNNFX_CACHE_DIR, or `snnfx` in the user's cache folder."""
    configured = os.environ.get("SNNFX_CACHE_DIR")
    if configured:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "snnfx"


def places(name: str) -> list[Path]:
    """The paths at which a file of this name may lie; the first one is in the cache folder."""
    return [directory / name for directory in (cache_directory(), *_temporary_directory)]


def store(content: bytes, path: Path) -> Path:
    """Write a library with a digest behind its content, then remove files beyond the limit.

    A loader ignores bytes behind the sections of a library. See `write_atomically` for the result.
    """
    return write_atomically(content + _digest(content, path), path)


def is_complete(path: Path) -> bool:
    """Whether a library exists as `store` wrote it; loading a truncated one may kill the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if _digest(content[:-_DIGEST_LENGTH], path) != content[-_DIGEST_LENGTH:]:
        return False
    with contextlib.suppress(OSError):  # another process may have removed it, or own it
        os.utime(path)  # its last use
    return True


def _digest(content: bytes, path: Path) -> bytes:
    """The digest of a library and of its name: a copy under another name computes something else."""
    return hashlib.sha256(path.name.encode() + b"\0" + content).digest()


def write_atomically(content: bytes, path: Path) -> Path:
    """Write a file under another name, then rename it, so that other processes never see a part of it.

    Returns:
        The path of the file: in a temporary folder of this process if the folder of `path` is full or read-only.

    Raises:
        OSError: the temporary folder is full or read-only as well.
    """
    _limit()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(content, path)
    except OSError as error:
        message = (
            f"the folder {path.parent} of compiled kernels cannot be written ({error.strerror or error}), so this "
            "process keeps its kernels in a temporary folder. Set SNNFX_CACHE_DIR to a folder with space that can be "
            "written."
        )
        warn_once("SNNFX510", message, key=path.parent)
        path = _directory_of_this_process() / path.name
        _write(content, path)
    return path


def _write(content: bytes, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_TEMPORARY, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    _remove_least_recently_used(path)


def _limit() -> int:
    """The limit in bytes, 0 for none."""
    configured = os.environ.get("SNNFX_CACHE_LIMIT", str(_DEFAULT_LIMIT))
    try:
        limit = int(configured)
    except ValueError:
        limit = -1
    if limit < 0:
        raise InputError(
            "SNNFX326",
            f"the environment variable SNNFX_CACHE_LIMIT is {configured!r}",
            why="it is no size in MiB.",
            hint="Set it to a number, such as 256, or to 0 for no limit.",
        )
    return limit << 20


def _remove_least_recently_used(newest: Path) -> None:
    """Remove the files that were not used for the longest time until the rest fits, but never `newest`."""
    limit, total, now = _limit(), 0, time.time()
    files: list[tuple[float, int, Path]] = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it, or own it
            status = path.stat()
            if path.name.startswith(_TEMPORARY) and now - status.st_mtime > _ABANDONED_AFTER:
                path.unlink()
            elif path.suffix in _SUFFIXES and not path.name.startswith("."):
                files.append((status.st_mtime, status.st_size, path))
                total += status.st_size
    for _, size, path in sorted(files) if limit else ():
        if total <= limit:
            return
        if path != newest:
            with contextlib.suppress(OSError):  # as above
                path.unlink()
            total -= size


def _directory_of_this_process() -> Path:
    if not _temporary_directory:
        folder = tempfile.TemporaryDirectory(prefix="snnfx_")
        atexit.register(folder.cleanup)
        _temporary_directory.append(Path(folder.name))
    return _temporary_directory[0]


_temporary_directory: list[Path] = []
"""The temporary folder of this process, if it needed one; it exists until the process ends."""
