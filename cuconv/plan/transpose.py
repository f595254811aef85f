"""Plans of transposed convolutions and input gradients: convolutions with repacked weights, in sub-pixel form.

Output u of an axis collects ``y[p] * w[r]`` from every p and r with ``p*s + r*d - pad = u``. Written as
``u + pad = q*s + rho``, that fixes r modulo ``s / gcd(s, d)``: the taps of one phase rho are ``first``,
``first + step``, ... and the inputs they meet lie ``d / gcd(s, d)`` apart, a plain convolution of stride 1 over q.

With d = 1 all phases of an axis read the same inputs, ``q, q - 1, ...``. They are merged: their weights stand side by
side as columns of one product, k / s taps deep. Otherwise, and where merging would multiply mostly zeros (a stride
longer than the kernel), every phase is a launch of its own. No zero is inserted, nothing is scattered.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

from cuconv.geometry import ConvShape
from cuconv.plan.conv import Form, plan_form, plan_parts
from cuconv.plan.cost import total
from cuconv.plan.pack import Taps, plan_pack
from cuconv.plan.types import Cost, DeviceLimits, LaunchPlan
from cuconv.plan.wgmma import sums_along_memory


@dataclass(frozen=True)
class Phase:
    """One axis of one launch.

    Attributes:
        taps: of the convolution over q; tap a is tap ``first + rho + (taps - 1 - a) * step`` of the kernel.
        used: taps of the kernel in all phases; fewer than phases * taps where the last ones have one less.
        phases: rho = 0 .. phases - 1 are columns of the product.
        dilation, pad, count: of the convolution over q, and how many q there are.
        up, shift: q and rho stand for output ``q * up + rho + shift``.
    """

    taps: int
    used: int
    phases: int
    first: int
    step: int
    dilation: int
    pad: int
    count: int
    up: int
    shift: int


@dataclass(frozen=True)
class Part:
    """A convolution, and the packing of its weights before it; `pack` is None where no tap reaches these outputs.

    Where K is split, `reduce` ends the convolution, which makes partial sums.
    """

    pack: LaunchPlan | None
    conv: LaunchPlan
    reduce: LaunchPlan | None = None


@dataclass(frozen=True)
class TransposePlan:
    """The launches of a transposed convolution, one after the other; they share `packed` elements of packed weights.

    Attributes:
        partial: partial sums, of the dtype of sums.
    """

    parts: tuple[Part, ...]
    packed: int
    reason: str
    partial: int = 0

    @property
    def cost(self) -> Cost:
        """Of all launches."""
        launches = (launch for part in self.parts for launch in (part.pack, part.conv, part.reduce))
        return total(launch.cost for launch in launches if launch is not None)


@functools.lru_cache(maxsize=4096)
def plan_transpose(
    shape: ConvShape,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    precision: str = "highest",
    workspace: int = 0,
) -> TransposePlan:
    """The plan of the transpose of `shape`: its input is ``shape.y_shape``, its output ``shape.x_shape``.

    Args:
        activation: a name of ACTIVATION_CODES.
        aligned: elements by which y, w and the output lie behind a 16-byte boundary.
        precision: as of :func:`cuconv.plan.conv.plan_conv`.
        workspace: bytes that partial sums may take.
    """
    can_merge = [s == 1 or d == 1 for s, d in zip(shape.strides, shape.dilation_rate, strict=True)]
    merged = _plan(shape, dtype, activation, aligned, limits, precision, workspace, can_merge)
    if math.prod(shape.strides) == 1 or not any(can_merge):
        return merged
    apart = _plan(shape, dtype, activation, aligned, limits, precision, workspace, [s == 1 for s in shape.strides])
    return merged if merged.cost.seconds <= apart.cost.seconds else apart


def _plan(
    shape: ConvShape,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    precision: str,
    workspace: int,
    merge: list[bool],
) -> TransposePlan:
    axes = [axis_phases(shape, axis, merge[axis]) for axis in range(shape.rank)]
    parts = []
    packed = partial = 0
    # Partial sums are those of all outputs.
    room = workspace if all(len(phases) == 1 for phases in axes) else 0
    for phases in itertools.product(*axes):
        part, size, partial = _part(shape, phases, dtype, activation, aligned, limits, precision, room)
        parts.append(part)
        packed = max(packed, size)
    side = math.prod(s for s, together in zip(shape.strides, merge, strict=True) if together)
    reason = f"sub-pixel form, {len(parts)} product(s) with {side} phase(s) side by side in the columns"
    return TransposePlan(tuple(parts), packed, reason, partial)


def axis_phases(shape: ConvShape, axis: int, merge: bool) -> list[Phase]:
    """The phases of one axis: one that stands for all of them, or one for each that has outputs."""
    k, s, d = shape.kernel_size[axis], shape.strides[axis], shape.dilation_rate[axis]
    pad, size = shape.pad_before[axis], shape.in_size[axis]
    if merge and s > 1:
        # Outputs pad .. pad + size - 1 of the uncropped product are those of q = low .. high.
        low, high = pad // s, (pad + size - 1) // s
        taps = -(-k // s)
        return [Phase(taps, k, s, 0, s, 1, taps - 1 - low, high - low + 1, s, low * s - pad)]
    found = []
    common = math.gcd(s, d)
    step, dilation = s // common, d // common
    for rho in range(s):
        low, high = -(-(pad - rho) // s), (pad + size - 1 - rho) // s
        if high < low:
            continue
        # The first tap of this phase: r * d = rho modulo s, which needs rho to be a multiple of gcd(s, d).
        first = rho // common * pow(dilation, -1, step) % step if rho % common == 0 else k
        taps = max(0, -(-(k - first) // step))
        ahead = (first * d - rho) // s  # q - ahead is the input that the first tap meets
        before = (taps - 1) * dilation + ahead - low if taps else 0
        found.append(Phase(taps, taps, 1, first, step, dilation, before, high - low + 1, s, low * s + rho - pad))
    return found


def _part(
    shape: ConvShape,
    phases: tuple[Phase, ...],
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    precision: str,
    workspace: int,
) -> tuple[Part, int, int]:
    """The launches for one phase of every axis, the elements of its packed weights, and its partial sums."""
    channels, filters = shape.in_channels // shape.groups, shape.filters // shape.groups
    taps, side = math.prod(phase.taps for phase in phases), math.prod(phase.phases for phase in phases)
    depth, columns = taps * filters, side * channels
    part = dataclasses.replace(
        shape,
        in_size=shape.out_size,
        out_size=tuple(phase.count for phase in phases),
        in_channels=shape.filters,
        filters=columns * shape.groups,
        kernel_size=tuple(phase.taps for phase in phases),
        strides=(1,) * shape.rank,
        dilation_rate=tuple(phase.dilation for phase in phases),
        pad_before=tuple(phase.pad for phase in phases),
    )
    span = tuple(phase.taps * phase.dilation if taps else 0 for phase in phases)
    upsampled = (
        shape.in_size,
        tuple(phase.up for phase in phases),
        tuple(phase.phases for phase in phases),
        tuple(phase.shift for phase in phases),
    )
    # Every input meets every tap, also where what comes out is cropped.
    meetings = math.prod(n * phase.used for n, phase in zip(shape.out_size, phases, strict=True))
    products = shape.batch * meetings * channels * filters * shape.groups
    form = Form(part, columns, depth, columns, depth * columns, span, products, upsampled)
    aligned = (aligned[0], 0, aligned[2])
    conv = plan_form(form, dtype, activation, aligned, limits, precision)
    if not taps:
        return Part(None, conv), 0, 0
    split = plan_parts(form, dtype, activation, aligned, workspace, conv, limits, precision)
    axes = [Taps(phase.taps, phase.phases, phase.first, phase.step) for phase in phases]
    pack = plan_pack(shape, axes, dtype, limits, sums_along_memory(split.conv if split else conv))
    packed = depth * columns * shape.groups
    if split is None:
        return Part(pack, conv), packed, 0
    return Part(pack, split.conv, split.reduce), packed, split.partial
