"""What launch code needs of arrays: memory in one piece, its alignment, and the runtime that a launch goes to.

Nothing here or in the other files of this folder, except runtime.py, knows CuPy: arrays are whatever the runtime makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from cuconv.plan.types import VECTOR_BYTES, DeviceLimits, LaunchPlan

Array = Any


class Runtime(Protocol):
    """Where kernels run: a CUDA device through CuPy, or the emulator of the tests."""

    limits: DeviceLimits

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """A new array in C order, not initialised."""

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """What `make` returns, on the device, where it is kept for later calls with the same key; never written to."""

    def address(self, array: Array) -> int:
        """Where the first element of an array lies."""

    def launch(self, plan: LaunchPlan, arrays: Sequence[Array | None]) -> None:
        """Starts `plan` on the current stream; a pointer to each array (null for None) comes before its integers."""


def compact(runtime: Runtime, array: Array | None) -> Array | None:
    """`array` itself if its memory is in one piece and in C order, otherwise a copy that is.

    None stays None, and an array of no elements, which has no address, becomes None.
    """
    if array is None or array.size == 0:
        return None
    if array.flags.c_contiguous and runtime.address(array) % array.dtype.itemsize == 0:
        return array
    return array.copy(order="C")


class writing:  # noqa: N801  used as `with writing(runtime, out) as y`; a generator would take a microsecond more
    """An array in one piece to write to: `out` itself, or a new one that is copied to `out` at the end."""

    __slots__ = ("out", "target")

    def __init__(self, runtime: Runtime, out: Array) -> None:
        self.out = self.target = out
        if not out.flags.c_contiguous or runtime.address(out) % out.dtype.itemsize:
            self.target = runtime.empty(out.shape, out.dtype)

    def __enter__(self) -> Array:
        return self.target

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None and self.target is not self.out:
            self.out[...] = self.target


@functools.cache
def dtype_name(dtype: Any) -> str:
    """The name of a dtype, as :data:`cuconv.plan.types.ELEMENTS` has it; NumPy takes two microseconds to find it."""
    return str(dtype.name)


def alignment(runtime: Runtime, *arrays: Array | None) -> tuple[int, ...]:
    """For each array, the elements by which it lies behind an address that a 16-byte access can start at."""
    return tuple(
        0 if array is None else runtime.address(array) % VECTOR_BYTES // array.dtype.itemsize for array in arrays
    )
