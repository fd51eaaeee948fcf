"""Compiled code on disk, from one process to the next: `get(key)` and `put(key, data)`.

A folder of one file per key: `$NITINOL_CACHE_DIR` (empty: nothing is kept), else `nitinol` in the user's cache folder.
Any number of processes may use it at once. Whatever goes wrong, the answer is "not there": an entry that is truncated
or altered is removed, and a disk that is full or not writable costs one line on stderr, once per process.

File: 8 bytes magic, the data's length (8 bytes, little endian), SHA-256 of key and data (32 bytes), the data. The
digest finds accidents. What is in an entry will run, so that only what nobody else can have written is read: folder and
entry belong to the user, nobody else may write to them, neither is a symbolic link, and an entry is a regular file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import random
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nitinol import __version__

LIMIT_BYTES = 512 << 20  # a kernel takes 5 to 50 kB
_MAGIC = b"NITINOL1"
_HEADER_BYTES = 8 + 8 + 32
_STALE_SECONDS = 3600  # a temporary file of that age belongs to no running process

_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)

_warned = False
_swept = False


class Untrusted(Exception):
    """Somebody else may have written the folder or the entry."""


def folder() -> Path | None:
    """Where entries lie; None if there is no such place. The folder need not exist yet."""
    chosen = os.environ.get("NITINOL_CACHE_DIR")
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "nitinol"
        base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nitinol"
    except RuntimeError:  # no home
        return None


def get(key: str) -> bytes | None:
    """What was put under the key, or None."""
    try:
        path = _path(key)
        if path is None:
            return None
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        with open(os.open(path, os.O_RDONLY | _CAREFULLY | getattr(os, "O_BINARY", 0)), "rb") as file:
            _check(path, os.fstat(file.fileno()), stat.S_ISREG, "a regular file")
            size = os.fstat(file.fileno()).st_size
            entry = file.read() if size <= LIMIT_BYTES else b""
        data = entry[_HEADER_BYTES:]
        if entry[:_HEADER_BYTES] != _header(key, data):
            os.unlink(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the oldest by use are removed first
        return data
    except Untrusted as error:
        _warn(error)
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            _warn(Untrusted(f"{error.filename} is a symbolic link"))
        return None
    except ValueError:  # a null character in the folder's name
        return None


def put(key: str, data: bytes) -> None:
    """Keeps the data under the key, if that is possible."""
    temporary = ""
    try:
        path = _path(key)
        if path is None or len(data) > LIMIT_BYTES // 8:
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _path(key)  # the folder may have come from somebody else just now
        handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        with open(handle, "wb") as file:
            file.write(_header(key, data))
            file.write(data)
        os.replace(temporary, path)  # others see the whole entry or none
        temporary = ""
        _sweep_sometimes(path.parent)
    except (OSError, ValueError, Untrusted) as error:
        _warn(error)
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@functools.cache
def compiler_version() -> str:
    """Changes whenever the compiler's own source does; a part of every key."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _path(key: str) -> Path | None:
    """The key's file. Raises Untrusted if others may write to the folder."""
    place = folder()
    if place is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        _check(place, os.lstat(place), stat.S_ISDIR, "a folder")
    return place / hashlib.sha256(key.encode()).hexdigest()


def _check(path: Path, status: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> None:
    """Raise Untrusted unless this is of that kind, and only the user can have written it."""
    if stat.S_ISLNK(status.st_mode):
        raise Untrusted(f"{path} is a symbolic link")
    if not is_kind(status.st_mode):
        raise Untrusted(f"{path} is not {kind}")
    if hasattr(os, "getuid"):  # elsewhere a user's folders are the user's
        if status.st_uid != os.getuid():
            raise Untrusted(f"{path} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Untrusted(f"other users may write to {path}, mode {stat.S_IMODE(status.st_mode):04o}")


def _header(key: str, data: bytes) -> bytes:
    digest = hashlib.sha256(key.encode() + b"\0" + data).digest()
    return _MAGIC + len(data).to_bytes(8, "little") + digest


def _sweep_sometimes(place: Path) -> None:
    """At a process's first entry, and at one in 64 after that."""
    global _swept
    if not _swept or random.random() < 1 / 64:
        _swept = True
        sweep(place, LIMIT_BYTES)


def sweep(place: Path, limit: int) -> None:
    """Removes temporary files left behind and, above `limit` bytes, the entries used longest ago, to 3/4 of it."""
    entries = []
    for entry in os.scandir(place):
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(".new-"):
                if time.time() - status.st_mtime > _STALE_SECONDS:
                    os.unlink(entry.path)
            elif len(entry.name) == 64:  # nothing else is ours
                entries.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in entries)
    if total <= limit:
        return
    for _, size, path in sorted(entries):
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size
        if total <= limit * 3 // 4:
            return


def _warn(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        why = str(error)
        if isinstance(error, OSError) and error.strerror is not None:  # without Python's "[Errno 17]"
            why = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        print(
            f"nitinol: compiled kernels are not kept on disk ({why}); set NITINOL_CACHE_DIR to a folder that you, and "
            "only you, can write to (mode 0700), or to nothing to stop asking",
            file=sys.stderr,
        )
