"""What a call does on a GPU, written down without one: `record` runs it on outlines of arrays and gives a tape.

An :class:`Outline` has everything of an array but its memory: shape, dtype, strides, and an address that nobody reads.
Launch code runs on outlines as it does on arrays, through a :class:`Recorder` in place of the runtime, so what it
plans, allocates and launches is known for any device and costs no memory, however large the arrays.

Three readers: :mod:`cuconv.explain` says what the steps cost; :mod:`cuconv.ops` plays the tape of a shape that it has
seen before, which takes less time than to think it all over; `ops.prepare` plays it into memory of its own.
"""

from __future__ import annotations

import functools
import math
import operator
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuconv.cuda.arrays import Array, Runtime
from cuconv.cuda.engine import Engine
from cuconv.plan.types import DeviceLimits, LaunchPlan

ALIGNMENT = 512  # bytes, of what device allocators give
FIRST_ADDRESS = 1 << 44  # of outlines: far from anything that exists


class UnknownValueError(TypeError):
    """The numbers in an array are asked for, and there is only its outline."""


# --- Arrays without memory ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Buffer:
    """What an allocation is; its number is its place on the tape. Another one may get the number when it is gone."""

    number: int
    address: int
    nbytes: int


class _Memory:
    """What NumPy asks for the place of an array."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = interface | {"version": 3}


def _layout(address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """A NumPy array whose memory does not exist: for its shape, strides, flags and address only."""
    dtype = np.dtype(dtype)
    memory = _Memory(data=(address, False), shape=tuple(shape), typestr=f"|V{dtype.itemsize}")
    return np.asarray(memory).view(dtype)


def _assign(value: Any, out: Any) -> None:
    out[...] = value


class Outline(np.lib.mixins.NDArrayOperatorsMixin):
    """An array without memory; what NumPy's functions would do with it is written down as a step."""

    __slots__ = ("__weakref__", "buffer", "layout", "recorder")

    def __init__(self, recorder: Recorder, buffer: Buffer, layout: np.ndarray) -> None:
        self.recorder = recorder
        self.buffer = buffer
        self.layout = layout

    shape = property(lambda self: self.layout.shape)
    dtype = property(lambda self: self.layout.dtype)
    ndim = property(lambda self: self.layout.ndim)
    size = property(lambda self: self.layout.size)
    nbytes = property(lambda self: self.layout.nbytes)
    itemsize = property(lambda self: self.layout.itemsize)
    strides = property(lambda self: self.layout.strides)
    flags = property(lambda self: self.layout.flags)
    T = property(lambda self: self._view(self.layout.T))

    @property
    def address(self) -> int:
        """Where the first element would lie."""
        return int(self.layout.__array_interface__["data"][0])

    @property
    def is_whole(self) -> bool:
        """Whether it is its buffer, and no part or rearrangement of it."""
        return (
            self.address == self.buffer.address and bool(self.flags.c_contiguous) and self.nbytes == self.buffer.nbytes
        )

    def _view(self, layout: np.ndarray) -> Outline:
        return Outline(self.recorder, self.buffer, layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __iter__(self) -> Iterator[Outline]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<outline {self.shape} {self.dtype}>"

    def __getitem__(self, index: Any) -> Outline:
        items = index if isinstance(index, tuple) else (index,)
        if not all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in items):
            raise UnknownValueError(f"an outline takes integers and slices as indices. Received: {index!r}")
        index = (*items, ...) if Ellipsis not in items else items  # a scalar would be read from memory
        return self._view(self.layout[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.recorder.note("copy" if isinstance(value, Outline) else "fill", _assign, (value,), self[index])

    def reshape(self, *shape: Any) -> Outline:
        """The same elements in another shape: a view of memory in one piece, else of a copy."""
        whole = self if self.flags.c_contiguous else self.copy()
        return whole._view(whole.layout.reshape(*shape))

    def transpose(self, *axes: Any) -> Outline:
        """A view with its axes in another order."""
        return self._view(self.layout.transpose(*axes))

    def swapaxes(self, first: int, second: int) -> Outline:
        """A view with two axes exchanged."""
        return self._view(self.layout.swapaxes(first, second))

    def view(self, dtype: Any) -> Outline:
        """The same memory as another dtype."""
        return self._view(self.layout.view(dtype))

    def astype(self, dtype: Any, copy: bool = True) -> Outline:
        """A copy in another dtype."""
        if np.dtype(dtype) == self.dtype and not copy:
            return self
        return self._computed("astype", _assign, (self,), self.shape, dtype)

    def copy(self, order: str = "C") -> Outline:
        """A copy in one piece."""
        return self._computed("copy", _assign, (self,), self.shape, self.dtype)

    def conj(self) -> Outline:
        """The conjugate: a new array of complex numbers, real ones as they are."""
        if self.dtype.kind != "c":
            return self
        return self._computed("conjugate", np.conjugate, (self,), self.shape, self.dtype)

    def _computed(
        self,
        name: str,
        function: Callable[..., Any] | None,
        operands: Sequence[Any],
        shape: Sequence[int],
        dtype: Any,
        out: Outline | None = None,
    ) -> Outline:
        """A new array (or `out`) that the array library computes from `operands`."""
        target = self.recorder.empty(shape, dtype) if out is None else out
        self.recorder.note(name, function, operands, target)
        return target

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **keywords: Any) -> Any:
        if method != "__call__" or ufunc.nout != 1:
            return NotImplemented
        shape = np.broadcast_shapes(*(getattr(each, "shape", ()) for each in inputs))
        few = [np.ones(1, each.dtype) if isinstance(each, Outline) else each for each in inputs]
        with np.errstate(all="ignore"):
            dtype = ufunc(*few, **keywords).dtype
        return self._computed(
            ufunc.__name__, None if keywords else ufunc, inputs, shape, dtype, out[0] if out else None
        )

    def __array_function__(self, function: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if function not in _FUNCTIONS:
            return NotImplemented
        keywords = {name: value for name, value in keywords.items() if value is not None}
        return _FUNCTIONS[function](self, *arguments, **keywords)

    def _refuse(self, *_: Any) -> Any:
        raise UnknownValueError("the numbers in an outline of an array are not known")

    __array__ = __bool__ = __float__ = __int__ = __complex__ = item = get = tolist = _refuse


def _like(name: str) -> Callable[..., Outline]:
    def make(_: Outline, like: Outline, fill: Any = 0, shape: Any = None, dtype: Any = None) -> Outline:
        made = like.recorder.empty(like.shape if shape is None else shape, like.dtype if dtype is None else dtype)
        if name != "empty":
            made[...] = 1 if name == "ones" else fill
        return made

    return make


def _over_axis(name: str, keeps: bool) -> Callable[..., Outline]:
    """A function along an axis that keeps the shape, or reduces it."""

    def compute(_: Outline, x: Outline, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Outline:
        axes = range(x.ndim) if axis is None else {each % x.ndim for each in np.atleast_1d(axis).tolist()}
        shape = (
            x.shape if keeps else [1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes]
        )
        return x._computed(name, None, (x,), shape, x.dtype if dtype is None else dtype)

    return compute


def _elementwise(name: str) -> Callable[..., Outline]:
    def compute(self: Outline, *operands: Any, out: Outline | None = None) -> Outline:
        shape = np.broadcast_shapes(*(getattr(each, "shape", ()) for each in operands))
        dtype = np.result_type(*(each.dtype for each in operands[name == "where" :] if isinstance(each, Outline)))
        return self._computed(name, None, operands, shape, dtype, out)

    return compute


def _concatenate(self: Outline, arrays: Sequence[Outline], axis: int = 0) -> Outline:
    first = arrays[0]
    shape = list(first.shape)
    shape[axis] = sum(each.shape[axis] for each in arrays)
    return self._computed("concatenate", None, arrays, shape, first.dtype)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.empty_like: _like("empty"),
    np.full_like: _like("full"),
    np.ones_like: _like("ones"),
    np.zeros_like: _like("zeros"),
    np.cumsum: _over_axis("cumsum", keeps=True),
    np.sort: _over_axis("sort", keeps=True),
    np.max: _over_axis("max", keeps=False),
    np.sum: _over_axis("sum", keeps=False),
    np.clip: _elementwise("clip"),
    np.where: _elementwise("where"),
    np.concatenate: _concatenate,
}


# --- Writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Memory in one piece that a step reads or writes: elements of a buffer from a byte on."""

    buffer: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Launch:
    """A kernel, and where its arrays lie; None for one that is left out."""

    plan: LaunchPlan
    places: tuple[Place | None, ...]


@dataclass(frozen=True)
class ArrayStep:
    """A function of the array library, which reads and writes so many bytes.

    Attributes:
        function, operands, out: to do it again, ``function(*operands, out=out)``; None where that is not enough.
    """

    name: str
    bytes_read: int
    bytes_written: int
    function: Callable[..., Any] | None
    operands: tuple[Any, ...]
    out: Place | None


class Recorder:
    """The runtime of :mod:`cuconv.cuda.arrays` that outlines belong to: it writes down instead of computing."""

    def __init__(self, limits: DeviceLimits) -> None:
        self.limits = limits
        self.engine = Engine(self)
        self.steps: list[Launch | ArrayStep] = []
        self.sizes: list[int] = []  # bytes of each buffer
        self.constants: dict[int, tuple[Hashable, Callable[[], np.ndarray]]] = {}  # buffers that hold them
        self._constants: dict[Hashable, Outline] = {}
        self._free: dict[int, list[tuple[int, int]]] = {}  # bytes -> numbers and addresses of buffers that are gone
        self._next = FIRST_ADDRESS

    def argument(self, shape: Sequence[int], dtype: Any, misaligned: int = 0) -> Outline:
        """An array that is given, so many bytes behind a boundary."""
        return self._allocate(shape, dtype, misaligned)

    def empty(self, shape: Sequence[int], dtype: Any) -> Outline:
        """A new array, maybe where one was that is gone."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        free = self._free.get(nbytes)
        made = self._allocate(shape, dtype) if not free else self._outline(Buffer(*free.pop(), nbytes), shape, dtype)
        gone = weakref.finalize(made.buffer, self._release, made.buffer.number, made.buffer.address, nbytes)
        gone.atexit = False
        return made

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> Outline:
        """What `make` returns."""
        if key not in self._constants:
            value = make()
            self._constants[key] = made = self._allocate(value.shape, value.dtype)
            self.constants[made.buffer.number] = key, make
        return self._constants[key]

    def address(self, array: Outline) -> int:
        """Where an outline begins."""
        return array.address

    def launch(self, plan: LaunchPlan, arrays: Sequence[Outline | None]) -> None:
        """Writes a launch down."""
        self.steps.append(Launch(plan, tuple(None if array is None else _place(array) for array in arrays)))

    def note(self, name: str, function: Any, operands: Sequence[Any], out: Outline) -> None:
        """Writes down what the array library does."""
        read = sum(each.nbytes for each in operands if isinstance(each, Outline) and each is not out)
        pieces = [each for each in (*operands, out) if isinstance(each, Outline)]
        if function is None or not all(each.flags.c_contiguous for each in pieces):
            self.steps.append(ArrayStep(name, read, out.nbytes, None, (), None))
            return
        places = tuple(_place(each) if isinstance(each, Outline) else each for each in operands)
        self.steps.append(ArrayStep(name, read, out.nbytes, function, places, _place(out)))

    def _allocate(self, shape: Sequence[int], dtype: Any, misaligned: int = 0) -> Outline:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = Buffer(len(self.sizes), self._next + misaligned, nbytes)
        self.sizes.append(nbytes)
        self._next += (-(-(nbytes + misaligned) // ALIGNMENT) + 1) * ALIGNMENT  # with a gap
        return self._outline(buffer, shape, dtype)

    def _outline(self, buffer: Buffer, shape: Sequence[int], dtype: Any) -> Outline:
        return Outline(self, buffer, _layout(buffer.address, shape, dtype))

    def _release(self, number: int, address: int, nbytes: int) -> None:
        self._free.setdefault(nbytes, []).append((number, address))


def _place(outline: Outline) -> Place:
    return Place(outline.buffer.number, outline.address - outline.buffer.address, outline.shape, outline.dtype)


# --- Playing -----------------------------------------------------------------------------------------------------


class Tape:
    """The steps of one call for arrays of given shapes, to be played on any arrays of these shapes.

    Args:
        given: the outlines that the call was given.
        results: what it returned: an outline, or a tuple of outlines and None.

    Attributes:
        steps: what it did.
        playable: whether it can be done again; not where the array library did more than element by element.
        outputs: shape and dtype of each array that a call allocates for its results.
        scratch: bytes of each array that it needs besides.
        launches_only: the array library has no part in it.
        launches: of each its plan, how many arrays it has, and what picks their addresses out of all, 0 for None.
        needs_memory: whether there is more than arguments and results.
        results_of: picks what the call returned out of the list [*given, *results, None].
    """

    def __init__(self, recorder: Recorder, given: Sequence[Outline], results: Any) -> None:
        self.steps = tuple(recorder.steps)
        self.launches_only = all(isinstance(step, Launch) for step in self.steps)
        returned = [each for each in _tuple(results) if each is not None]
        new = {each.buffer.number: each for each in returned}
        for each in given:
            new.pop(each.buffer.number, None)
        self.outputs = tuple((each.shape, each.dtype) for each in new.values())
        self.playable = all(map(_can_be_repeated, self.steps)) and all(each.is_whole for each in returned)
        if not self.playable:
            return
        known = [each.buffer.number for each in given] + list(new)
        used = {place.buffer for step in self.steps for place in _places(step)}
        scratch = sorted(used - set(known) - set(recorder.constants))
        constants = sorted(used & set(recorder.constants))
        self.needs_memory = bool(scratch or constants)
        self.scratch = tuple(recorder.sizes[number] for number in scratch)
        self._constants = tuple(recorder.constants[number] for number in constants)
        # All arrays of a call stand in one list: given, results, scratch, constants, and None at the end.
        index = {number: i for i, number in enumerate((*known, *scratch, *constants))}
        self._acts = [
            functools.partial(_launch, step.plan, *_where(step, index))
            if isinstance(step, Launch)
            else functools.partial(_repeat, step, index)
            for step in self.steps
        ]
        self.launches = [
            (step.plan, len(step.places), _addresses(*_where(step, index)))
            for step in self.steps
            if isinstance(step, Launch)
        ]
        at = tuple(-1 if each is None else index[each.buffer.number] for each in _tuple(results))
        self.results_of = operator.itemgetter(*at)

    def allocate(self, runtime: Runtime) -> list[Array]:
        """Scratch memory and constants for :meth:`play`, and a None behind them."""
        scratch = [runtime.empty((nbytes,), np.uint8) for nbytes in self.scratch]
        return [*scratch, *(runtime.constant(key, make) for key, make in self._constants), None]

    def play(self, runtime: Runtime, arrays: Sequence[Array]) -> None:
        """Does it again with `arrays`: given, results, and what :meth:`allocate` gives.

        Shapes, dtypes and alignments are not looked at again.
        """
        for act in self._acts:
            act(runtime, arrays)


def _tuple(results: Any) -> tuple[Outline | None, ...]:
    return results if isinstance(results, tuple) else (results,)


def _can_be_repeated(step: Launch | ArrayStep) -> bool:
    return isinstance(step, Launch) or step.function is not None


def _places(step: Launch | ArrayStep) -> list[Place]:
    places = step.places if isinstance(step, Launch) else (*step.operands, step.out)
    return [each for each in places if isinstance(each, Place)]


def _where(step: Launch, index: dict[int, int]) -> tuple[list[int], list[int]]:
    """The arrays of a launch: their places in the list of all, and the bytes before what it uses of them."""
    at = [-1 if place is None else index[place.buffer] for place in step.places]
    return at, [0 if place is None else place.offset for place in step.places]


def _addresses(at: Sequence[int], offsets: Sequence[int]) -> Callable[[Sequence[int]], Sequence[int]]:
    """Picks the addresses of a launch out of all."""
    if not any(offsets):
        return operator.itemgetter(*at)
    return lambda addresses: [addresses[i] + offset for i, offset in zip(at, offsets, strict=True)]


def _launch(
    plan: LaunchPlan, at: Sequence[int], offsets: Sequence[int], runtime: Runtime, arrays: Sequence[Array]
) -> None:
    chosen = (arrays[i] for i in at)
    pieces = (a.reshape(-1).view(np.uint8)[offset:] if offset else a for a, offset in zip(chosen, offsets, strict=True))
    runtime.launch(plan, tuple(pieces))


def _repeat(step: ArrayStep, index: dict[int, int], _: Runtime, arrays: Sequence[Array]) -> None:
    """Does a step of the array library again."""

    def find(each: Any) -> Any:
        if not isinstance(each, Place):
            return each
        array = arrays[index[each.buffer]]
        if array.shape == each.shape and array.dtype == each.dtype:
            return array
        count = math.prod(each.shape) * each.dtype.itemsize
        return array.reshape(-1).view(np.uint8)[each.offset : each.offset + count].view(each.dtype).reshape(each.shape)

    step.function(*map(find, step.operands), out=find(step.out))  # type: ignore[misc]  # there is one: it can be played


def record(
    limits: DeviceLimits, function: Callable[..., Any], given: Sequence[tuple[tuple[int, ...], Any, int]]
) -> Tape:
    """The tape of ``function(*outlines)`` for arrays of these shapes, dtypes and bytes behind a 16-byte boundary."""
    recorder = Recorder(limits)
    outlines = [recorder.argument(shape, dtype, misaligned) for shape, dtype, misaligned in given]
    return Tape(recorder, outlines, function(*outlines))
