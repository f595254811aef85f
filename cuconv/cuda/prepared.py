"""Calls that have been thought over before: at the first one with arrays of some shapes, or on demand."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn

from cuconv.activations import Activation
from cuconv.cuda import runtime
from cuconv.cuda.arrays import Array
from cuconv.cuda.conv import fuses
from cuconv.cuda.tape import ArrayStep, Tape, record
from cuconv.plan.types import VECTOR_BYTES, PlanError

REMEMBERED_CALLS = 4096  # of a function; then they are forgotten together, and cost some 100 microseconds each again

_Starts = list[tuple[Callable[[Sequence[int]], None], Callable[[Sequence[int]], Sequence[int]]]]
_Found = tuple[Tape, runtime.CudaRuntime, _Starts]

# CuPy's arrays, once one was seen: their type, and what tells whether their memory is in one piece and in C order.
_in_one_piece: dict[type, Callable[[Array], bool]] = {}


class Known:
    """A function of :mod:`cuconv.ops` on a GPU's arrays: recorded for arrays of new shapes, else played.

    Options are part of what is recorded. Arrays that are not in one piece, and options of which no more is known than
    that they can be called, go to the function itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._tapes: dict[Hashable, _Found | None] = {}

    def __call__(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """``function(*arguments, **keywords)``."""
        values = (*arguments, *keywords.values())
        key: list[Any] = [*keywords]
        arrays: list[Array] = []
        addresses: list[int] = []
        for value in values:
            kind = type(value)
            if kind in _PLAIN:
                key += (kind, value)  # 1, 1.0 and True are equal
            elif kind in _in_one_piece:
                memory = value.data
                address = memory.ptr
                if not _in_one_piece[kind](value):
                    return self._directly(arguments, keywords)
                key += (value.shape, value.dtype, address % VECTOR_BYTES, memory.device_id)
                arrays.append(value)
                addresses.append(address)
            elif (kind is tuple and _plain(value)) or (kind is Activation and fuses(value)):
                key.append(value)
            elif runtime.is_device_array(value):
                _in_one_piece[kind] = runtime.of([value]).in_one_piece
                return self(arguments, keywords)
            else:
                return self._directly(arguments, keywords)
        out = keywords.get("out")
        if out is not None and sum(_may_overlap(array, out) for array in arrays) > 1:  # itself, and an input
            return self._directly(arguments, keywords)
        call = tuple(key)
        found = self._tapes.get(call, _UNKNOWN)
        if found is _UNKNOWN:
            found = self._learn(call, values, list(keywords), arrays)
        if found is None:
            return self._directly(arguments, keywords)
        return _play(found, arrays, addresses)

    def _directly(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """The function itself, with the GPU of the first array the current one: CuPy's own functions compute there."""
        given = (*arguments, *keywords.values())
        device = next((getattr(each, "device", None) for each in given if runtime.is_gpu_array(each)), None)
        with device or contextlib.nullcontext():
            return self._function(*arguments, **keywords)

    def _learn(
        self, key: Hashable, values: Sequence[Any], names: Sequence[str], arrays: Sequence[Array]
    ) -> _Found | None:
        """Records a call; None where it fails, or cannot be played."""

        def call(*outlines: Any) -> Any:
            waiting = iter(outlines)
            given = [next(waiting) if type(value) in _in_one_piece else value for value in values]
            positional = len(given) - len(names)
            return self._function(*given[:positional], **dict(zip(names, given[positional:], strict=True)))

        found = None
        # What is wrong, the function itself says of the arrays that it was given.
        with contextlib.suppress(TypeError, ValueError, PlanError):
            gpu = runtime.of(arrays)
            tape = record(gpu.limits, call, [(each.shape, each.dtype, each.data.ptr % VECTOR_BYTES) for each in arrays])
            found = (tape, gpu, _starts(tape, gpu)) if tape.playable else None
        if len(self._tapes) >= REMEMBERED_CALLS:
            self._tapes.clear()
        self._tapes[key] = found
        return found


def _starts(tape: Tape, gpu: runtime.CudaRuntime) -> _Starts:
    """The launches of a tape, their kernels loaded; none where they are not all there is."""
    if not tape.launches_only:
        return []
    return [(gpu.starter(plan, pointers), pick) for plan, pointers, pick in tape.launches]


def _play(found: _Found, arrays: list[Array], addresses: list[int]) -> Any:
    """What the tape's call returns for `arrays` at `addresses`, on new arrays for the results."""
    tape, gpu, starts = found
    for shape, dtype in tape.outputs:
        made = gpu.empty(shape, dtype)
        arrays.append(made)
        addresses.append(made.data.ptr)
    arrays.append(None)
    if not tape.launches_only:
        with runtime.on(gpu.device):
            tape.play(gpu, arrays[:-1] + tape.allocate(gpu))
    else:
        others = tape.allocate(gpu) if tape.needs_memory else _NOTHING
        addresses += [0 if each is None else each.data.ptr for each in others]
        for start, pick in starts:
            start(pick(addresses))
    return tape.results_of(arrays)


_UNKNOWN: Any = object()
_NOTHING = (None,)
_PLAIN = frozenset({int, str, bool, type(None)})


def _plain(value: Any) -> bool:
    """Whether it is a plain integer, or a tuple of such, at any depth."""
    return type(value) is int or (type(value) is tuple and all(map(_plain, value)))


def _may_overlap(a: Array, b: Array) -> bool:
    """Whether two arrays, each in one piece, share memory."""
    return bool(a.data.ptr < b.data.ptr + b.nbytes and b.data.ptr < a.data.ptr + a.nbytes)


class Prepared:
    """One call, ready to be made again and again: ``prepared(x, w)``, or ``prepared(x, w, out=y)``.

    Args:
        call: the function of the arrays alone.
        given: name and shape of each of them; all are of `dtype`, in C order, and begin on a 16-byte boundary.

    Raises:
        ValueError: the array library has a part in the call that cannot be prepared.
    """

    def __init__(
        self,
        gpu: runtime.CudaRuntime,
        operation: str,
        call: Callable[..., Any],
        given: Sequence[tuple[str, tuple[int, ...]]],
        dtype: Any,
    ) -> None:
        tape = record(gpu.limits, call, [(shape, dtype, 0) for _, shape in given])
        if not tape.playable:
            functions = ", ".join(step.name for step in tape.steps if isinstance(step, ArrayStep))
            raise ValueError(
                f"a call can be prepared where kernels do it all, with an activation that they know. "
                f"Received: {operation}, which needs {functions} of the array library"
            )
        self._starts = _starts(tape, gpu)
        self._gpu, self._tape, self._operation = gpu, tape, operation
        self._given = len(given)
        self._wanted = [(name, shape, dtype) for name, shape in given]
        self._wanted += [(f"out[{i}]", *each) for i, each in enumerate(tape.outputs)]
        # For each of them, the array that was there last, which needs no second look, and its address.
        self._last: list[tuple[Callable[[], Array], int]] = [(lambda: self, 0)] * len(self._wanted)
        self._apart: list[int] = []  # addresses of arrays of which no result lies in an input
        results = tape.results_of([*range(len(self._wanted)), None])
        self._only_outputs = (results if isinstance(results, tuple) else (results,)) == (
            *range(len(given), len(self._wanted)),
        )
        self._scratch = tape.allocate(gpu)
        self._scratch_addresses = [0 if each is None else gpu.address(each) for each in self._scratch]
        self.scratch_bytes = sum(tape.scratch)

    def __call__(self, *arrays: Array, out: Any = None) -> Any:
        """The results for `arrays`, on the current stream; `out` is an array for them, or a tuple of several.

        Raises:
            ValueError: an array is not of the shape, dtype or place that was prepared for.
        """
        tape, gpu = self._tape, self._gpu
        if len(arrays) != self._given:
            self._refuse(arrays)
        if out is None:
            arrays += tuple(gpu.empty(shape, dtype) for shape, dtype in tape.outputs)
        else:
            arrays += out if type(out) is tuple else (out,)
        addresses = [
            address if last() is array else self._admit(place, array)
            for place, (array, (last, address)) in enumerate(zip(arrays, self._last, strict=False))
        ]
        if len(arrays) != len(self._last):
            self._refuse(arrays)
        if addresses != self._apart:
            self._refuse_overlap(arrays)
            self._apart = addresses
        if tape.launches_only:
            everything = addresses + self._scratch_addresses
            for start, pick in self._starts:
                start(pick(everything))
        else:
            with runtime.on(gpu.device):
                tape.play(gpu, [*arrays, *self._scratch])
        return out if out is not None and self._only_outputs else tape.results_of((*arrays, None))

    def _admit(self, place: int, array: Array) -> int:
        """The address of an array, if it is what was prepared for."""
        _, shape, dtype = self._wanted[place]
        try:
            address: int = self._gpu.address(array)
            fits = array.shape == shape and array.dtype == dtype and self._gpu.in_one_piece(array)
        except (AttributeError, ValueError):
            fits = False
        if not fits or address % VECTOR_BYTES:
            self._refuse([array], place)
        self._last[place] = weakref.ref(array), address
        return address

    def _refuse_overlap(self, arrays: Sequence[Array]) -> None:
        inputs, outputs = arrays[: self._given], arrays[self._given :]
        if any(_may_overlap(array, out) for out in outputs for array in inputs):
            raise ValueError("`out` must not share memory with an input. Received: overlapping arrays")

    def _refuse(self, arrays: Sequence[Array], place: int | None = None) -> NoReturn:
        wanted = self._wanted[: self._given] if place is None else [self._wanted[place]]
        given = ", ".join(f"{getattr(a, 'dtype', type(a).__name__)}{getattr(a, 'shape', '')}" for a in arrays)
        raise ValueError(
            f"this call of {self._operation} was prepared for {', '.join(f'{n} {d}{s}' for n, s, d in wanted)}, in C "
            f"order, on 16-byte boundaries of GPU {self._gpu.device}. Received: {given or 'nothing'}"
        )
