"""Compiled kernels: what they are made of, and the folder they are kept in. Knows neither CuPy nor a GPU.

A kernel is compiled once for a user and not once a process. Its file is what the driver loads, a plain cubin (or PTX),
with the name ``<kernel>-<key>-<digest>.cubin``. The key stands for everything that went into it: the source with its
headers, the constants, the compiler's options and version. The digest is that of the bytes that came out. So one rename
publishes a file together with its checksum, and whoever reads it, in whatever process, sees all of it or nothing. A
file whose bytes are not those of its name is compiled again.

The folder is ``$CUCONV_CACHE_DIR``, or else ``cuconv/cubins`` in the user's cache folder. The driver runs what lies in
it, so it must belong to the user and nobody else may write to it. A folder that is shared, read-only or full costs a
warning and the benefit for the next process, nothing more: the files of this process then go to a fresh private folder
that vanishes with it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cuconv.plan.types import ELEMENTS, PlanError

FOLDER_VARIABLE = "CUCONV_CACHE_DIR"
LIMIT_BYTES = 256 << 20  # of the folder; a kernel takes 10 to 260 kB, so thousands of them
ABANDONED_SECONDS = 3600  # after which a file that was never finished is removed
DIGITS = 32  # hexadecimal, 128 bits, of the key and of the digest in a file's name

# What a constant may be besides an integer.
TYPE_NAMES = frozenset({element.c_type for element in ELEMENTS.values()} | {"int", "long long"})

Constants = tuple[tuple[str, "int | str"], ...]

logger = logging.getLogger("cuconv")

_INCLUDE = re.compile(r'\s*#\s*include\s*(?:"([^"]*)")?')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
_CONSTANT_NAME = re.compile(r"[A-Z][A-Z0-9_]*\Z")
_FILE_NAME = re.compile(r"\w+\.cuh?\Z", re.ASCII)


# --- What a kernel is made of ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def expanded(folder: Path, name: str) -> str:
    """The text of a file of `folder` with every header in its place, read once a process.

    Raises:
        PlanError: an `#include` of anything but a file of this folder, in quotes.
        FileNotFoundError: there is no such file.
    """
    return "".join(_lines(folder, name, set(), ()))


def _lines(folder: Path, name: str, seen: set[str], including: tuple[str, ...]) -> Iterator[str]:
    if not _FILE_NAME.match(name) or name in including:
        chain = " -> ".join((*including, name))
        raise PlanError(f"kernels include files of their own folder, and none that includes itself. Received: {chain}")
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    if any(map(_ONCE.match, lines)):
        if name in seen:
            return
        seen.add(name)
    yield f'#line 1 "{name}"\n'  # the compiler's messages and profilers then name the file as it is on disk
    for number, line in enumerate(lines, 1):
        include = _INCLUDE.match(line)
        if include:
            if include[1] is None:
                raise PlanError(f'kernels include "files.cuh" only. Received: {name}, line {number}: {line.strip()}')
            yield from _lines(folder, include[1], seen, (*including, name))
            yield f'#line {number + 1} "{name}"\n'
        else:
            yield "\n" if _ONCE.match(line) else f"{line}\n"


def definitions(constants: Constants) -> tuple[str, ...]:
    """The compiler's -D options.

    Raises:
        PlanError: a name or a value that is no constant of a kernel.
    """
    options = []
    for name, value in constants:
        if not _CONSTANT_NAME.match(name) or not (isinstance(value, int) or value in TYPE_NAMES):
            raise PlanError(
                "a constant is an integer or a type of common.cuh, under a name in capital letters. "
                f"Received: {name}={value!r}"
            )
        options.append(f"-D{name}={int(value) if isinstance(value, int) else value}")
    return tuple(options)


@dataclass(frozen=True)
class Recipe:
    """Everything that a compiled kernel depends on."""

    kernel: str
    source: str  # expanded
    options: tuple[str, ...]  # of the compiler, the architecture and the constants among them
    compiler: str  # its name and version
    suffix: str  # ".cubin" or ".ptx"

    @functools.cached_property
    def key(self) -> str:
        """Differs where any of it differs."""
        parts = (self.kernel, self.source, *self.options, self.compiler, self.suffix)
        # Lengths, so that text cannot move from one part to the next unnoticed.
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


# --- Where they are kept -----------------------------------------------------------------------------------------


def default_folder() -> Path:
    """Where compiled kernels are kept unless told otherwise.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cuconv" / "cubins"


class Cubins:
    """Compiled kernels in a folder, shared with other processes; any number of threads may ask."""

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        """`folder` None: :func:`default_folder`. Nothing is read or written before the first kernel is asked for."""
        self.limit_bytes = limit_bytes
        self._wanted = folder
        self._folder: Path | None = None
        self._own: Path | None = None  # the folder of this process alone, once it is needed
        self._verified: dict[str, Path] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.RLock()

    def obtain(self, recipe: Recipe, build: Callable[[], bytes]) -> Path:
        """The file of a compiled kernel; `build` is called where there is none yet, by one thread."""
        with self._lock_of(recipe):
            path = self._verified.get(recipe.key)
            if path is None or not path.exists():
                path = self._find(recipe) or self._store(recipe, build())
                self._verified[recipe.key] = path
            return path

    def rebuild(self, recipe: Recipe, refused: Path, build: Callable[[], bytes]) -> Path:
        """Another file in place of one that `obtain` gave and the driver refused.

        CuPy remembers a module by its path, so it goes to another folder, that of this process.
        """
        with self._lock_of(recipe):
            path = self._verified.get(recipe.key)
            if path is None or path == refused:
                logger.warning("%s could not be loaded and is compiled again", refused)
                with contextlib.suppress(OSError):
                    refused.unlink(missing_ok=True)
                path = self._verified[recipe.key] = self._write(self._own_folder(), recipe, build())
            return path

    def summary(self) -> dict[str, object]:
        """The folder, the number and bytes of the files in it, and what is wrong with it or None; fit for JSON."""
        try:
            folder = self._wanted or default_folder()
        except RuntimeError as error:
            return {"path": None, "files": 0, "bytes": 0, "limit_bytes": self.limit_bytes, "problem": str(error)}
        files = _stored(folder)
        return {
            "path": str(folder),
            "files": len(files),
            "bytes": sum(size for _, size, _ in files),
            "limit_bytes": self.limit_bytes,
            "problem": _unfit(folder) if folder.exists() else None,
        }

    def _lock_of(self, recipe: Recipe) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(recipe.key, threading.Lock())

    def _find(self, recipe: Recipe) -> Path | None:
        with contextlib.suppress(OSError):
            for path in sorted(self._place().glob(f"{recipe.kernel}-{recipe.key}-*{recipe.suffix}")):
                if _digest(path.read_bytes()) == path.stem.rpartition("-")[2]:
                    with contextlib.suppress(OSError):  # a file that is used stays
                        os.utime(path)
                    return path
                logger.warning("%s is damaged and is compiled again", path)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        return None

    def _store(self, recipe: Recipe, data: bytes) -> Path:
        folder = self._place()
        try:
            path = self._write(folder, recipe, data)
        except OSError as error:
            if folder == self._own:
                raise
            return self._write(self._give_up(f"{folder} cannot be written: {error.strerror or error}"), recipe, data)
        self._sweep(folder, path)
        return path

    @staticmethod
    def _write(folder: Path, recipe: Recipe, data: bytes) -> Path:
        path = folder / f"{recipe.kernel}-{recipe.key}-{_digest(data)}{recipe.suffix}"
        handle, unfinished = tempfile.mkstemp(suffix=".unfinished", dir=folder)
        try:
            with open(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
        return path

    def _place(self) -> Path:
        with self._lock:
            if self._folder is None:
                try:
                    folder = self._wanted or default_folder()
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    unfit = _unfit(folder)
                except (OSError, RuntimeError) as error:
                    unfit = f"there is no folder for compiled kernels: {error}"
                self._folder = self._give_up(unfit) if unfit else folder
            return self._folder

    def _give_up(self, reason: str) -> Path:
        """From now on the files of this process are its own; said once."""
        with self._lock:
            if self._own is None or self._folder != self._own:
                logger.warning(
                    "%s. Kernels are compiled again by every process; %s names another folder", reason, FOLDER_VARIABLE
                )
            self._folder = self._own_folder()
            return self._folder

    def _own_folder(self) -> Path:
        with self._lock:
            if self._own is None:
                self._own = Path(tempfile.mkdtemp(prefix="cuconv-cubins-"))
                atexit.register(_remove, self._own, os.getpid())
            return self._own

    def _sweep(self, folder: Path, new: Path) -> None:
        """Removes what was not used for longest until the rest is within the limit, and what was never finished."""
        files = sorted(_stored(folder))
        excess = sum(size for _, size, _ in files) - self.limit_bytes
        with contextlib.suppress(OSError):
            for _, size, path in files:
                if excess > 0 and path != new:
                    path.unlink(missing_ok=True)
                    excess -= size
            for path in folder.glob("*.unfinished"):
                if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)


def _stored(folder: Path) -> list[tuple[float, int, Path]]:
    """When last used, bytes and path of every compiled kernel in a folder; those that vanish meanwhile left out."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.suffix in (".cubin", ".ptx"):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
    return found


def _unfit(folder: Path) -> str | None:
    """Why files in a folder cannot be trusted, or None."""
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is no folder"
    if sys.platform != "win32":
        if status.st_uid != os.getuid():
            return f"{folder} belongs to another user, who could put any kernel there"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write to {folder} (chmod go-w would change that)"
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
