"""The CUDA engine without a GPU: plans run on NumPy arrays, through the emulator.

    runtime = EmulatedRuntime(DEVICES["H200"], mode="trace", seed=1)
    conv(runtime, shape, x, w, ..., out=out)         # an engine function of cuconv/cuda
    runtime.launches                                 # the plans that ran, in order

It does what CudaRuntime does with a plan: the same source, constants, parameter bytes, grid and shared memory. On top
it refuses what a device would refuse, or forgive until it is too late.
"""

import functools
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import emulator
import numpy as np
from emulator import Launch, Module, Structure, Traffic
from emulator.tensor_map import encode

from cuconv.cuda import runtime
from cuconv.cuda.runtime import kernel_directory
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import (
    MAP_BYTES,
    MAX_GRID_X,
    MAX_GRID_YZ,
    MAX_THREADS,
    STATIC_SHARED_BYTES,
    DeviceLimits,
    LaunchPlan,
    TensorMap,
    compiled_for,
)

ARENA = 1 << 40  # where the emulator's memory is said to start: a multiple of every alignment


@functools.cache
def module(kernel: str, constants: tuple[tuple[str, int | str], ...], arch: str) -> Module:
    """The kernels of ``kernels/<kernel>.cu``, compiled with `constants`."""
    return Module(emulator.compile_ptx(kernel_directory() / f"{kernel}.cu", arch, dict(constants)))


def parameters(plan: LaunchPlan, addresses: Sequence[int]) -> bytes:
    """The parameter struct of a plan, with the emulator's tensor maps."""
    return plan.parameters(addresses, [encoded(each, addresses[each.array]) for each in plan.maps])


def encoded(given: TensorMap, address: int) -> bytes:
    """A tensor map, from the same numbers that a driver would get."""
    numbers = (given.sizes, given.strides, given.box, given.steps)
    swizzle = runtime.MAP_SWIZZLES[given.swizzle]
    return encode(address, runtime.MAP_TYPES[given.kind], *numbers, swizzle=swizzle)


class EmulatedRuntime:
    """The Runtime protocol of cuconv/cuda/arrays.py.

    Attributes:
        limits: of the device that is emulated.
        mode: "plain", or "trace" for the detector and the counters.
        seed: order of blocks and threads; each launch takes the next one, 0 stays 0.
        timeout: seconds a launch may take.
        blocks: given a plan, the blocks of the grid to run; None for all.
        launches, results: the plans that ran, and what each reported.
    """

    def __init__(
        self,
        limits: DeviceLimits = DEVICES["H200"],
        mode: str = "plain",
        seed: int = 0,
        *,
        timeout: float = 120.0,
        blocks: Callable[[LaunchPlan], Sequence[int] | None] = lambda _: None,
    ):
        self.limits = limits
        self.mode = mode
        self.seed = seed
        self.timeout = timeout
        self.blocks = blocks
        self.launches: list[LaunchPlan] = []
        self.results: list[Launch] = []
        self._constants: dict[Hashable, np.ndarray] = {}
        self._made: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    @property
    def traffic(self) -> list[Traffic]:
        """What each instruction of the last launch moved, in mode "trace"."""
        return self.results[-1].traffic

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """NaN in every element, in every float type. Zeros that take no memory from 256 MiB on."""
        if math.prod(shape) * np.dtype(dtype).itemsize >= emulator.IN_PLACE:
            return np.zeros(shape, dtype)
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8).fill(emulator.POISON)
        self._made[id(array)] = array
        return array

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` returns, kept for later calls with the same key, read-only."""
        if key not in self._constants:
            array = self._constants[key] = np.array(make(), order="C")
            array.flags.writeable = False
        return self._constants[key]

    def address(self, array: np.ndarray) -> int:
        """Where the array would lie if its memory were allocated on a device: a view may be off any alignment."""
        return emulator.device_address(array, ARENA)

    def launch(self, plan: LaunchPlan, arrays: Sequence[np.ndarray | None]) -> None:
        """Runs a plan.

        Raises:
            emulator.EmulationError: the detector reports something.
            AssertionError: the plan and the kernel, or the plan and the device, do not fit together.
        """
        code = module(plan.kernel, plan.constants, compiled_for(plan.kernel, self.limits.arch))
        self._check(plan, code, arrays)
        self.launches.append(plan)
        result = code.launch(
            plan.kernel,
            plan.grid,
            plan.block,
            (Structure(arrays, functools.partial(parameters, plan)),),
            plan.dynamic_shared_bytes,
            self.mode,
            self.seed + len(self.launches) - 1 if self.seed else 0,
            timeout=self.timeout,
            poisoned=self._is_ours,
            blocks=self.blocks(plan),
        )
        self.results.append(result)

    def _is_ours(self, array: np.ndarray) -> bool:
        return self._made.get(id(emulator.root(array))) is not None

    def _check(self, plan: LaunchPlan, code: Module, arrays: Sequence[np.ndarray | None]) -> None:
        assert plan.kernel in code.kernels, f"{plan.kernel}.cu has no entry {plan.kernel}, only {list(code.kernels)}"
        kernel = code.kernels[plan.kernel]
        (parameter,) = kernel.parameters
        size = len(plan.parameters((0,) * len(arrays), (bytes(MAP_BYTES),) * len(plan.maps)))
        assert parameter.size == size, (
            f"{plan}: {len(arrays)} arrays and {len(plan.integers)} integers of {plan.index_bytes} bytes make {size} "
            f"bytes, the kernel's structure has {parameter.size}"
        )
        for each in plan.maps:
            assert not each.problem(), f"{plan}: {each.problem()}"
        for index, array in enumerate(arrays):
            assert array is None or array.flags.c_contiguous, f"{plan}: array {index} is not contiguous"
            assert array is None or array.size, f"{plan}: array {index} is empty"
        fits = all(1 <= n <= most for n, most in zip(plan.grid, (MAX_GRID_X, MAX_GRID_YZ, MAX_GRID_YZ)))
        assert fits, f"{plan}: the grid {plan.grid} is beyond a device's"
        most = kernel.most_threads or MAX_THREADS
        assert plan.threads <= min(most, MAX_THREADS), f"{plan}: the kernel takes {most} threads"
        assert kernel.shared_bytes <= STATIC_SHARED_BYTES, (
            f"{plan}: {kernel.shared_bytes} bytes of static shared arrays"
        )
        shared = kernel.shared_bytes + plan.dynamic_shared_bytes
        assert shared <= self.limits.shared_bytes, f"{plan}: {shared} bytes of shared memory, {self.limits}"
        assert plan.shared_bytes in (0, shared), (
            f"{plan}: plans {plan.shared_bytes} bytes of shared memory, has {shared}"
        )
