"""What every format needs: whole files or none, one kind of error, optional libraries."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

PathLike = str | os.PathLike[str]
MAX_CONFIG_BYTES = 16 << 20  # a network of a thousand layers describes itself in about 1 MB


class Stored(NamedTuple):
    """An array in a file: what it is, and how to get it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a new file that takes the place of `path` at the end, or vanishes if anything fails."""
    path = path.resolve()  # a link stays a link
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def intact(path: PathLike, kind: str) -> Iterator[None]:
    """Makes one ValueError of the dozen types in which a damaged file shows itself."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"this is not an intact {kind} file: {reason(error)}. Received: path={os.fspath(path)!r}"
        ) from error


def reason(error: Exception) -> str:
    """The first line of the message, after the type where the message alone would say nothing."""
    first = str(error).partition("\n")[0].rstrip(".")
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"


def library(name: str) -> Any:
    """The module of that name, of the extra `files`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'this format needs {package}: pip install "cuconv[files]". Received: {error}') from error
