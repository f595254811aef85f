"""What a call costs on a GPU and why, by the plans' own model: no GPU is needed, and no memory for the arrays.

    print(ops.explain("conv", (8, 16384, 128), (2, 128, 256), dtype="bfloat16", padding="causal", device="H200"))

Every time here is predicted. The model is that of :mod:`cuconv.plan`; what it assumes of a device stands in
:mod:`cuconv.plan.cost`.
"""

from __future__ import annotations

import contextlib
import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cuconv.cuda.tape import ArrayStep, Launch, Recorder
from cuconv.plan.cost import LAUNCH_SECONDS
from cuconv.plan.occupancy import occupancy
from cuconv.plan.types import DeviceLimits, LaunchPlan

__all__ = ["Explanation", "Step", "of_call", "weightless"]


@dataclass(frozen=True)
class Step:
    """One kernel launch, or one function of the array library between launches.

    Attributes:
        kernel: "conv_simt"; "cupy.add" where it is the array library's.
        tile: of a matrix product, "128x128x8, 8x8 a thread"; else "".
        blocks, threads: of the grid, of a block.
        waves: `blocks` over what the device holds at once.
        registers: a thread, as the plan estimates it.
        shared_bytes: a block.
        resident, occupancy, limiter: blocks that a multiprocessor holds, their share of its warps, what limits them.
        flops, least_flops: operations done, and those that the definition needs.
        bytes, least_bytes: moved between caches and multiprocessors, and every array of the step once.
        seconds: predicted.
        bound: what most of them go to, a unit or a memory.
        reason, rejected: why this plan; what else was weighed and why it lost.
    """

    kernel: str
    plan: LaunchPlan | None
    tile: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    blocks: int
    threads: int
    waves: float
    registers: int
    shared_bytes: int
    resident: int
    occupancy: float
    limiter: str
    flops: int
    least_flops: int
    bytes: int
    least_bytes: int
    seconds: float
    bound: str
    reason: str
    rejected: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        constants = {} if self.plan is None else dict(self.plan.constants)
        maps = [] if self.plan is None else [asdict(each) for each in self.plan.maps]
        told = {name: value for name, value in vars(self).items() if name != "plan"}
        return {**told, "constants": constants, "maps": maps}


@dataclass(frozen=True)
class Explanation:
    """What one call of :mod:`cuconv.ops` does on a device, step by step, and what it has to do at least.

    Attributes:
        operation, dtype, options: the call.
        arrays: name and shape of each, what is given first, then the results.
        flops: what the definition needs, products with padding included.
        bytes: every array of the call once.
    """

    operation: str
    dtype: str
    device: DeviceLimits
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    options: dict[str, Any]
    steps: tuple[Step, ...]
    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / max(1, self.bytes)

    @property
    def peak(self) -> float:
        """Operations a second of the fastest unit that computes this dtype as precisely as was asked for."""
        return peak_rate(self.device, self.dtype, self.options.get("precision", "highest"), self.operation)

    @property
    def side(self) -> str:
        """Of the roofline: "compute" or "memory"."""
        return "compute" if self.flops / self.peak > self.bytes / self.device.bandwidth else "memory"

    @property
    def roof_seconds(self) -> float:
        """No kernel of any library is faster than that on this device, unless its arrays stay in the cache."""
        return max(self.flops / self.peak, self.bytes / self.device.bandwidth)

    @property
    def seconds(self) -> float:
        """Predicted for all steps, one after the other."""
        return sum(step.seconds for step in self.steps)

    @property
    def share(self) -> float:
        """Of the roof, that the prediction reaches; 0 where nothing is to be done."""
        return self.roof_seconds / self.seconds if self.steps else 0.0

    @property
    def algorithm(self) -> str:
        """The kernel of the step that takes longest; "" where there is none."""
        return max(self.steps, key=lambda step: step.seconds).kernel if self.steps else ""

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON; times in seconds, all predicted."""
        return {
            "operation": self.operation,
            "dtype": self.dtype,
            "device": asdict(self.device),
            "arrays": {name: list(shape) for name, shape in self.arrays},
            "options": self.options,
            "flops": self.flops,
            "bytes": self.bytes,
            "intensity": self.intensity,
            "side": self.side,
            "roof_seconds": self.roof_seconds,
            "predicted_seconds": self.seconds,
            "share_of_roof": self.share,
            "algorithm": self.algorithm,
            "steps": [step.to_dict() for step in self.steps],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.arrays)
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        yield f"{self.operation} {self.dtype} on {self.device.name}: {shapes}{f' ({options})' if options else ''}"
        yield (
            f"  needs      {count(self.flops, 'FLOP')}, {count(self.bytes, 'B')}: {self.intensity:.1f} FLOP/B, "
            f"bound by {self.side} (peak {count(self.peak, 'FLOP/s')}, {count(self.device.bandwidth, 'B/s')})"
        )
        yield f"  roof       {duration(self.roof_seconds)}"
        yield f"  predicted  {duration(self.seconds)}, {self.share:.1%} of the roof, not measured"
        for number, step in enumerate(self.steps, 1):
            yield from _step_lines(number, step)


def peak_rate(device: DeviceLimits, dtype: str, precision: str, operation: str) -> float:
    """Operations a second of the fastest unit of a device for products of `dtype`.

    Upsampling and the gates of an LSTM have no matrix product for the tensor cores; depthwise convolutions have one for
    16-bit numbers.
    """
    without = operation.startswith(("upsample", "bias", "conv_lstm"))
    products = not without and not operation.startswith("depthwise")
    if dtype in ("float64", "complex128"):
        return max(device.dmma_rate if products and dtype == "float64" else 0.0, device.fp64_rate)
    rate = 0.0
    if dtype in ("float16", "bfloat16"):
        # Tensor cores of sm_75 have products of float16, and no kernel for depthwise convolutions.
        if not without and (device.capability >= (8, 0) or (dtype == "float16" and products)):
            rate = device.fp16_rate
    elif dtype == "float32" and products:
        rate = device.tf32_rate / (1 if precision == "high" else 3)  # three of TF32 are as exact as one
    return max(rate, device.fp32_rate)


def of_call(
    call: Callable[..., Any], inputs: Sequence[tuple[Sequence[int], Any]], device: DeviceLimits
) -> tuple[tuple[Step, ...], Any]:
    """The steps of ``call(*arrays)`` on `device`, and what it returns, for arrays of these shapes and dtypes.

    The arrays have no memory, and neither have the results, of which shape and dtype may go into another call. A layer
    or model keeps its weights, see :func:`weightless`.

    Raises:
        UnknownValueError: the call asks for the numbers in an array.
    """
    recorder = Recorder(device)
    with weightless(call):
        outputs = call(*(recorder.argument(shape, dtype) for shape, dtype in inputs))
    return steps_of(recorder.steps, device), outputs


@contextlib.contextmanager
def weightless(layer: Any) -> Iterator[None]:
    """Lets a layer or model (anything else is left alone) be called on outlines of arrays.

    Its weights follow its inputs, so they become outlines, too; afterwards everything is as it was before.
    """
    leaves = layer._leaves() if hasattr(layer, "_leaves") else []
    kept = [(leaf, dict(vars(leaf))) for leaf in leaves]
    for leaf in leaves:
        leaf._home = leaf._accepted = None
    try:
        yield
    finally:
        for leaf, state in kept:
            vars(leaf).clear()
            vars(leaf).update(state)


def steps_of(steps: Sequence[Launch | ArrayStep], device: DeviceLimits) -> tuple[Step, ...]:
    """The steps of a tape, with what each costs."""
    return tuple(
        _launch(step.plan, device) if isinstance(step, Launch) else _array_step(step, device) for step in steps
    )


def _launch(plan: LaunchPlan, device: DeviceLimits) -> Step:
    cost = plan.cost
    held = occupancy(device, plan.threads, plan.registers, plan.shared_bytes)
    blocks = math.prod(plan.grid)
    return Step(
        kernel=plan.kernel,
        plan=plan,
        tile=plan.tile,
        grid=plan.grid,
        block=plan.block,
        blocks=blocks,
        threads=plan.threads,
        waves=blocks / (max(1, held.blocks) * device.multiprocessors),
        registers=plan.registers,
        shared_bytes=plan.shared_bytes,
        resident=held.blocks,
        occupancy=held.share,
        limiter=held.limiter,
        flops=cost.flops if cost else 0,
        least_flops=cost.least_flops if cost else 0,
        bytes=cost.bytes if cost else 0,
        least_bytes=cost.least_bytes if cost else 0,
        seconds=cost.seconds if cost else 0.0,
        bound=cost.bound if cost else "",
        reason=plan.reason,
        rejected=plan.rejected,
    )


def _array_step(step: ArrayStep, device: DeviceLimits) -> Step:
    moved = step.bytes_read + step.bytes_written
    none = (0, 0, 0)
    seconds = moved / device.bandwidth + LAUNCH_SECONDS
    reason = "the array library's, one pass over memory"
    return Step(
        f"cupy.{step.name}",
        *(None, "", none, none, 0, 0, 0.0, 0, 0, 0, 0.0, "", 0, 0, moved, moved, seconds, "memory", reason, ()),
    )


# --- Words -------------------------------------------------------------------------------------------------------


def _step_lines(number: int, step: Step) -> Iterator[str]:
    tile, bound = f", tile {step.tile}" if step.tile else "", f", bound by {step.bound}" if step.bound else ""
    yield f"  {number}. {step.kernel}{tile}: {duration(step.seconds)} predicted{bound}"
    if step.plan is not None:
        yield (
            f"     {step.blocks} blocks of {step.threads} threads, {step.waves:.2f} waves; about {step.registers} "
            f"registers a thread, {step.shared_bytes} B of shared memory a block; {step.resident} resident on a "
            f"multiprocessor, {step.occupancy:.0%} of its warps (limited by {step.limiter})"
        )
    yield (
        f"     {count(step.flops, 'FLOP')} done, {count(step.least_flops, 'FLOP')} needed; {count(step.bytes, 'B')} "
        f"moved through caches, {count(step.least_bytes, 'B')} at least"
    )
    yield f"     why: {step.reason}"
    for loser in step.rejected:
        yield f"     not: {loser}"


def count(value: float, unit: str) -> str:
    """A number with its unit, in thousands: "17.2 GFLOP"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def duration(seconds: float) -> str:
    """A time in words: "21.0 us", "1.32 ms"."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"
