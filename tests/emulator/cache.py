"""What was compiled, kept by content in a private directory of the user."""

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_BYTES = 4 << 30
KEPT_SECONDS = 24 * 3600  # after its last use a file is kept for a day at least: somebody may be about to load it


def directory() -> Path:
    """Where it is kept; only its owner can write to it, since what is in it gets loaded."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "cuconv" / "emulator"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to this user and be writable by no one else")
    return folder


def cached(key: str, suffix: str, make: Callable[[], bytes]) -> Path:
    """The file of what `make` returns; `key` is everything that it depends on."""
    target = directory() / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
    try:
        if time.time() - target.stat().st_mtime > KEPT_SECONDS / 2:
            os.utime(target)
    except FileNotFoundError:
        data = make()
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # appears complete or not at all
            made = Path(folder, "made")
            made.write_bytes(data)
            made.replace(target)
        prune()
    return target


@functools.lru_cache(maxsize=1)
def prune() -> None:
    """Removes what has not been used for the longest, down to LIMIT_BYTES; once a process."""
    found = []
    for path in directory().iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in found) - LIMIT_BYTES
    for used, size, path in sorted(found):
        if excess <= 0 or time.time() - used < KEPT_SECONDS:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= size
