"""What launch code needs of arrays: memory in one piece, its alignment, and the runtime that a launch goes to.

Nothing here or in the other files of this folder, except runtime.py, knows CuPy: arrays are whatever the runtime makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cuconv.plan.types import VECTOR_BYTES, DeviceLimits, LaunchPlan

Array = Any


class Runtime(Protocol):
    """Where kernels run: a CUDA device through CuPy, or the emulator of the tests."""

    limits: DeviceLimits

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """A new array in C order, not initialised."""

    def address(self, array: Array) -> int:
        """Where the first element of an array lies."""

    def launch(self, plan: LaunchPlan, arrays: Sequence[Array | None]) -> None:
        """Starts `plan` on the current stream; a pointer to each array (null for None) comes before its integers."""


def compact(runtime: Runtime, array: Array) -> Array:
    """`array` itself if its memory is in one piece and in C order, otherwise a copy that is. None stays None."""
    if array is None or (array.flags.c_contiguous and runtime.address(array) % array.dtype.itemsize == 0):
        return array
    return array.copy(order="C")


@contextmanager
def writing(runtime: Runtime, out: Array) -> Iterator[Array]:
    """An array in one piece to write to: `out` itself, or a new one that is copied to `out` at the end."""
    if out.flags.c_contiguous and runtime.address(out) % out.dtype.itemsize == 0:
        yield out
    else:
        target = runtime.empty(out.shape, out.dtype)
        yield target
        out[...] = target


def alignment(runtime: Runtime, array: Array) -> int:
    """Elements from one address that a 16-byte access could start at to the array's own; 0 if it starts at one.

    With :func:`math.gcd`, the vectors that an access to the array can have.
    """
    return runtime.address(array) % VECTOR_BYTES // array.dtype.itemsize
